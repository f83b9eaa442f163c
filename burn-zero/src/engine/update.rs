//! The updates of an optimizer step, bucket by bucket.

use super::Engine;
use crate::{
    Error, bucket,
    comm::{Collectives, Lane, Pending},
    gather::{ShardContext, ShardTensors, WeightStore},
    host_or_device::HostOrDevice,
    norm::{ExactSum, add_squares},
    offload::ShardUpdate,
    optimizer::{self, Hyperparameters, Lamb, Optimizer},
    reduce::ShardGradients,
    segment::DynTensor,
    sharding::{ParamShard, ShardLayout},
};
use burn::tensor::{
    DType,
    backend::{AutodiffBackend, Backend},
};
use std::collections::{HashMap, VecDeque};

/// Gradients of parameter shards, on the device.
type DeviceGradients<B> = Vec<(ParamShard, Option<DynTensor<B>>)>;

/// The pipeline of a step's updates: while one bucket is updated, the previous one is written back.
pub(super) struct UpdatePipeline<'a, B: AutodiffBackend> {
    pub engine: &'a mut Engine<B>,
    pub context: ShardContext<'a, B::InnerBackend>,
    pub hyperparameters: Hyperparameters,
    /// The buckets in flight, oldest first.
    in_flight: VecDeque<(usize, InFlightUpdate<B::InnerBackend>)>,
}

/// A bucket whose update has been started, and the dtypes of its weights.
struct InFlightUpdate<B: Backend> {
    dtypes: Vec<DType>,
    /// Bytes of the bucket's gradients.
    gradient_bytes: usize,
    shards: UpdatedShards<B>,
}

enum UpdatedShards<B: Backend> {
    /// Updated shards on the device.
    Device(ShardTensors<B>),
    /// Shards in the queue of the host optimizer's thread.
    Host(Pending<Vec<(ParamShard, HostOrDevice<B>)>>),
}

impl<'a, B: AutodiffBackend> UpdatePipeline<'a, B> {
    pub fn new(engine: &'a mut Engine<B>, context: ShardContext<'a, B::InnerBackend>, rates: Hyperparameters) -> Self {
        Self { engine, context, hyperparameters: rates, in_flight: VecDeque::new() }
    }

    /// Updates this rank's shards of a bucket; a shard without gradient (no rank had one) stays as it is.
    pub fn update_bucket(
        &mut self,
        store: &mut dyn WeightStore<B::InnerBackend>,
        index: usize,
        gradients: ShardGradients<B::InnerBackend>,
    ) -> Result<(), Error> {
        let update = self.start_update(store.take(index)?, gradients)?;
        self.in_flight.push_back((index, update));
        self.drain(store, usize::from(self.engine.overlap))
    }

    /// Waits until at most `max_in_flight` buckets are in flight.
    pub fn drain(&mut self, store: &mut dyn WeightStore<B::InnerBackend>, max_in_flight: usize) -> Result<(), Error> {
        while self.in_flight.len() > max_in_flight {
            let Some((index, update)) = self.in_flight.pop_front() else { return Ok(()) };
            let shards = self.finish_update(update)?;
            store.put(index, shards)?;
        }
        Ok(())
    }

    /// Returns the bytes of the gradients held by the host optimizer.
    pub fn gradient_bytes(&self) -> usize {
        self.in_flight.iter().map(|(_, update)| update.gradient_bytes).sum()
    }

    /// Returns the updates of a bucket for the host optimizer.
    fn shard_updates(
        &self,
        shards: Vec<(ParamShard, HostOrDevice<B::InnerBackend>)>,
        gradients: ShardGradients<B::InnerBackend>,
    ) -> Vec<ShardUpdate<B::InnerBackend>> {
        let layout = self.context.layout;
        let task = |((shard, value), (_, gradient)): (
            (ParamShard, HostOrDevice<_>),
            (ParamShard, Option<HostOrDevice<_>>),
        )| {
            let parameter = &layout.parameters[shard.parameter];
            let rates = self.engine.shard_hyperparameters(layout, &shard, self.hyperparameters);
            ShardUpdate { parameter: (parameter.id, parameter.elements()), piece: shard, rates, value, gradient }
        };
        shards.into_iter().zip(gradients).map(task).collect()
    }

    fn start_update(
        &mut self,
        shards: ShardTensors<B::InnerBackend>,
        gradients: ShardGradients<B::InnerBackend>,
    ) -> Result<InFlightUpdate<B::InnerBackend>, Error> {
        let ShardContext { layout, communicator, device } = self.context;
        let dtypes = shards.iter().map(|(_, value)| value.dtype()).collect();
        let master = |(shard, value): (ParamShard, DynTensor<_>)| {
            let kept = self.engine.master_weights.remove(&layout.parameters[shard.parameter].id);
            (shard, kept.unwrap_or_else(|| HostOrDevice::Device(value.into_f32())))
        };
        let pieces: Vec<_> = shards.into_iter().map(master).collect();
        if let Some(host_optimizer) = &self.engine.host_optimizer {
            let bytes = |held: &HostOrDevice<_>| held.device_and_host_bytes().0 + held.device_and_host_bytes().1;
            let bytes = gradients.iter().filter_map(|(_, held)| held.as_ref()).map(bytes).sum();
            let pieces = UpdatedShards::Host(host_optimizer.submit(self.shard_updates(pieces, gradients)));
            return Ok(InFlightUpdate { dtypes, gradient_bytes: bytes, shards: pieces });
        }
        let pieces = pieces.into_iter().map(|(piece, held)| (piece, held.into_device(device))).collect();
        let gradients =
            gradients.into_iter().map(|(piece, held)| (piece, held.map(|held| held.into_device(device)))).collect();
        let trace = communicator.trace();
        let update = || self.engine.update_shards(layout, (pieces, gradients), self.hyperparameters);
        let new = trace.span("update", Lane::Compute, update)?;
        Ok(InFlightUpdate { dtypes, gradient_bytes: 0, shards: UpdatedShards::Device(new) })
    }

    fn finish_update(
        &mut self,
        update: InFlightUpdate<B::InnerBackend>,
    ) -> Result<ShardTensors<B::InnerBackend>, Error> {
        let ShardContext { layout, device, .. } = self.context;
        let shards: Vec<(ParamShard, HostOrDevice<_>)> = match update.shards {
            UpdatedShards::Device(pieces) => {
                pieces.into_iter().map(|(shard, value)| (shard, HostOrDevice::Device(value))).collect()
            }
            UpdatedShards::Host(pending) => pending.wait()?,
        };
        let round = |((piece, held), dtype): ((ParamShard, HostOrDevice<_>), DType)| {
            if dtype == DType::F32 {
                return (piece, held.into_device(device));
            }
            let value = match &held {
                HostOrDevice::Device(value) => value.clone().into_dtype(dtype),
                HostOrDevice::Host(values) => bucket::cast_on_host(values, dtype, device),
            };
            self.engine.master_weights.insert(layout.parameters[piece.parameter].id, held);
            (piece, value)
        };
        Ok(shards.into_iter().zip(update.dtypes).map(round).collect())
    }
}

impl<B: AutodiffBackend> Engine<B> {
    /// Updates this rank's shards of a bucket, in f32 on the device.
    fn update_shards(
        &mut self,
        layout: &ShardLayout,
        (shards, gradients): (ShardTensors<B::InnerBackend>, DeviceGradients<B::InnerBackend>),
        rates: Hyperparameters,
    ) -> Result<ShardTensors<B::InnerBackend>, Error> {
        match self.optimizer {
            Optimizer::Lamb(lamb) => self.update_layerwise(lamb, layout, (shards, gradients), rates),
            _ => Ok(self.update_elementwise(layout, (shards, gradients), rates)),
        }
    }

    /// Updates the shards of a bucket with an element-wise optimizer.
    fn update_elementwise(
        &mut self,
        layout: &ShardLayout,
        (shards, gradients): (ShardTensors<B::InnerBackend>, DeviceGradients<B::InnerBackend>),
        rates: Hyperparameters,
    ) -> ShardTensors<B::InnerBackend> {
        let update =
            |((shard, value), (_, gradient)): ((ParamShard, DynTensor<_>), (ParamShard, Option<DynTensor<_>>))| {
                let Some(gradient) = gradient else { return (shard, value) };
                let (id, rate) =
                    (layout.parameters[shard.parameter].id, self.shard_hyperparameters(layout, &shard, rates));
                let state = self.device_states.remove(&id);
                let (value, state) = self.optimizer.update(rate, value.tensor(), gradient.tensor(), state);
                self.device_states.insert(id, state);
                (shard, DynTensor::new(value))
            };
        shards.into_iter().zip(gradients).map(update).collect()
    }

    /// Returns the hyperparameters of a shard: learning rate and weight decay of its parameter group.
    fn shard_hyperparameters(
        &self,
        layout: &ShardLayout,
        shard: &ParamShard,
        rates: Hyperparameters,
    ) -> Hyperparameters {
        let parameter = &layout.parameters[shard.parameter];
        let group = self.param_groups.group_of(&parameter.path, parameter.dims.len(), rates.weight_decay);
        Hyperparameters { lr: rates.lr * group.lr_scale, weight_decay: group.weight_decay, ..rates }
    }

    /// Updates the shards of a bucket with LAMB: the norms of the tensors and of their update directions are summed
    /// over all ranks before any weight changes.
    fn update_layerwise(
        &mut self,
        lamb: Lamb,
        layout: &ShardLayout,
        (shards, gradients): (ShardTensors<B::InnerBackend>, DeviceGradients<B::InnerBackend>),
        rates: Hyperparameters,
    ) -> Result<ShardTensors<B::InnerBackend>, Error> {
        let (mut moving, mut norms) = (Vec::new(), HashMap::new());
        for ((shard, value), (_, gradient)) in shards.into_iter().zip(gradients) {
            let Some(gradient) = gradient else {
                moving.push((shard, value, None));
                continue;
            };
            let (id, rate) = (layout.parameters[shard.parameter].id, self.shard_hyperparameters(layout, &shard, rates));
            let state = self.device_states.remove(&id);
            let parameter = value.clone().tensor::<1>();
            let gradient = optimizer::scale_gradient(gradient.tensor(), rates.grad_scale);
            let (direction, state) = lamb.direction(rate.weight_decay, &parameter, gradient, state);
            self.device_states.insert(id, state);
            let direction = DynTensor::new(direction);
            let sums: &mut [ExactSum; 2] = norms.entry(shard.parameter).or_default();
            add_squares(&mut sums[0], &value);
            add_squares(&mut sums[1], &direction);
            moving.push((shard, value, Some(direction)));
        }
        let norms = self.all_reduce_norms(layout, norms)?;
        let step = |(piece, value, direction): (ParamShard, DynTensor<B::InnerBackend>, Option<DynTensor<_>>)| {
            let Some(direction) = direction else { return (piece, value) };
            let [parameter, length] = &norms[&piece.parameter];
            let ratio = lamb.trust_ratio(parameter.value().sqrt(), length.value().sqrt());
            let Hyperparameters { lr, .. } = self.shard_hyperparameters(layout, &piece, rates);
            let moved = value.tensor::<1>().sub(direction.tensor::<1>().mul_scalar(lr * ratio));
            (piece, DynTensor::new(moved))
        };
        Ok(moving.into_iter().map(step).collect())
    }

    /// Sums the squared norms of all shards, by parameter.
    fn all_reduce_norms(
        &self,
        layout: &ShardLayout,
        norms: HashMap<usize, [ExactSum; 2]>,
    ) -> Result<HashMap<usize, [ExactSum; 2]>, Error> {
        let mut message = Vec::new();
        for (parameter, sums) in &norms {
            message.extend((*parameter as u64).to_le_bytes());
            sums.iter().for_each(|sum| message.extend(sum.to_bytes()));
        }
        let messages = self.communicator.submit("share", move |group| group.all_gather_object(&message)).wait()?;
        let mut all: HashMap<usize, [ExactSum; 2]> = HashMap::new();
        for note in messages.iter().take(layout.num_shards) {
            let mut rest = note.as_slice();
            while let Some((number, after)) = rest.split_first_chunk::<8>() {
                let (first, after) = ExactSum::from_bytes(after);
                let (second, after) = ExactSum::from_bytes(after);
                let sums = all.entry(u64::from_le_bytes(*number) as usize).or_default();
                sums[0].merge(first);
                sums[1].merge(second);
                rest = after;
            }
        }
        Ok(all)
    }
}
