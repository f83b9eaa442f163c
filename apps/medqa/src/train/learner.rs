//! The run as burn-train sees it: a module that takes steps, and a strategy that hands the model to the run's own loop.

use super::{
    figures::{Figure, Figures, Loss, Number, Speed},
    quiet,
    run::{Ended, Run},
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

type Components<B> = LearningComponentsMarker<Autodiff<B>, f64, Tuned<Autodiff<B>>, Unused<B>>;
/// The learner wants an optimizer; the run has its own.
type Unused<B> = OptimizerAdaptor<AdamW, Tuned<Autodiff<B>>, Autodiff<B>>;

/// The model as burn-train's learner holds it. The run takes it out, so paths do not know of it.
#[derive(Module, Debug)]
pub struct Tuned<B: Kernels> {
    llama: Llama<B>,
}

impl<B: Kernels> TrainStep for Tuned<Autodiff<B>> {
    type Input = Batch<Autodiff<B>>;
    type Output = Figures;

    fn step(&self, batch: Batch<Autodiff<B>>) -> TrainOutput<Figures> {
        let mut grads = GradientsParams::new();
        let loss = segment::run(&self.llama, &batch, Checkpointing::None, &mut |found| {
            for gradient in found {
                match gradient.value.clone().primitive().shape().num_dims() {
                    1 => grads.register::<B, 1>(gradient.id, gradient.value.tensor()),
                    _ => grads.register::<B, 2>(gradient.id, gradient.value.tensor()),
                }
            }
        });
        let loss = loss.flatten().sum().into_scalar().elem();
        TrainOutput { grads, item: Figures { loss, targets: 1, speed: 0.0 } }
    }
}

impl<B: Kernels> InferenceStep for Tuned<B> {
    type Input = Batch<B>;
    type Output = Figures;

    fn step(&self, batch: Batch<B>) -> Figures {
        let loss = self.llama.batch_loss(&batch).sum().into_scalar().elem();
        Figures { loss, targets: 1, speed: 0.0 }
    }
}

/// The loader that burn-train asks for. The run draws its batches by the number of the step instead, so that it can go on
/// exactly where it stopped.
struct Nothing<O>(PhantomData<fn() -> O>);

impl<O> Iterator for Nothing<O> {
    type Item = O;

    fn next(&mut self) -> Option<O> {
        None
    }
}

impl<O> DataLoaderIterator<O> for Nothing<O> {
    fn progress(&self) -> Progress {
        Progress { items_processed: 0, items_total: 0 }
    }
}

impl<B: Backend, O: 'static> DataLoader<B, O> for Nothing<O> {
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

/// Where the run's lines of `metrics.jsonl` go besides: burn-train's metrics, its display and its early stopping. One
/// evaluation ends one of its epochs.
pub struct Feed<B: Kernels> {
    processor: SupervisedTrainingEventProcessor<Components<B>>,
    store: Arc<EventStoreClient>,
    early_stopping: Option<Box<dyn CloneEarlyStoppingStrategy>>,
    /// The user's wish to stop, from the keyboard or from the display.
    pub interrupter: Interrupter,
    /// Steps from one evaluation to the next, and in all.
    steps: (usize, usize),
    epoch: usize,
}

impl<B: Kernels> Feed<B> {
    /// Passes on a line; whether early stopping has had enough.
    pub fn line(&mut self, line: &Value) -> bool {
        let number = |key: &str| line[key].as_f64();
        let step = number("step").unwrap_or(0.0) as usize;
        let (every, all) = self.steps;
        let whole = Progress { items_processed: self.epoch, items_total: all.div_ceil(every) };
        let part = Progress { items_processed: step.saturating_sub((self.epoch - 1) * every), items_total: every };
        if let Some(loss) = number("loss") {
            let speed = number("tokens_per_second").unwrap_or(0.0);
            let figures = Figures { loss, targets: number("target_tokens").unwrap_or(1.0) as usize, speed };
            let item = TrainingItem::new(figures, part, whole, Some(step), number("learning_rate"));
            self.processor.process_train(LearnerEvent::ProcessedItem(item));
            return false;
        }
        let Some(loss) = number("valid_loss").filter(|_| step > 0) else { return false };
        let one = Progress { items_processed: 1, items_total: 1 };
        self.processor.process_train(LearnerEvent::EndEpoch(self.epoch));
        let item = TrainingItem::new(Figures { loss, targets: 1, speed: 0.0 }, one, whole, Some(step), None);
        self.processor.process_valid(LearnerEvent::ProcessedItem(item));
        self.processor.process_valid(LearnerEvent::EndEpoch(self.epoch));
        self.epoch += 1;
        self.enough(self.epoch - 1)
    }

    fn enough(&mut self, epoch: usize) -> bool {
        let Some(strategy) = &mut self.early_stopping else { return false };
        // Events travel through two threads; the value has to be there before the strategy looks for it.
        let there = || self.store.find_metric(Loss::NAME, epoch, Aggregate::Mean, &Split::Valid).is_some();
        for _ in 0..200 {
            if there() {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        strategy.should_stop(epoch, &self.store)
    }
}

/// The strategy: the run's loop, with its outcome.
struct Steps<B: Kernels> {
    run: Mutex<Run<B>>,
    outcome: Mutex<Option<Result<Ended>>>,
}

impl<B: Kernels> SupervisedLearningStrategy<Components<B>> for Steps<B> {
    fn fit(
        &self,
        components: TrainingComponents<Components<B>>,
        learner: Learner<Components<B>>,
        _: TrainLoader<Components<B>>,
        _: ValidLoader<Components<B>>,
        _: usize,
    ) -> (Tuned<Autodiff<B>>, SupervisedTrainingEventProcessor<Components<B>>) {
        let mut tuned = learner.model();
        // A second handle to the parameters would make every update a copy.
        drop(learner);
        let mut run = self.run.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut feed = Feed {
            processor: components.event_processor,
            store: components.event_store,
            early_stopping: components.early_stopping,
            interrupter: components.interrupter,
            steps: run.evaluated_every(),
            epoch: 1,
        };
        let outcome = run.go(&mut tuned.llama, &mut feed);
        *self.outcome.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(outcome);
        (tuned, feed.processor)
    }
}

/// Runs on burn-train: on a terminal with its display, else silently beside the run's own lines.
pub fn launch<B: Kernels>(run: Run<B>, model: Llama<Autodiff<B>>, interrupter: Interrupter) -> Result<Ended> {
    let (patience, display) = (run.patience(), run.display);
    let steps = Arc::new(Steps { run: Mutex::new(run), outcome: Mutex::new(None) });
    let metric = Figure::<Loss>::new();
    let mut training: SupervisedTraining<Components<B>> =
        SupervisedTraining::new("", Arc::new(Nothing(PhantomData)), Arc::new(Nothing(PhantomData)))
            .metric_train_numeric(metric.clone())
            .metric_valid_numeric(metric.clone())
            .metric_train_numeric(Figure::<Speed>::new())
            .metric_train_numeric(LearningRateMetric::new())
            .with_metric_logger(InMemoryMetricLogger::default())
            .with_application_logger(None)
            .with_interrupter(interrupter)
            .with_training_strategy(TrainingStrategy::Custom(steps.clone()));
    if !display {
        training = training.renderer(quiet::Quiet);
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
    drop(training.launch(Learner::new(Tuned { llama: model }, AdamWConfig::new().init(), 0.0)));
    let outcome = steps.outcome.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
    match outcome {
        Some(outcome) => outcome,
        None => bail!("the run ended without an outcome"),
    }
}
