//! Gathering of weights in ZeRO stage 3: every rank holds shards; the full weights are gathered before a segment runs
//! and released after it.
//!
//! ```text
//!  forward    gather 0 │ run 0, gather 1 │ run 1, gather 2 │ … │ run last
//!  backward   …        │ run 1, gather 0 │ run 0           │         the weights of a kept graph stay gathered
//! ```
//!
//! The buckets to gather and to release are listed in advance ([`gather_schedule`]). A bucket is gathered once per
//! direction, and the buckets of the next step are prefetched while a segment runs. The shards themselves are on the
//! device, in host memory or in a file (parameter offload); in the latter cases gathering also copies the weights to
//! the device.

use crate::{
    Error, bucket,
    comm::{AsyncCommunicator, Collectives, Pending},
    segment::{Checkpointing, Direction, Driver, DynTensor, PassId, WeightProvider},
    sharding::{Bucket, ParamShard, ShardLayout},
};
use burn::{
    module::{Module, ModuleMapper, Param, ParamId},
    tensor::{
        Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use std::collections::{HashMap, HashSet};

mod replicated;
mod weight_shards;

pub(crate) use replicated::ReplicatedModel;
pub(crate) use weight_shards::WeightShards;

/// A step of the gather schedule: a segment in one direction, the buckets gathered before it and those released after
/// it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GatherStep {
    pub direction: Direction,
    pub segment: usize,
    pub gather: Vec<usize>,
    pub release: Vec<usize>,
}

/// Returns the gather schedule of a micro-batch: a bucket is gathered before its first use in each direction and
/// released after its last. A bucket used by a kept graph stays gathered from the forward pass to its last use in the
/// backward pass, which begins at the last segment and ends at segment `first`.
pub(crate) fn gather_schedule(layout: &ShardLayout, first: usize, checkpointing: Checkpointing) -> Vec<GatherStep> {
    let segments = layout.num_segments;
    let step = |direction| move |segment| GatherStep { direction, segment, gather: Vec::new(), release: Vec::new() };
    let forward = (0..segments).map(step(Direction::Forward));
    let mut all: Vec<GatherStep> = forward.chain((first..segments).rev().map(step(Direction::Backward))).collect();
    let backward = |segment: usize| segments + (segments - 1 - segment);
    for (index, bucket) in layout.buckets.iter().enumerate() {
        let uses = &bucket.segments;
        let (begin, end) = (uses[0], uses[uses.len() - 1]);
        let again: Vec<usize> = uses.iter().copied().filter(|&segment| segment >= first).collect();
        let stays = again.iter().any(|&segment| checkpointing.keeps_graph(segment, segments));
        all[begin].gather.push(index);
        match (again.first(), again.last()) {
            (Some(&least), Some(&most)) => {
                if !stays {
                    all[end].release.push(index);
                    all[backward(most)].gather.push(index);
                }
                all[backward(least)].release.push(index);
            }
            _ => all[end].release.push(index),
        }
    }
    all
}

/// An all-gather of a bucket whose result is still to come.
pub(crate) enum PendingGather<B: Backend> {
    /// The shards are already the full parameters, so no communication is needed.
    Local(ShardTensors<B>),
    /// The bytes of the full bucket, not yet received.
    InFlight(Pending<Vec<u8>>),
}

/// Starts the all-gather of a bucket from this rank's shards. If there is only one shard, it is the full bucket and
/// nothing leaves the device.
pub(crate) fn start_all_gather<B: Backend>(
    layout: &ShardLayout,
    bucket: &Bucket,
    shards: ShardTensors<B>,
    communicator: &AsyncCommunicator,
) -> PendingGather<B> {
    if layout.num_shards == 1 {
        return PendingGather::Local(shards);
    }
    let (bytes, size) = (bucket::pack_shard(layout, bucket, &shards), bucket.dtype.size());
    PendingGather::InFlight(communicator.submit("all_gather", move |group| group.all_gather_bytes(&bytes, size)))
}

impl<B: Backend> PendingGather<B> {
    /// Waits for the result and returns the full parameters.
    pub(crate) fn wait(
        self,
        layout: &ShardLayout,
        bucket: &Bucket,
        device: &B::Device,
    ) -> Result<Vec<(ParamId, DynTensor<B>)>, Error> {
        match self {
            Self::Local(shards) => {
                let full = |(shard, value): (ParamShard, DynTensor<B>)| {
                    let parameter = &layout.parameters[shard.parameter];
                    (parameter.id, value.reshape(&parameter.dims))
                };
                Ok(shards.into_iter().map(full).collect())
            }
            Self::InFlight(pending) => Ok(bucket::unpack_parameters(layout, bucket, pending.wait()?, device)),
        }
    }
}

/// The tensors of parameter shards.
pub(crate) type ShardTensors<B> = Vec<(ParamShard, DynTensor<B>)>;

/// Access to this rank's weight shards during an optimizer step, bucket by bucket.
pub(crate) trait WeightStore<B: Backend> {
    /// Takes this rank's shards of a bucket out of the store, flattened. The store keeps no reference, because a tensor
    /// is updated in place only if it has no other owner.
    fn take(&mut self, index: usize) -> Result<ShardTensors<B>, Error>;

    /// Stores the updated shards of a bucket.
    fn put(&mut self, index: usize, shards: ShardTensors<B>) -> Result<(), Error>;
}

/// The layout, communicator and device that sharded operations share.
pub(crate) struct ShardContext<'a, B: Backend> {
    pub layout: &'a ShardLayout,
    pub communicator: &'a AsyncCommunicator,
    pub device: &'a B::Device,
}

impl<B: Backend> Clone for ShardContext<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for ShardContext<'_, B> {}

/// A model of shards whose weights are gathered for each segment and released after it.
pub(crate) struct GatheredModel<'a, B: AutodiffBackend, M> {
    /// The model; none only while a mapper transforms it.
    model: Option<M>,
    weights: &'a mut WeightShards<B::InnerBackend>,
    context: ShardContext<'a, B::InnerBackend>,
    driver: Driver<'a>,
    /// The schedule of the micro-batch.
    schedule: Vec<GatherStep>,
    /// The schedule step that is running or comes next.
    next_step: usize,
    /// The number of schedule steps for which weights are prefetched.
    prefetch: usize,
    in_flight: HashMap<usize, PendingGather<B::InnerBackend>>,
    live_bytes: usize,
    /// The largest number of bytes of gathered weights at a time.
    pub peak_bytes: usize,
}

impl<'a, B: AutodiffBackend, M: Module<B>> GatheredModel<'a, B, M> {
    /// Creates the model from placeholders, as [`WeightShards::add`] leaves them.
    pub(crate) fn new(
        model: M,
        weights: &'a mut WeightShards<B::InnerBackend>,
        context: ShardContext<'a, B::InnerBackend>,
        driver: Driver<'a>,
        prefetch: usize,
    ) -> Self {
        Self {
            model: Some(model),
            weights,
            context,
            driver,
            schedule: Vec::new(),
            next_step: 0,
            prefetch,
            in_flight: HashMap::new(),
            live_bytes: 0,
            peak_bytes: 0,
        }
    }

    fn map(&mut self, mapper: &mut impl ModuleMapper<B>) {
        self.model = self.model.take().map(|model| model.map(mapper));
    }

    fn prefetch_step(&mut self, step: usize) {
        let Some(step) = self.schedule.get(step) else { return };
        for &index in &step.gather {
            if !self.in_flight.contains_key(&index) {
                let gathering = self.weights.gather(self.context.layout, index, self.context.communicator);
                self.in_flight.insert(index, gathering);
                self.live_bytes += bucket_bytes(&self.context.layout.buckets[index]);
            }
        }
        self.peak_bytes = self.peak_bytes.max(self.live_bytes);
    }
}

fn bucket_bytes(bucket: &Bucket) -> usize {
    bucket.length * bucket.dtype.size()
}

impl<B: AutodiffBackend, M: Module<B>> WeightProvider<M> for GatheredModel<'_, B, M> {
    const ALWAYS_RESIDENT: bool = false;

    fn start_pass(&mut self, _: PassId) {
        // A weight gets a new leaf whenever it is gathered.
        let Driver { plan, checkpointing, .. } = self.driver;
        self.schedule = gather_schedule(self.context.layout, plan.first_trainable, checkpointing);
        self.next_step = 0;
    }

    fn finish_pass(&mut self, _: PassId) {
        assert_eq!(self.next_step, self.schedule.len(), "a micro-batch follows the whole gather schedule");
    }

    fn model(&self, _: PassId) -> &M {
        self.model.as_ref().expect("the model is absent only while a mapper transforms it")
    }

    fn fetch_segment(&mut self, direction: Direction, segment: usize) -> Result<(), Error> {
        let step = &self.schedule[self.next_step];
        assert_eq!((step.direction, step.segment), (direction, segment), "the driver follows the gather schedule");
        let due = step.gather.clone();
        self.prefetch_step(self.next_step);
        let ShardContext { layout, device, .. } = self.context;
        let mut values = HashMap::new();
        for index in due {
            let gathering = self.in_flight.remove(&index).expect("the gathering was started above at the latest");
            values.extend(gathering.wait(layout, &layout.buckets[index], device)?);
        }
        for next in 1..=self.prefetch {
            self.prefetch_step(self.next_step + next);
        }
        if !values.is_empty() {
            self.map(&mut PutParams { values });
        }
        Ok(())
    }

    fn release_segment(&mut self, _: Direction, _: usize) {
        let release = std::mem::take(&mut self.schedule[self.next_step].release);
        self.next_step += 1;
        let layout = self.context.layout;
        let parameters = release.iter().flat_map(|&index| layout.buckets[index].parameters());
        let ids: HashSet<ParamId> = parameters.map(|index| layout.parameters[index].id).collect();
        self.live_bytes -= release.iter().map(|&index| bucket_bytes(&layout.buckets[index])).sum::<usize>();
        if !ids.is_empty() {
            self.map(&mut TakeParams { layout, selects: |id| ids.contains(&id), values: HashMap::new() });
        }
    }
}

impl<B: AutodiffBackend, M> WeightStore<B::InnerBackend> for GatheredModel<'_, B, M> {
    fn take(&mut self, index: usize) -> Result<ShardTensors<B::InnerBackend>, Error> {
        self.weights.as_store(self.context).take(index)
    }

    fn put(&mut self, index: usize, shards: ShardTensors<B::InnerBackend>) -> Result<(), Error> {
        self.weights.as_store(self.context).put(index, shards)
    }
}

/// Takes parameters out of a model and leaves placeholders of one element.
pub(crate) struct TakeParams<'a, B: Backend, F> {
    pub layout: &'a ShardLayout,
    pub selects: F,
    /// The values taken, by index in the layout.
    pub values: HashMap<usize, DynTensor<B>>,
}

impl<B: AutodiffBackend, F: Fn(ParamId) -> bool> ModuleMapper<B> for TakeParams<'_, B::InnerBackend, F> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let Some(&index) = self.layout.parameter_index.get(&param.id).filter(|_| (self.selects)(param.id)) else {
            return param;
        };
        let (id, tensor, mapper) = param.consume();
        let placeholder =
            Tensor::empty([1; D], (&tensor.device(), tensor.dtype())).set_require_grad(tensor.is_require_grad());
        self.values.insert(index, DynTensor::new(tensor.inner()));
        Param::from_mapped_value(id, placeholder, mapper)
    }
}

/// Puts full parameters into a model; their trainability stays.
pub(crate) struct PutParams<B: Backend> {
    pub values: HashMap<ParamId, DynTensor<B>>,
}

impl<B: AutodiffBackend> ModuleMapper<B> for PutParams<B::InnerBackend> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let Some(value) = self.values.remove(&param.id) else { return param };
        let (id, placeholder, mapper) = param.consume();
        let tensor = Tensor::from_inner(value.tensor()).set_require_grad(placeholder.is_require_grad());
        Param::from_mapped_value(id, tensor, mapper)
    }
}
