//! The parts that burn-train requires of a run and that a run does not use.
//!
//! burn-train 0.21 gives a custom training strategy its display, its metrics and its interrupter only inside a complete
//! `SupervisedTraining` with a `Learner`, whose types demand a training step, an inference step, two data loaders and an
//! optimizer. A run has its own: it selects its batches by the number of the step, so that it can resume exactly where
//! it stopped, and burn-zero's engine computes the step, with a backward pass per block, accumulation, sharding over
//! ranks and offloading, none of which a step of burn-train can express. Therefore the steps here take a batch of a type
//! without values, which no loader can yield, so that nothing can call them, and the optimizer never sees a gradient.

use super::burn_metrics::StepMetrics;
use burn::{
    backend::Autodiff,
    data::dataloader::{DataLoader, DataLoaderIterator, Progress},
    module::Module,
    optim::{AdamW, AdamWConfig, adaptor::OptimizerAdaptor},
    tensor::backend::Backend,
    train::{InferenceStep, Learner, LearningComponentsMarker, SupervisedTraining, TrainOutput, TrainStep},
};
use burn_llama::{Llama, kernel::Kernels};
use std::{convert::Infallible, sync::Arc};

/// The types of a run as burn-train names them.
pub(super) type Components<B> =
    LearningComponentsMarker<Autodiff<B>, f64, LearnerModule<Autodiff<B>>, UnusedOptimizer<B>>;
/// The type of the optimizer that is not used.
type UnusedOptimizer<B> = OptimizerAdaptor<AdamW, LearnerModule<Autodiff<B>>, Autodiff<B>>;
/// The type of a batch: it has no values.
type NoBatch = Infallible;

/// The module that wraps the model for burn-train's learner. The run trains the model in its own engine.
#[derive(Module, Debug)]
pub(super) struct LearnerModule<B: Kernels> {
    pub llama: Llama<B>,
}

impl<B: Kernels> TrainStep for LearnerModule<Autodiff<B>> {
    type Input = NoBatch;
    type Output = StepMetrics;

    fn step(&self, batch: NoBatch) -> TrainOutput<StepMetrics> {
        match batch {}
    }
}

impl<B: Kernels> InferenceStep for LearnerModule<B> {
    type Input = NoBatch;
    type Output = StepMetrics;

    fn step(&self, batch: NoBatch) -> StepMetrics {
        match batch {}
    }
}

/// The empty data loader.
struct EmptyDataLoader;

impl Iterator for EmptyDataLoader {
    type Item = NoBatch;

    fn next(&mut self) -> Option<NoBatch> {
        None
    }
}

impl DataLoaderIterator<NoBatch> for EmptyDataLoader {
    fn progress(&self) -> Progress {
        Progress { items_processed: 0, items_total: 0 }
    }
}

impl<B: Backend> DataLoader<B, NoBatch> for EmptyDataLoader {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<NoBatch> + 'a> {
        Box::new(Self)
    }

    fn num_items(&self) -> usize {
        0
    }

    fn to_device(&self, _: &B::Device) -> Arc<dyn DataLoader<B, NoBatch>> {
        Arc::new(Self)
    }

    fn slice(&self, _: usize, _: usize) -> Arc<dyn DataLoader<B, NoBatch>> {
        Arc::new(Self)
    }
}

/// Returns a training without data. Its directory is empty too: the run writes its files itself.
pub(super) fn training<B: Kernels>() -> SupervisedTraining<Components<B>> {
    SupervisedTraining::new("", Arc::new(EmptyDataLoader), Arc::new(EmptyDataLoader))
}

/// Returns the learner that holds the model, with an optimizer at a learning rate of 0.
pub(super) fn learner<B: Kernels>(model: Llama<Autodiff<B>>) -> Learner<Components<B>> {
    Learner::new(LearnerModule { llama: model }, AdamWConfig::new().init(), 0.0)
}
