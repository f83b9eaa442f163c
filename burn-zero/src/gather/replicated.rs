//! Weights that are replicated on every rank (stages 0 to 2).

use super::{PendingGather, PutParams, ShardContext, ShardTensors, TakeParams, WeightStore, start_all_gather};
use crate::{
    Error, bucket,
    segment::{Direction, DynTensor, PassId, WeightProvider, detach_parameters},
};
use burn::{
    module::{Module, ParamId},
    tensor::backend::AutodiffBackend,
};
use std::collections::{HashMap, VecDeque};

/// The largest number of updated buckets in flight at a time.
const MAX_IN_FLIGHT: usize = 2;

/// A model that has all its weights. During an update this rank's shards of a bucket are taken out of it; the updated
/// weights of all ranks are collected and put back at the end.
///
/// Each pass of a micro-batch that has not finished has a model of its own, which shares the weights and not the
/// leaves. If there is one such pass at most, there is one model, so that its weights have no other owner.
pub(crate) struct ReplicatedModel<'a, B: AutodiffBackend, M> {
    /// The models of the passes that have not finished.
    passes: HashMap<PassId, M>,
    /// The model if there is no such pass.
    idle: Option<M>,
    context: ShardContext<'a, B::InnerBackend>,
    /// Updated buckets in flight, oldest first.
    in_flight: VecDeque<(usize, PendingGather<B::InnerBackend>)>,
    /// Updated weights that have arrived.
    updated: HashMap<ParamId, DynTensor<B::InnerBackend>>,
}

impl<'a, B: AutodiffBackend, M: Module<B>> ReplicatedModel<'a, B, M> {
    /// Takes the trainable weights out of a model and leaves placeholders of one element, so that the weights have no
    /// other owner.
    pub(crate) fn take_from(model: &mut M, context: ShardContext<'a, B::InnerBackend>) -> Self {
        let (full, layout) = (model.clone(), context.layout);
        let selects = |id| layout.updates(id);
        *model = model.clone().map(&mut TakeParams { layout, selects, values: HashMap::new() });
        let (passes, updated) = (HashMap::new(), HashMap::new());
        Self { passes, idle: Some(full), context, in_flight: VecDeque::new(), updated }
    }

    /// Takes the model, or that of one of the passes.
    fn take_model(&mut self) -> Option<M> {
        let pass = self.passes.keys().next().copied();
        self.idle.take().or_else(|| self.passes.remove(&pass?))
    }

    /// Replaces the only model by what `change` returns.
    fn map_only(&mut self, change: impl FnOnce(M) -> M) {
        assert!(self.passes.len() <= 1, "weights change while no more than one micro-batch uses them");
        if let Some((&pass, _)) = self.passes.iter().next() {
            self.passes = self.passes.remove(&pass).map(|model| (pass, change(model))).into_iter().collect();
        } else {
            self.idle = self.idle.take().map(change);
        }
    }

    /// Waits until at most `max_in_flight` buckets are in flight.
    fn drain(&mut self, max_in_flight: usize) -> Result<(), Error> {
        let ShardContext { layout, device, .. } = self.context;
        while self.in_flight.len() > max_in_flight {
            let Some((index, gathering)) = self.in_flight.pop_front() else { return Ok(()) };
            self.updated.extend(gathering.wait(layout, &layout.buckets[index], device)?);
        }
        Ok(())
    }

    /// Puts the weights back into the model. After an error, in `done` or while receiving, the model lacks the weights
    /// that were being updated.
    pub(crate) fn put_back<R>(mut self, model: &mut M, done: Result<R, Error>) -> Result<R, Error> {
        let done = done.and_then(|done| self.drain(0).map(|()| done));
        let values = std::mem::take(&mut self.updated);
        if let Some(full) = self.take_model() {
            *model = if values.is_empty() { full } else { full.map(&mut PutParams { values }) };
        }
        done
    }
}

impl<B: AutodiffBackend, M: Module<B>> WeightProvider<M> for ReplicatedModel<'_, B, M> {
    const ALWAYS_RESIDENT: bool = true;

    fn start_pass(&mut self, pass: PassId) {
        let model = self.idle.take().or_else(|| self.passes.values().next().cloned());
        self.passes.extend(model.map(|model| (pass, detach_parameters(model))));
    }

    fn finish_pass(&mut self, pass: PassId) {
        let model = self.passes.remove(&pass);
        if self.passes.is_empty() {
            self.idle = model;
        }
    }

    fn model(&self, pass: PassId) -> &M {
        &self.passes[&pass]
    }

    fn fetch_segment(&mut self, _: Direction, _: usize) -> Result<(), Error> {
        Ok(())
    }

    fn release_segment(&mut self, _: Direction, _: usize) {}
}

impl<B: AutodiffBackend, M: Module<B>> WeightStore<B::InnerBackend> for ReplicatedModel<'_, B, M> {
    fn take(&mut self, index: usize) -> Result<ShardTensors<B::InnerBackend>, Error> {
        let ShardContext { layout, device, .. } = self.context;
        let bucket = &layout.buckets[index];
        let selects = |id| bucket.parameters().any(|index| layout.parameters[index].id == id);
        let mut take = TakeParams { layout, selects, values: HashMap::new() };
        self.map_only(|model| model.map(&mut take));
        let mut values = take.values;
        let shards = layout.local_param_shards(bucket).into_iter().map(|shard| {
            let value = values.remove(&shard.parameter).expect("the model has every parameter of the layout");
            let value = bucket::slice_shard(value, &shard, false, device);
            (shard, value)
        });
        Ok(shards.collect())
    }

    fn put(&mut self, index: usize, shards: ShardTensors<B::InnerBackend>) -> Result<(), Error> {
        let ShardContext { layout, communicator, .. } = self.context;
        self.in_flight.push_back((index, start_all_gather(layout, &layout.buckets[index], shards, communicator)));
        self.drain(MAX_IN_FLIGHT)
    }
}
