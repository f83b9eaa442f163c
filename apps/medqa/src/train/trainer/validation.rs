//! The evaluation of the validation rows during training.

use super::{RunEvent, Trainer};
use crate::{
    eval::{EvalBatching, TotalLoss, eval_batches},
    train::{
        best::BestWeights,
        early_stopping::EarlyStopping,
        eval_device::{self, Evaluator},
        event::Reporter,
        record::{BestEvaluation, EvalRecord, MetricsRecord},
    },
};
use anyhow::Result;
use burn::backend::Autodiff;
use burn_llama::{Batch, Example, SequenceLayout, kernel::Kernels};
use burn_peft::ForwardContext;

/// The largest number of batches that are in a pipeline at a time.
const BATCHES_PER_CALL: usize = 32;

/// The validation rows, and what evaluates them.
pub(super) struct ValidationData {
    pub rows: Vec<Example>,
    /// Computes the validation loss on `train.eval_device`, if that is given.
    pub evaluator: Option<Box<dyn Evaluator>>,
    /// The rule of `train.early_stopping`; absent on other ranks than 0, which decides for all.
    pub early_stopping: Option<EarlyStopping>,
    /// The best evaluation so far, with `train.keep_best`; only rank 0 knows it.
    pub best: BestWeights,
}

/// The result of an evaluation.
pub(super) struct Validation {
    /// Mean loss per target token, in nats.
    pub loss: f64,
    /// True if the run should stop early.
    pub stop_early: bool,
}

impl<B: Kernels> Trainer<B> {
    /// Computes the validation loss after `step` steps and reports it; `None` if there are no validation rows.
    pub(super) fn evaluate(&mut self, step: usize, display: &mut dyn Reporter) -> Result<Option<Validation>> {
        if self.validation.rows.is_empty() {
            return Ok(None);
        }
        let batch_size = self.recipe.train.steps.batch_size;
        let batching = EvalBatching { batch_size, padding_free: self.recipe.data.packing.is_padding_free() };
        // Every replica takes whole batches, in turn.
        let rows = self.validation.rows.chunks(batch_size).skip(self.engine.replica()).step_by(self.engine.replicas());
        let examples: Vec<Example> = rows.flatten().cloned().collect();
        let own = match &mut self.validation.evaluator {
            Some(there) => self.engine.with_full_params(|model| {
                there.loss(eval_device::trainable_values::<Autodiff<B>, _>(model), &examples, batching)
            })??,
            None => {
                let mut batches = eval_batches(self.engine.model(), &examples, batching)?;
                // In stage 3 every rank takes part in gathering the weights, so all have as many batches.
                let batches_per_replica = self.validation.rows.len().div_ceil(batch_size * self.engine.replicas());
                if batches.len() < batches_per_replica {
                    batches.push(self.idle_batch()?);
                }
                // A pipeline may send all messages of a call before the first is taken.
                let mut sum = 0.0;
                for some in batches.chunks(BATCHES_PER_CALL) {
                    sum += self.engine.losses(some)?;
                }
                TotalLoss { sum, target_tokens: examples.iter().map(Example::num_targets).sum() }
            }
        };
        // The ranks of a pipeline have the same rows.
        let targets = if self.engine.rank() < self.engine.replicas() { own.target_tokens as f64 } else { 0.0 };
        let sums = self.engine.sum_over_ranks(&[own.sum, targets])?;
        let (loss, elapsed_seconds) = (sums[0] / sums[1], self.progress.elapsed_seconds());
        if step == 0 {
            self.engine.with_full_params(|model| model.check_finite("validation loss", loss.is_finite()))??;
        }
        let record = MetricsRecord::Eval(EvalRecord { step, valid_loss: loss, elapsed_seconds });
        self.report(&RunEvent::Record(&record), display)?;
        self.keep_best(BestEvaluation { step, valid_loss: loss })?;
        let observed = self.validation.early_stopping.as_mut().zip(record.valid_loss_after_training());
        let stop = observed.is_some_and(|(rule, loss)| rule.observe(loss));
        Ok(Some(Validation { loss, stop_early: self.any_rank(stop)? }))
    }

    /// Builds a batch of one validation row with weight 0, for a replica that has no rows left.
    fn idle_batch(&self) -> Result<Batch<Autodiff<B>>> {
        let row = &self.validation.rows[..1];
        let layout = SequenceLayout::from_lengths(&[row[0].ids.len()], true);
        Ok(self.engine.model().batch(row, &layout, 0.0, ForwardContext::default())?)
    }
}
