//! The reporter that passes the events of a run on to burn-train: its metrics and its display.

use super::{
    burn_metrics::StepMetrics,
    burn_placeholders::Components,
    event::{Reporter, RunEvent, RunStart},
    record::{EvalRecord, MetricsRecord, StepRecord},
};
use anyhow::Result;
use burn::{
    data::dataloader::Progress,
    train::{EventProcessorTraining, LearnerEvent, SupervisedTrainingEventProcessor, TrainingItem},
};
use burn_llama::kernel::Kernels;

/// Reporter for burn-train. For burn-train, every evaluation ends an epoch. Losses that are not finite are left out.
pub(super) struct BurnTrainReporter<B: Kernels> {
    processor: SupervisedTrainingEventProcessor<Components<B>>,
    /// Steps of the whole run.
    total_steps: usize,
    /// Steps between two evaluations.
    eval_every: usize,
    /// The number of the epoch, counted from 1.
    epoch: usize,
}

impl<B: Kernels> BurnTrainReporter<B> {
    /// Creates the reporter, which expects the start of a run.
    pub(super) fn new(processor: SupervisedTrainingEventProcessor<Components<B>>) -> Self {
        Self { processor, total_steps: 1, eval_every: 1, epoch: 1 }
    }

    /// Returns burn-train's processor at the end of the run.
    pub(super) fn into_processor(self) -> SupervisedTrainingEventProcessor<Components<B>> {
        self.processor
    }

    fn start(&mut self, start: &RunStart) {
        (self.total_steps, self.eval_every) = (start.total_steps, start.eval_every);
        start.earlier.iter().for_each(|record| self.record(record));
    }

    fn record(&mut self, record: &MetricsRecord) {
        match record {
            MetricsRecord::Step(record) if record.loss.is_finite() => self.step(record),
            MetricsRecord::Eval(record) if record.step > 0 && record.valid_loss.is_finite() => self.evaluation(record),
            _ => {}
        }
    }

    fn step(&mut self, record: &StepRecord) {
        let taken = record.step.saturating_sub((self.epoch - 1) * self.eval_every);
        let part = Progress { items_processed: taken, items_total: self.eval_every };
        let speed = record.tokens.tokens_per_second;
        let metrics = StepMetrics {
            loss: record.loss,
            target_tokens: record.tokens.target_tokens,
            tokens_per_second: if speed.is_finite() { speed } else { 0.0 },
        };
        let (step, learning_rate) = (Some(record.step), Some(record.learning_rate));
        let item = TrainingItem::new(metrics, part, self.epochs(), step, learning_rate);
        self.processor.process_train(LearnerEvent::ProcessedItem(item));
    }

    fn evaluation(&mut self, record: &EvalRecord) {
        self.processor.process_train(LearnerEvent::EndEpoch(self.epoch));
        let metrics = StepMetrics { loss: record.valid_loss, target_tokens: 1, tokens_per_second: 0.0 };
        let one = Progress { items_processed: 1, items_total: 1 };
        let item = TrainingItem::new(metrics, one, self.epochs(), Some(record.step), None);
        self.processor.process_valid(LearnerEvent::ProcessedItem(item));
        self.processor.process_valid(LearnerEvent::EndEpoch(self.epoch));
        self.epoch += 1;
    }

    fn epochs(&self) -> Progress {
        Progress { items_processed: self.epoch, items_total: self.total_steps.div_ceil(self.eval_every) }
    }
}

impl<B: Kernels> Reporter for BurnTrainReporter<B> {
    fn report(&mut self, event: &RunEvent) -> Result<()> {
        match event {
            RunEvent::Started(start) => self.start(start),
            RunEvent::Record(record) => self.record(record),
            // burn-train's learner ends the display itself.
            RunEvent::TraceWritten(_) | RunEvent::Finished(_) => {}
        }
        Ok(())
    }
}
