//! The run inside burn-train: a module with a training step, and a strategy that starts the run's own training loop.

use super::{
    burn_metrics::{LossInput, MetricInput, NumericMetric, StepMetrics, ThroughputInput},
    silent_renderer,
    trainer::{RunOutcome, Trainer},
};
use anyhow::{Result, bail};
use burn::{
    backend::Autodiff,
    data::dataloader::{DataLoader, DataLoaderIterator, Progress},
    module::Module,
    optim::{AdamW, AdamWConfig, GradientsParams, adaptor::OptimizerAdaptor},
    tensor::{ElementConversion, TensorMetadata, backend::Backend},
    train::{
        CloneEarlyStoppingStrategy, EventProcessorTraining, InferenceStep, Interrupter, Learner, LearnerEvent,
        LearningComponentsMarker, MetricEarlyStoppingStrategy, StoppingCondition, SupervisedLearningStrategy,
        SupervisedTraining, SupervisedTrainingEventProcessor, TrainLoader, TrainOutput, TrainStep, TrainingComponents,
        TrainingItem, TrainingStrategy, ValidLoader,
        logger::InMemoryMetricLogger,
        metric::{
            LearningRateMetric,
            store::{Aggregate, Direction, EventStoreClient, Split},
        },
    },
};
use burn_llama::{Batch, Llama, kernel::Kernels};
use burn_zero::segment::{self, Checkpointing};
use serde_json::Value;
use std::{
    marker::PhantomData,
    sync::{Arc, Mutex},
    time::Duration,
};

type Components<B> = LearningComponentsMarker<Autodiff<B>, f64, LearnerModule<Autodiff<B>>, UnusedOptimizer<B>>;
/// The optimizer type that the learner requires; it is not used, because the engine has its own optimizer.
type UnusedOptimizer<B> = OptimizerAdaptor<AdamW, LearnerModule<Autodiff<B>>, Autodiff<B>>;

/// The module that wraps the model for burn-train's learner. The run trains the model in its own engine.
#[derive(Module, Debug)]
pub struct LearnerModule<B: Kernels> {
    llama: Llama<B>,
}

impl<B: Kernels> TrainStep for LearnerModule<Autodiff<B>> {
    type Input = Batch<Autodiff<B>>;
    type Output = StepMetrics;

    fn step(&self, batch: Batch<Autodiff<B>>) -> TrainOutput<StepMetrics> {
        let mut grads = GradientsParams::new();
        let loss = segment::forward_backward(&self.llama, &batch, Checkpointing::None, &mut |found| {
            for gradient in found {
                match gradient.value.clone().primitive().shape().num_dims() {
                    1 => grads.register::<B, 1>(gradient.id, gradient.value.tensor()),
                    _ => grads.register::<B, 2>(gradient.id, gradient.value.tensor()),
                }
            }
        });
        let loss = loss.flatten().sum().into_scalar().elem();
        TrainOutput { grads, item: StepMetrics { loss, target_tokens: 1, tokens_per_second: 0.0 } }
    }
}

impl<B: Kernels> InferenceStep for LearnerModule<B> {
    type Input = Batch<B>;
    type Output = StepMetrics;

    fn step(&self, batch: Batch<B>) -> StepMetrics {
        let loss = self.llama.batch_loss(&batch).sum().into_scalar().elem();
        StepMetrics { loss, target_tokens: 1, tokens_per_second: 0.0 }
    }
}

/// The empty data loader that burn-train requires. The run selects its batches by the number of the step instead, so
/// that it can resume exactly where it stopped.
struct EmptyDataLoader<O>(PhantomData<fn() -> O>);

impl<O> Iterator for EmptyDataLoader<O> {
    type Item = O;

    fn next(&mut self) -> Option<O> {
        None
    }
}

impl<O> DataLoaderIterator<O> for EmptyDataLoader<O> {
    fn progress(&self) -> Progress {
        Progress { items_processed: 0, items_total: 0 }
    }
}

impl<B: Backend, O: 'static> DataLoader<B, O> for EmptyDataLoader<O> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<O> + 'a> {
        Box::new(Self(PhantomData))
    }

    fn num_items(&self) -> usize {
        0
    }

    fn to_device(&self, _: &B::Device) -> Arc<dyn DataLoader<B, O>> {
        Arc::new(Self(PhantomData))
    }

    fn slice(&self, _: usize, _: usize) -> Arc<dyn DataLoader<B, O>> {
        Arc::new(Self(PhantomData))
    }
}

/// Passes the lines of `metrics.jsonl` on to burn-train: its metrics, its display and its early stopping. For
/// burn-train, every evaluation ends an epoch.
pub struct BurnTrainReporter<B: Kernels> {
    processor: SupervisedTrainingEventProcessor<Components<B>>,
    store: Arc<EventStoreClient>,
    early_stopping: Option<Box<dyn CloneEarlyStoppingStrategy>>,
    /// The user's request to stop, from the keyboard or from the display.
    pub interrupter: Interrupter,
    /// Steps between two evaluations, and in total.
    interval_and_total: (usize, usize),
    epoch: usize,
}

impl<B: Kernels> BurnTrainReporter<B> {
    /// Passes on a line of metrics; returns whether to stop early.
    pub fn report(&mut self, line: &Value) -> bool {
        let number = |key: &str| line[key].as_f64();
        let step = number("step").unwrap_or(0.0) as usize;
        let (every, all) = self.interval_and_total;
        let whole = Progress { items_processed: self.epoch, items_total: all.div_ceil(every) };
        let part = Progress { items_processed: step.saturating_sub((self.epoch - 1) * every), items_total: every };
        if let Some(loss) = number("loss") {
            let speed = number("tokens_per_second").unwrap_or(0.0);
            let figures = StepMetrics {
                loss,
                target_tokens: number("target_tokens").unwrap_or(1.0) as usize,
                tokens_per_second: speed,
            };
            let item = TrainingItem::new(figures, part, whole, Some(step), number("learning_rate"));
            self.processor.process_train(LearnerEvent::ProcessedItem(item));
            return false;
        }
        let Some(loss) = number("valid_loss").filter(|_| step > 0) else { return false };
        let one = Progress { items_processed: 1, items_total: 1 };
        self.processor.process_train(LearnerEvent::EndEpoch(self.epoch));
        let item = TrainingItem::new(
            StepMetrics { loss, target_tokens: 1, tokens_per_second: 0.0 },
            one,
            whole,
            Some(step),
            None,
        );
        self.processor.process_valid(LearnerEvent::ProcessedItem(item));
        self.processor.process_valid(LearnerEvent::EndEpoch(self.epoch));
        self.epoch += 1;
        self.should_stop_early(self.epoch - 1)
    }

    fn should_stop_early(&mut self, epoch: usize) -> bool {
        let Some(strategy) = &mut self.early_stopping else { return false };
        // Events pass through two threads; the value has to arrive before the strategy reads it.
        let arrived = || self.store.find_metric(LossInput::NAME, epoch, Aggregate::Mean, &Split::Valid).is_some();
        for _ in 0..200 {
            if arrived() {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        strategy.should_stop(epoch, &self.store)
    }
}

/// The training strategy for burn-train: runs the run's own loop and keeps its outcome.
struct RunStrategy<B: Kernels> {
    run: Mutex<Trainer<B>>,
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
        let mut run = self.run.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut reporter = BurnTrainReporter {
            processor: components.event_processor,
            store: components.event_store,
            early_stopping: components.early_stopping,
            interrupter: components.interrupter,
            interval_and_total: run.eval_interval(),
            epoch: 1,
        };
        let outcome = run.train(&mut reporter);
        let wrapper = LearnerModule { llama: run.model().clone() };
        *self.outcome.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(outcome);
        (wrapper, reporter.processor)
    }
}

/// Runs the training loop inside burn-train: with its display on a terminal, else with a silent renderer and the run's
/// own lines.
pub fn run_in_burn_train<B: Kernels>(run: Trainer<B>, interrupter: Interrupter) -> Result<RunOutcome> {
    let (patience, display, model) = (run.patience(), run.display, run.model().clone());
    let steps = Arc::new(RunStrategy { run: Mutex::new(run), outcome: Mutex::new(None) });
    let metric = NumericMetric::<LossInput>::new();
    let mut training: SupervisedTraining<Components<B>> =
        SupervisedTraining::new("", Arc::new(EmptyDataLoader(PhantomData)), Arc::new(EmptyDataLoader(PhantomData)))
            .metric_train_numeric(metric.clone())
            .metric_valid_numeric(metric.clone())
            .metric_train_numeric(NumericMetric::<ThroughputInput>::new())
            .metric_train_numeric(LearningRateMetric::new())
            .with_metric_logger(InMemoryMetricLogger::default())
            .with_application_logger(None)
            .with_interrupter(interrupter)
            .with_training_strategy(TrainingStrategy::Custom(steps.clone()));
    if !display {
        training = training.renderer(silent_renderer::SilentRenderer);
    }
    if let Some(n_epochs) = patience {
        training = training.early_stopping(MetricEarlyStoppingStrategy::new(
            &metric,
            Aggregate::Mean,
            Direction::Lowest,
            Split::Valid,
            StoppingCondition::NoImprovementSince { n_epochs },
        ));
    }
    drop(training.launch(Learner::new(LearnerModule { llama: model }, AdamWConfig::new().init(), 0.0)));
    let outcome = steps.outcome.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
    match outcome {
        Some(outcome) => outcome,
        None => bail!("the run ended without an outcome"),
    }
}
