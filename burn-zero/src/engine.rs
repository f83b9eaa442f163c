//! The training engine: takes micro-batches, updates the model, in one process or in many.

use crate::{
    Error,
    comm::{AsyncCommunicator, Collectives, Communicator, Solo, Trace, Traffic},
    estimate::MemoryEstimate,
    gather::{PutParams, WeightShards},
    host_or_device::HostOrDevice,
    offload::{HostOptimizer, MemoryTier, OffloadedStates},
    optimizer::{Optimizer, OptimizerState, ParamGroups},
    precision::LossScaler,
    reduce::{GradientReducer, PeakMemory},
    segment::{Checkpointing, DynTensor, TrainSegments},
    sharding::{ShardLayout, Sharding},
    stage::ZeroStage,
};
use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::{
        Device, Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use std::{collections::HashMap, path::Path, sync::Arc};

mod checkpoint;
mod forward_backward;
mod step;
mod update;

pub use checkpoint::{consolidate, restore_weights};

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

/// One rank that trains a model. An optimizer step consists of any number of micro-batches: call
/// [`Engine::forward_backward`] for each and then [`Engine::step`], or call [`Engine::forward_backward_step`] for the
/// last micro-batch, which needs less memory if gradients are not clipped.
///
/// All ranks hold the same model and take the same number of micro-batches, each rank its own. [`Sharding`] says which
/// share of the gradients, optimizer states and weights a rank holds; the results do not depend on it. With one
/// micro-batch per rank and step (and with more, where gradients are sharded) the parameters are bit for bit those of a
/// single rank that takes the micro-batches of all ranks in rank order.
pub struct Engine<B: AutodiffBackend> {
    optimizer: Optimizer,
    param_groups: ParamGroups,
    max_grad_norm: Option<f64>,
    checkpointing: Checkpointing,
    sharding: Sharding,
    communicator: Arc<AsyncCommunicator>,
    sharding_state: Option<ShardingState<B>>,
    /// The optimizer states on the device, by parameter: a rank has at most one shard of each parameter.
    device_states: HashMap<ParamId, OptimizerState<B::InnerBackend>>,
    /// The optimizer states in host memory or in a file, and the thread that updates them there.
    host_optimizer: Option<HostOptimizer>,
    /// The f32 master weights of this rank's shards of half-precision weights; they are kept where the optimizer states
    /// are.
    master_weights: HashMap<ParamId, HostOrDevice<B::InnerBackend>>,
    /// The memory tier of this rank's weight shards in stage 3.
    weights_tier: MemoryTier,
    loss_scaler: Option<LossScaler>,
    /// True if communication and updates overlap with computation.
    overlap: bool,
    steps: usize,
}

/// The state of sharding, which exists once the engine has seen the model.
struct ShardingState<B: AutodiffBackend> {
    layout: ShardLayout,
    device: Device<B::InnerBackend>,
    reducer: GradientReducer<B::InnerBackend>,
    /// The weight shards of stage 3; none in the other stages.
    weights: Option<WeightShards<B::InnerBackend>>,
}

impl<B: AutodiffBackend> ShardingState<B> {
    /// Takes the gradients accumulated so far; gradients added from here on belong to the next step.
    fn take_gradients(&mut self) -> GradientReducer<B::InnerBackend> {
        let mut fresh = GradientReducer::new(&self.layout);
        fresh.peak = self.reducer.peak;
        std::mem::replace(&mut self.reducer, fresh)
    }
}

impl<B: AutodiffBackend> Engine<B> {
    /// Creates an engine in a world of one rank. `max_grad_norm` is the global norm to which gradients are clipped, if
    /// any.
    pub fn new(optimizer: impl Into<Optimizer>, max_grad_norm: Option<f64>, checkpointing: Checkpointing) -> Self {
        Self {
            optimizer: optimizer.into(),
            param_groups: ParamGroups::default(),
            max_grad_norm,
            checkpointing,
            sharding: Sharding::default(),
            communicator: Arc::new(AsyncCommunicator::new(Box::new(Solo))),
            sharding_state: None,
            device_states: HashMap::new(),
            host_optimizer: None,
            master_weights: HashMap::new(),
            weights_tier: MemoryTier::Device,
            loss_scaler: None,
            overlap: true,
            steps: 0,
        }
    }

    /// Makes the engine one rank of a world.
    pub fn in_world(self, communicator: Box<dyn Communicator>, sharding: Sharding) -> Self {
        Self { sharding, communicator: Arc::new(AsyncCommunicator::new(communicator)), ..self }
    }

    /// Replaces the parameter groups, which are [`ParamGroups::default`] otherwise.
    pub fn with_param_groups(self, groups: ParamGroups) -> Self {
        Self { param_groups: groups, ..self }
    }

    /// Keeps the optimizer states in a memory tier; unless that tier is the device, the update runs on the host as
    /// well. Call it after [`Engine::in_world`], because every rank has a file of its own. 8-bit states are always in
    /// host memory, so an engine with [`Optimizer::AdamW8bit`] needs this call.
    ///
    /// # Errors
    /// Returns [`ConfigError::InvalidValue`](crate::ConfigError::InvalidValue) for settings that cannot work and for an
    /// optimizer that cannot run on the host, [`Error::Io`] if the file cannot be created.
    pub fn with_optimizer_states_in(self, tier: &MemoryTier) -> Result<Self, Error> {
        self.optimizer.check()?;
        let device = *tier == MemoryTier::Device && !matches!(self.optimizer, Optimizer::AdamW8bit(_));
        let offload = || OffloadedStates::new(self.optimizer, tier, self.communicator.rank());
        let host_optimizer = if device { None } else { Some(HostOptimizer::new(offload()?, &self.communicator)) };
        Ok(Self { host_optimizer, ..self })
    }

    /// Keeps this rank's weight shards in a memory tier (DeepSpeed's `offload_param`): in stage 3 the weights are on
    /// the device only while their segment runs. The other stages ignore this setting and hold all weights on the
    /// device.
    pub fn with_weights_in(self, tier: MemoryTier) -> Self {
        Self { weights_tier: tier, ..self }
    }

    /// Adds loss scaling, for computation in f16: the loss weights of a batch must be multiplied by
    /// [`Engine::loss_scale`]. A step whose gradients overflow on any rank is skipped on all ranks.
    pub fn with_loss_scaler(self, scaler: LossScaler) -> Self {
        Self { loss_scaler: Some(scaler), ..self }
    }

    /// Turns the overlap of communication and updates with computation on or off; it is on by default. The results are
    /// the same. Without overlap every collective is waited for where it starts, and the trace shows what that costs.
    pub fn with_overlap(self, overlap: bool) -> Self {
        Self { overlap, ..self }
    }

    /// Returns the factor by which the loss of the next micro-batch must be multiplied; 1 without a loss scaler.
    pub fn loss_scale(&self) -> f64 {
        self.loss_scaler.map_or(1.0, |scaler| scaler.scale())
    }

    /// Shards the model when it is seen for the first time; in stage 3 this rank's weight shards are taken out of it.
    fn shard_model<M: TrainSegments<B>>(&mut self, model: &mut M) -> Result<(), Error> {
        if self.sharding_state.is_some() {
            return Ok(());
        }
        let layout =
            ShardLayout::new::<B, M>(model, self.sharding, (self.communicator.rank(), self.communicator.world_size()));
        let mut find = FindDevice::<B>(None);
        model.visit(&mut find);
        let device = find.0.unwrap_or_default();
        let gradients = GradientReducer::new(&layout);
        let mut weights = None;
        if self.sharding.stage == ZeroStage::Weights {
            let (shell, cut) = WeightShards::shard(model.clone(), &layout, (&device, &self.weights_tier))?;
            *model = shell;
            weights = Some(cut);
        }
        self.sharding_state = Some(ShardingState { layout, device, reducer: gradients, weights });
        Ok(())
    }

    /// Calls `look` with the model and all its weights, for example to evaluate or save it. In stage 3 the weights are
    /// gathered for the call; every rank must call this method.
    ///
    /// # Errors
    /// Returns the same errors as [`Engine::forward_backward`].
    pub fn with_full_params<M: TrainSegments<B>, R>(
        &mut self,
        model: &M,
        look: impl FnOnce(&M) -> R,
    ) -> Result<R, Error> {
        let Some(ShardingState { layout, device, weights: Some(weights), .. }) = &self.sharding_state else {
            return Ok(look(model));
        };
        let mut values = HashMap::new();
        for (index, bucket) in layout.buckets.iter().enumerate() {
            let whole = weights.gather(layout, index, &self.communicator).wait(layout, bucket, device)?;
            values.extend(whole.into_iter().map(|(parameter, value)| (layout.parameters[parameter].id, value)));
        }
        Ok(look(&model.clone().map(&mut PutParams { values })))
    }

    /// Sums a few numbers over all ranks, in rank order; every rank must call this method.
    ///
    /// # Errors
    /// Returns the same errors as [`Engine::forward_backward`].
    pub fn sum_over_ranks(&self, numbers: &[f64]) -> Result<Vec<f64>, Error> {
        let note: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let notes = self.communicator.submit("share", move |group| group.all_gather_object(&note)).wait()?;
        let mut sums = vec![0.0; numbers.len()];
        for note in notes {
            let numbers =
                note.chunks_exact(8).map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]));
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

    /// Returns the largest number of bytes that transient buffers occupied at a time, counted from the buffers.
    pub fn peak_memory(&self) -> PeakMemory {
        self.sharding_state.as_ref().map_or_else(PeakMemory::default, |division| division.reducer.peak)
    }

    /// Returns the bytes that this rank holds between two computations, counted from the buffers: weights, accumulated
    /// gradients, master weights and moments. The field `host` counts everything that is off the device.
    pub fn memory<M: Module<B>>(&self, model: &M) -> MemoryEstimate {
        let mut count = CountWeights::default();
        model.visit(&mut count);
        let (mut parameters, mut frozen, mut gradients) = (count.trained, count.frozen, 0);
        let mut host = self.host_optimizer.as_ref().map_or(0, |desk| desk.lock_states().bytes());
        if let Some(sharding_state) = &self.sharding_state {
            // If the optimizer states are in host memory, reduced gradients are there too.
            let (whole, parts) = sharding_state.reducer.device_and_host_bytes();
            (gradients, host) =
                if self.host_optimizer.is_some() { (whole, host + parts) } else { (whole + parts, host) };
            for (trainable, count) in [(true, &mut parameters), (false, &mut frozen)] {
                let weights = sharding_state.weights.as_ref();
                let (there, here) = weights.map_or((0, 0), |weights| weights.bytes(&sharding_state.layout, trainable));
                (*count, host) = (*count + there, host + here);
            }
        }
        let moments: usize = self.device_states.values().flat_map(|state| &state.slots).map(DynTensor::bytes).sum();
        let master_bytes = self
            .master_weights
            .values()
            .map(HostOrDevice::device_and_host_bytes)
            .fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
        let (master, host) = (master_bytes.0, (host + master_bytes.1) as u64);
        let (parameters, frozen, gradients, moments) =
            (parameters as u64, frozen as u64, gradients as u64, moments as u64);
        MemoryEstimate {
            parameters,
            frozen,
            gradients,
            master: master as u64,
            moments,
            host,
            ..MemoryEstimate::default()
        }
    }
}

pub(crate) struct FindDevice<B: Backend>(pub Option<B::Device>);

impl<B: AutodiffBackend> ModuleVisitor<B> for FindDevice<B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.0.get_or_insert_with(|| param.val().device());
    }
}

/// Counts the bytes of float parameters; a parameter that several modules share is counted once.
#[derive(Default)]
struct CountWeights {
    trained: usize,
    frozen: usize,
    seen: std::collections::HashSet<ParamId>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for CountWeights {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if self.seen.insert(param.id) {
            let value = param.val();
            let bytes = DynTensor::new(value.clone().inner()).bytes();
            *if value.is_require_grad() { &mut self.trained } else { &mut self.frozen } += bytes;
        }
    }
}

#[cfg(test)]
mod tests;
