//! The training engine: takes micro-batches, updates the model, in one process or in many.

use crate::{
    Error,
    comm::{AsyncCommunicator, Collectives, Trace, Traffic},
    gather::{PutParams, ShardContext, WeightShards},
    host_or_device::HostOrDevice,
    offload::{HostOptimizer, MemoryTier, OffloadedStates},
    optimizer::{Optimizer, OptimizerState},
    precision::LossScaler,
    reduce::GradientReducer,
    segment::TrainSegments,
    sharding::{RankInfo, ShardLayout, Sharding, device_of},
    stage::ZeroStage,
};
use burn::{
    module::ParamId,
    tensor::{Device, backend::AutodiffBackend},
};
use std::{collections::HashMap, path::Path};

mod access;
mod checkpoint;
mod config;
mod forward_backward;
mod memory;
mod step;
mod update;

pub use checkpoint::{consolidate, restore_weights};
pub use config::EngineConfig;
use config::EngineSettings;

/// The outcome of an optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// The global L2 norm of the step's gradient, before clipping.
    pub grad_norm: f64,
    /// True if the gradient was scaled down by clipping.
    pub clipped: bool,
    /// True if nothing was updated because the gradients overflowed at this loss scale.
    pub skipped: bool,
}

/// The outcome of the last micro-batch of a step and of the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainStepOutput {
    /// The loss of the micro-batch on this rank, as [`Engine::forward_backward`] returns it.
    pub loss: f64,
    /// The report of the optimizer step.
    pub report: StepReport,
}

/// One rank that trains a model; [`EngineConfig::init`] creates it. [`Engine::train_step`] takes an optimizer step of
/// one micro-batch. A step of several micro-batches is a call of [`Engine::forward_backward`] for each and then
/// [`Engine::step`]; or call [`Engine::forward_backward_step`] for the last micro-batch, which needs less memory if
/// gradients are not clipped.
///
/// All ranks hold the same model and take the same number of micro-batches, each rank its own. [`Sharding`] says which
/// share of the gradients, optimizer states and weights a rank holds; the results do not depend on it. With one
/// micro-batch per rank and step (and with more, where gradients are sharded) the parameters are bit for bit those of a
/// single rank that takes the micro-batches of all ranks in rank order.
pub struct Engine<B: AutodiffBackend, M> {
    /// The model; in stage 3 its float parameters are placeholders of one element.
    model: M,
    settings: EngineSettings,
    communicator: AsyncCommunicator,
    sharded: ShardingState<B>,
    states: OptimizerStates<B>,
    loss_scaler: Option<LossScaler>,
    steps: usize,
}

/// The layout of the model's shards, the gradients of the current step, and the weight shards.
struct ShardingState<B: AutodiffBackend> {
    layout: ShardLayout,
    device: Device<B::InnerBackend>,
    reducer: GradientReducer<B::InnerBackend>,
    /// The weight shards of stage 3; none in the other stages.
    weights: Option<WeightShards<B::InnerBackend>>,
}

impl<B: AutodiffBackend> ShardingState<B> {
    /// Shards a model; in stage 3 this rank's weight shards are taken out of it and kept in `tier`.
    fn new<M: TrainSegments<B>>(
        model: M,
        sharding: Sharding,
        communicator: &AsyncCommunicator,
        tier: &MemoryTier,
    ) -> Result<(M, Self), Error> {
        let layout = ShardLayout::new::<B, M>(&model, sharding, RankInfo::from(communicator));
        let (device, reducer) = (device_of::<B, M>(&model), GradientReducer::new(&layout));
        let (model, weights) = if sharding.stage == ZeroStage::Weights {
            let (placeholders, weights) = WeightShards::shard(model, &layout, &device, tier)?;
            (placeholders, Some(weights))
        } else {
            (model, None)
        };
        Ok((model, Self { layout, device, reducer, weights }))
    }

    /// Takes the gradients accumulated so far; gradients added from here on belong to the next step.
    fn take_gradients(&mut self) -> GradientReducer<B::InnerBackend> {
        let mut fresh = GradientReducer::new(&self.layout);
        fresh.peak = self.reducer.peak;
        std::mem::replace(&mut self.reducer, fresh)
    }
}

/// This rank's optimizer states and master weights.
struct OptimizerStates<B: AutodiffBackend> {
    /// The optimizer states on the device, by parameter: a rank has at most one shard of each parameter.
    device: HashMap<ParamId, OptimizerState<B::InnerBackend>>,
    /// The optimizer states in host memory or in a file, and the thread that updates them there.
    host: Option<HostOptimizer>,
    /// The f32 master weights of this rank's shards of half-precision weights; they are kept where the optimizer states
    /// are.
    master_weights: HashMap<ParamId, HostOrDevice<B::InnerBackend>>,
}

impl<B: AutodiffBackend> OptimizerStates<B> {
    fn new(optimizer: Optimizer, tier: &MemoryTier, communicator: &AsyncCommunicator) -> Result<Self, Error> {
        let on_device = *tier == MemoryTier::Device && !matches!(optimizer, Optimizer::AdamW8bit(_));
        let host = if on_device {
            None
        } else {
            let states = OffloadedStates::new(optimizer, tier, communicator.rank())?;
            Some(HostOptimizer::new(states, communicator))
        };
        Ok(Self { device: HashMap::new(), host, master_weights: HashMap::new() })
    }
}

impl<B: AutodiffBackend, M: TrainSegments<B>> Engine<B, M> {
    /// Returns the model. In stage 3 its float parameters are placeholders of one element, see
    /// [`Engine::with_full_params`].
    pub fn model(&self) -> &M {
        &self.model
    }

    /// Calls `f` with the model and all its weights, for example to evaluate or save it. In stage 3 the weights are
    /// gathered for the call, and every rank must call this method; in the other stages nothing is copied.
    ///
    /// # Errors
    /// Returns the same errors as [`Engine::forward_backward`].
    pub fn with_full_params<R>(&self, f: impl FnOnce(&M) -> R) -> Result<R, Error> {
        Ok(f(self.gathered_model()?.as_ref().unwrap_or(&self.model)))
    }

    /// Ends the training and returns the model with all its weights. In stage 3 the weights are gathered, and every
    /// rank must call this method.
    ///
    /// # Errors
    /// Returns the same errors as [`Engine::forward_backward`].
    pub fn into_model(self) -> Result<M, Error> {
        Ok(self.gathered_model()?.unwrap_or(self.model))
    }

    /// Gathers the weights of stage 3 into a copy of the model; none in the other stages.
    fn gathered_model(&self) -> Result<Option<M>, Error> {
        let ShardingState { layout, device, weights, .. } = &self.sharded;
        let Some(weights) = weights else { return Ok(None) };
        let values = weights.gather_all(ShardContext { layout, communicator: &self.communicator, device })?;
        Ok(Some(self.model.clone().map(&mut PutParams { values })))
    }

    /// Returns the factor by which the loss of the next micro-batch must be multiplied; 1 without a loss scaler.
    pub fn loss_scale(&self) -> f64 {
        self.loss_scaler.map_or(1.0, |scaler| scaler.scale())
    }

    /// Sums a few numbers over all ranks, in rank order; every rank must call this method.
    ///
    /// # Errors
    /// Returns the same errors as [`Engine::forward_backward`].
    pub fn sum_over_ranks(&self, numbers: &[f64]) -> Result<Vec<f64>, Error> {
        let own: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let all = self.communicator.submit("share", move |group| group.all_gather_object(&own)).wait()?;
        let mut sums = vec![0.0; numbers.len()];
        for bytes in all {
            let numbers =
                bytes.chunks_exact(8).map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]));
            sums.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number);
        }
        Ok(sums)
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// Returns the same errors as [`Engine::forward_backward`].
    pub fn barrier(&self) -> Result<(), Error> {
        self.communicator.submit("barrier", |group| group.barrier()).wait()
    }

    /// Returns the number of optimizer steps taken.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Returns this process's rank.
    pub fn rank(&self) -> usize {
        self.communicator.rank()
    }

    /// Returns the number of ranks that train together.
    pub fn world(&self) -> usize {
        self.communicator.world_size()
    }

    /// Returns how much this rank has sent.
    pub fn traffic(&self) -> Traffic {
        self.communicator.traffic()
    }

    /// Returns the timeline of this rank: when it computed, communicated and waited.
    pub fn trace(&self) -> &Trace {
        self.communicator.trace()
    }

    /// Writes the timelines of all ranks into one file in the format of `chrome://tracing` and Perfetto; every rank
    /// must call this method, and rank 0 writes the file.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file cannot be written, otherwise the same errors as
    /// [`Engine::forward_backward`].
    pub fn write_trace(&self, path: &Path) -> Result<(), Error> {
        let own = serde_json::Value::from(self.trace().events(self.rank())).to_string();
        let all = self.communicator.submit("share", move |group| group.all_gather_object(own.as_bytes())).wait()?;
        if self.rank() != 0 {
            return Ok(());
        }
        let events = all.iter().filter_map(|own| serde_json::from_slice::<Vec<serde_json::Value>>(own).ok());
        crate::trace::write_events(path, &events.flatten().collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests;
