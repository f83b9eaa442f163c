//! The training engine: takes micro-batches, updates the model, in one process or in many.

use crate::{
    Error,
    comm::{AsyncCommunicator, Collectives, Trace, Traffic},
    gather::{PutParams, ShardContext, WeightShards},
    host_or_device::HostOrDevice,
    mesh::MeshTraffic,
    offload::{HostOptimizer, MemoryTier, OffloadedStates},
    optimizer::{Optimizer, OptimizerState},
    precision::LossScaler,
    reduce::GradientReducer,
    segment::{Gradient, TrainSegments},
    sharding::{Parameter, ShardLayout},
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
mod parts;
mod stages;
mod step;
mod tied;
mod update;

pub use checkpoint::{consolidate, restore_weights};
pub use config::EngineConfig;
use config::EngineSettings;
use stages::PipelineAxis;
pub use stages::PipelineConfig;
use tied::TiedParameter;

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

/// The outcome of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainStepOutput {
    /// The loss of the micro-batches on this rank, as [`Engine::forward_backward`] returns it.
    pub loss: f64,
    /// The report of the optimizer step.
    pub report: StepReport,
}

/// One rank that trains a model; [`EngineConfig::init`] creates it. [`Engine::train_step`] takes an optimizer step of
/// all its micro-batches.
///
/// All ranks create the same model and take the same number of micro-batches, each replica its own.
/// [`Sharding`](crate::Sharding) says which share of the gradients, optimizer states and weights a rank holds; the results
/// do not depend on it. With one micro-batch per rank and step (and with more, where gradients are sharded) the
/// parameters are bit for bit those of a single rank that takes the micro-batches of all ranks in rank order.
///
/// In a pipeline ([`EngineConfig::with_pipeline`]) a rank keeps and updates the parameters that its stages use; the
/// others are placeholders of one element. A parameter that several ranks use, such as an embedding that is also the
/// head, is updated by the first of them. The ranks of one pipeline take the same micro-batches, and all gradients are
/// bit for bit those of one process that accumulates them, but for such a parameter, whose uses are summed per step.
pub struct Engine<B: AutodiffBackend, M> {
    /// The model; in stage 3 its float parameters are placeholders of one element.
    model: M,
    settings: EngineSettings,
    /// The ranks that run the same stages, each with micro-batches of its own.
    communicator: AsyncCommunicator,
    pipeline: PipelineAxis,
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
    tied: Vec<TiedParameter>,
}

impl<B: AutodiffBackend> ShardingState<B> {
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
    /// Creates the states of the world's rank `rank`, whose replicas `communicator` connects.
    fn new(
        optimizer: Optimizer,
        tier: &MemoryTier,
        communicator: &AsyncCommunicator,
        rank: usize,
    ) -> Result<Self, Error> {
        let on_device = *tier == MemoryTier::Device && !matches!(optimizer, Optimizer::AdamW8bit(_));
        let host = if on_device {
            None
        } else {
            let states = OffloadedStates::new(optimizer, tier, rank)?;
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
    /// gathered for the call, and every rank must call this method; in the other stages nothing is copied. In a pipeline
    /// the parameters of other stages are placeholders of one element, so a forward pass fails; see [`Engine::losses`].
    ///
    /// # Errors
    /// Returns the same errors as [`Engine::forward_backward`].
    pub fn with_full_params<R>(&self, f: impl FnOnce(&M) -> R) -> Result<R, Error> {
        Ok(f(self.gathered_model()?.as_ref().unwrap_or(&self.model)))
    }

    /// Ends the training and returns the model with all its weights. In stage 3 the weights are gathered, and every
    /// rank must call this method. In a pipeline the parameters of other stages are placeholders of one element.
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

    /// Returns the gradients that this rank has accumulated since the last step and not yet reduced, in the order in
    /// which the model runs. Of a parameter that several ranks of a pipeline use, it is this rank's part.
    pub fn gradients(&self) -> Vec<Gradient<B::InnerBackend>> {
        let ShardingState { layout, reducer, .. } = &self.sharded;
        let own = layout.parameters.iter().enumerate().filter_map(|(index, parameter)| {
            let value = reducer.unreduced().get(&index)?.clone();
            Some(Gradient { path: parameter.path.clone(), id: parameter.id, value })
        });
        own.collect()
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
        let mut sums = numbers.to_vec();
        for axis in [&self.communicator, &self.pipeline.communicator] {
            let own: Vec<u8> = sums.iter().flat_map(|number| number.to_le_bytes()).collect();
            let all = axis.submit("share", move |group| group.all_gather_object(&own)).wait()?;
            sums.fill(0.0);
            for bytes in all {
                let numbers =
                    bytes.chunks_exact(8).map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]));
                sums.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number);
            }
        }
        Ok(sums)
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// Returns the same errors as [`Engine::forward_backward`].
    pub fn barrier(&self) -> Result<(), Error> {
        // When a rank has passed the first barrier, all replicas of its stage have called this method; when it has passed
        // the second, all stages have.
        self.communicator.submit("barrier", |group| group.barrier()).wait()?;
        self.pipeline.communicator.submit("barrier", |group| group.barrier()).wait()
    }

    /// Returns the number of values in the trainable parameters, with any sharding; in a pipeline those that this rank's
    /// stages update.
    pub fn trainable_parameters(&self) -> usize {
        let own = |parameter: &&Parameter| parameter.trainable && parameter.chunk.is_some();
        let trainable = self.sharded.layout.parameters.iter().filter(own);
        trainable.map(Parameter::elements).sum()
    }

    /// Returns the number of optimizer steps taken.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Returns this process's rank.
    pub fn rank(&self) -> usize {
        self.pipeline.rank() * self.replicas() + self.replica()
    }

    /// Returns the number of ranks that train together.
    pub fn world(&self) -> usize {
        self.pipeline.communicator.world_size() * self.replicas()
    }

    /// Returns the number of this rank's replica of the model, which decides about its micro-batches.
    pub fn replica(&self) -> usize {
        self.communicator.rank()
    }

    /// Returns the number of replicas of the model, among which the data is divided.
    pub fn replicas(&self) -> usize {
        self.communicator.world_size()
    }

    /// Returns how much this rank has sent.
    pub fn traffic(&self) -> Traffic {
        self.communicator.traffic() + self.pipeline.communicator.traffic()
    }

    /// Returns how much this rank has sent along each axis of the mesh.
    pub fn traffic_by_axis(&self) -> MeshTraffic {
        MeshTraffic { data: self.communicator.traffic(), pipeline: self.pipeline.communicator.traffic() }
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
        let mut events = self.trace().events(self.rank());
        for axis in [&self.communicator, &self.pipeline.communicator] {
            let own = serde_json::Value::from(events).to_string();
            let all = axis.submit("share", move |group| group.all_gather_object(own.as_bytes())).wait()?;
            let lists = all.iter().filter_map(|own| serde_json::from_slice::<Vec<serde_json::Value>>(own).ok());
            events = lists.flatten().collect();
        }
        if self.rank() != 0 {
            return Ok(());
        }
        crate::trace::write_events(path, &events)
    }
}

#[cfg(test)]
mod tests;
