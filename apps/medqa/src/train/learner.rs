//! The run inside burn-train's learner: a training strategy that starts the run's own loop.

use super::{
    burn_metrics::{LossInput, NumericMetric, ThroughputInput},
    burn_placeholders::{self, Components, LearnerModule},
    burn_reporter::BurnTrainReporter,
    silent_renderer::SilentRenderer,
    trainer::{RunOutcome, Trainer},
};
use anyhow::{Result, bail};
use burn::{
    backend::Autodiff,
    train::{
        Interrupter, Learner, SupervisedLearningStrategy, SupervisedTrainingEventProcessor, TrainLoader,
        TrainingComponents, TrainingStrategy, ValidLoader, logger::InMemoryMetricLogger, metric::LearningRateMetric,
    },
};
use burn_llama::kernel::Kernels;
use std::sync::{Arc, Mutex, PoisonError};

/// The training strategy for burn-train: runs the run's own loop and keeps its outcome.
struct RunStrategy<B: Kernels> {
    trainer: Mutex<Trainer<B>>,
    outcome: Mutex<Option<Result<RunOutcome>>>,
}

impl<B: Kernels> SupervisedLearningStrategy<Components<B>> for RunStrategy<B> {
    fn fit(
        &self,
        components: TrainingComponents<Components<B>>,
        learner: Learner<Components<B>>,
        _: TrainLoader<Components<B>>,
        _: ValidLoader<Components<B>>,
        _: usize,
    ) -> (LearnerModule<Autodiff<B>>, SupervisedTrainingEventProcessor<Components<B>>) {
        // With a second handle to the parameters, every update would copy them.
        drop(learner);
        let mut reporter = BurnTrainReporter::<B>::new(components.event_processor);
        let mut trainer = self.trainer.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = trainer.train(&mut reporter, &components.interrupter);
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        (LearnerModule { llama: trainer.model().clone() }, reporter.into_processor())
    }
}

/// Runs the training loop inside burn-train: with burn-train's `display` on the terminal, else with a silent renderer
/// and the run's own lines.
pub(super) fn run_in_burn_train<B: Kernels>(
    trainer: Trainer<B>,
    display: bool,
    interrupter: Interrupter,
) -> Result<RunOutcome> {
    let model = trainer.model().clone();
    let strategy = Arc::new(RunStrategy { trainer: Mutex::new(trainer), outcome: Mutex::new(None) });
    let loss = NumericMetric::<LossInput>::new();
    let mut training = burn_placeholders::training::<B>()
        .metric_train_numeric(loss.clone())
        .metric_valid_numeric(loss)
        .metric_train_numeric(NumericMetric::<ThroughputInput>::new())
        .metric_train_numeric(LearningRateMetric::new())
        .with_metric_logger(InMemoryMetricLogger::default())
        .with_application_logger(None)
        .with_interrupter(interrupter)
        .with_training_strategy(TrainingStrategy::Custom(strategy.clone()));
    if !display {
        training = training.renderer(SilentRenderer);
    }
    drop(training.launch(burn_placeholders::learner::<B>(model)));
    let outcome = strategy.outcome.lock().unwrap_or_else(PoisonError::into_inner).take();
    match outcome {
        Some(outcome) => outcome,
        None => bail!("the run ended without an outcome"),
    }
}
