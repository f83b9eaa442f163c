//! The updates of an optimizer step, bucket by bucket.

use super::{EngineSettings, OptimizerStates};
use crate::{
    Error, bucket,
    comm::{Collectives, Lane, Pending},
    gather::{ShardContext, ShardTensors, WeightStore},
    host_or_device::HostOrDevice,
    norm::{ExactSum, add_squares},
    offload::{ParamRef, ShardUpdate},
    optimizer::{self, Hyperparameters, Lamb, Optimizer},
    reduce::ShardGradients,
    segment::DynTensor,
    sharding::{ParamShard, Parameter},
};
use burn::tensor::{
    DType,
    backend::{AutodiffBackend, Backend},
};
use std::collections::{HashMap, VecDeque};

/// The pipeline of a step's updates: while one bucket is updated, the previous one is written back.
pub(super) struct UpdatePipeline<'a, B: AutodiffBackend> {
    pub settings: &'a EngineSettings,
    pub states: &'a mut OptimizerStates<B>,
    pub context: ShardContext<'a, B::InnerBackend>,
    hyperparameters: Hyperparameters,
    /// The buckets in flight, oldest first.
    in_flight: VecDeque<InFlightUpdate<B::InnerBackend>>,
}

/// A bucket whose update has been started.
struct InFlightUpdate<B: Backend> {
    /// The index of the bucket.
    bucket: usize,
    /// The dtypes of the bucket's weights.
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

/// A parameter shard in f32 with its gradient; without a gradient it stays as it is. `T` holds flat values.
struct ShardStep<T> {
    shard: ParamShard,
    value: T,
    gradient: Option<T>,
}

/// The direction in which LAMB moves a shard; none without a gradient.
struct ShardDirection<B: Backend> {
    shard: ParamShard,
    value: DynTensor<B>,
    direction: Option<DynTensor<B>>,
}

/// The squared norms of a tensor and of its update direction.
#[derive(Default)]
struct SquaredNorms {
    parameter: ExactSum,
    direction: ExactSum,
}

impl<'a, B: AutodiffBackend> UpdatePipeline<'a, B> {
    pub(super) fn new(
        settings: &'a EngineSettings,
        states: &'a mut OptimizerStates<B>,
        context: ShardContext<'a, B::InnerBackend>,
        hyperparameters: Hyperparameters,
    ) -> Self {
        Self { settings, states, context, hyperparameters, in_flight: VecDeque::new() }
    }

    /// Updates this rank's shards of a bucket; a shard without gradient (no rank had one) stays as it is.
    pub(super) fn update_bucket(
        &mut self,
        store: &mut dyn WeightStore<B::InnerBackend>,
        bucket: usize,
        gradients: ShardGradients<B::InnerBackend>,
    ) -> Result<(), Error> {
        let update = self.start_update(bucket, store.take(bucket)?, gradients)?;
        self.in_flight.push_back(update);
        self.drain(store, usize::from(self.settings.overlap))
    }

    /// Waits until at most `max_in_flight` buckets are in flight.
    pub(super) fn drain(
        &mut self,
        store: &mut dyn WeightStore<B::InnerBackend>,
        max_in_flight: usize,
    ) -> Result<(), Error> {
        while self.in_flight.len() > max_in_flight {
            let Some(update) = self.in_flight.pop_front() else { return Ok(()) };
            let bucket = update.bucket;
            let shards = self.finish_update(update)?;
            store.put(bucket, shards)?;
        }
        Ok(())
    }

    /// Returns the bytes of the gradients held by the host optimizer.
    pub(super) fn gradient_bytes(&self) -> usize {
        self.in_flight.iter().map(|update| update.gradient_bytes).sum()
    }

    fn parameter(&self, shard: &ParamShard) -> &'a Parameter {
        &self.context.layout.parameters[shard.parameter]
    }

    fn start_update(
        &mut self,
        bucket: usize,
        shards: ShardTensors<B::InnerBackend>,
        gradients: ShardGradients<B::InnerBackend>,
    ) -> Result<InFlightUpdate<B::InnerBackend>, Error> {
        let ShardContext { layout, communicator, device } = self.context;
        let dtypes = shards.iter().map(|(_, value)| value.dtype()).collect();
        let pairs = shards.into_iter().zip(gradients);
        let steps: Vec<_> = pairs
            .map(|((shard, value), (_, gradient))| {
                let master = self.states.master_weights.remove(&layout.parameters[shard.parameter].id);
                let value = master.unwrap_or_else(|| HostOrDevice::Device(value.into_f32()));
                ShardStep { shard, value, gradient }
            })
            .collect();
        if let Some(host) = &self.states.host {
            let gradients = steps.iter().filter_map(|step| step.gradient.as_ref());
            let gradient_bytes = gradients.map(|gradient| gradient.device_and_host_bytes().total()).sum();
            let updates = steps.into_iter().map(|step| self.host_update(step)).collect();
            let shards = UpdatedShards::Host(host.submit(updates));
            return Ok(InFlightUpdate { bucket, dtypes, gradient_bytes, shards });
        }
        let steps = steps.into_iter().map(|ShardStep { shard, value, gradient }| {
            let gradient = gradient.map(|gradient| gradient.into_device(device));
            ShardStep { shard, value: value.into_device(device), gradient }
        });
        let steps = steps.collect();
        let shards = communicator.trace().span("update", Lane::Compute, || self.update_on_device(steps))?;
        Ok(InFlightUpdate { bucket, dtypes, gradient_bytes: 0, shards: UpdatedShards::Device(shards) })
    }

    /// Returns the update of a shard for the host optimizer.
    fn host_update(&self, step: ShardStep<HostOrDevice<B::InnerBackend>>) -> ShardUpdate<B::InnerBackend> {
        let ShardStep { shard, value, gradient } = step;
        let parameter = self.parameter(&shard);
        let hyperparameters = self.shard_hyperparameters(&shard);
        let parameter = ParamRef { id: parameter.id, elements: parameter.elements() };
        ShardUpdate { parameter, shard, hyperparameters, value, gradient }
    }

    fn finish_update(
        &mut self,
        update: InFlightUpdate<B::InnerBackend>,
    ) -> Result<ShardTensors<B::InnerBackend>, Error> {
        let device = self.context.device;
        let shards: Vec<(ParamShard, HostOrDevice<_>)> = match update.shards {
            UpdatedShards::Device(shards) => {
                shards.into_iter().map(|(shard, value)| (shard, HostOrDevice::Device(value))).collect()
            }
            UpdatedShards::Host(pending) => pending.wait()?,
        };
        let round = |((shard, master), dtype): ((ParamShard, HostOrDevice<_>), DType)| {
            if dtype == DType::F32 {
                return (shard, master.into_device(device));
            }
            let value = match &master {
                HostOrDevice::Device(value) => value.clone().into_dtype(dtype),
                HostOrDevice::Host(values) => bucket::cast_on_host(values, dtype, device),
            };
            self.states.master_weights.insert(self.context.layout.parameters[shard.parameter].id, master);
            (shard, value)
        };
        Ok(shards.into_iter().zip(update.dtypes).map(round).collect())
    }

    /// Updates this rank's shards of a bucket, in f32 on the device.
    fn update_on_device(
        &mut self,
        steps: Vec<ShardStep<DynTensor<B::InnerBackend>>>,
    ) -> Result<ShardTensors<B::InnerBackend>, Error> {
        match self.settings.optimizer {
            Optimizer::Lamb(lamb) => self.update_layerwise(lamb, steps),
            _ => Ok(steps.into_iter().map(|step| self.update_elementwise(step)).collect()),
        }
    }

    /// Updates a shard with an element-wise optimizer.
    fn update_elementwise(
        &mut self,
        step: ShardStep<DynTensor<B::InnerBackend>>,
    ) -> (ParamShard, DynTensor<B::InnerBackend>) {
        let ShardStep { shard, value, gradient } = step;
        let Some(gradient) = gradient else { return (shard, value) };
        let (id, hyperparameters) = (self.parameter(&shard).id, self.shard_hyperparameters(&shard));
        let state = self.states.device.remove(&id);
        let optimizer = self.settings.optimizer;
        let (value, state) = optimizer.update(hyperparameters, value.tensor(), gradient.tensor(), state);
        self.states.device.insert(id, state);
        (shard, DynTensor::new(value))
    }

    /// Returns the hyperparameters of a shard: learning rate and weight decay of its parameter group.
    fn shard_hyperparameters(&self, shard: &ParamShard) -> Hyperparameters {
        let (parameter, all) = (self.parameter(shard), self.hyperparameters);
        let group = self.settings.param_groups.group_of(&parameter.path, parameter.dims.len(), all.weight_decay);
        Hyperparameters { lr: all.lr * group.lr_scale, weight_decay: group.weight_decay, ..all }
    }

    /// Updates the shards of a bucket with LAMB: the norms of the tensors and of their update directions are summed
    /// over all ranks before any weight changes.
    fn update_layerwise(
        &mut self,
        lamb: Lamb,
        steps: Vec<ShardStep<DynTensor<B::InnerBackend>>>,
    ) -> Result<ShardTensors<B::InnerBackend>, Error> {
        let mut norms: HashMap<usize, SquaredNorms> = HashMap::new();
        let directions: Vec<_> = steps
            .into_iter()
            .map(|step| {
                let moved = self.lamb_direction(lamb, step);
                if let Some(direction) = &moved.direction {
                    let sums = norms.entry(moved.shard.parameter).or_default();
                    add_squares(&mut sums.parameter, &moved.value);
                    add_squares(&mut sums.direction, direction);
                }
                moved
            })
            .collect();
        let norms = self.all_reduce_norms(norms)?;
        let apply = |ShardDirection { shard, value, direction }: ShardDirection<B::InnerBackend>| {
            let Some(direction) = direction else { return (shard, value) };
            let SquaredNorms { parameter, direction: length } = &norms[&shard.parameter];
            let ratio = lamb.trust_ratio(parameter.value().sqrt(), length.value().sqrt());
            let Hyperparameters { lr, .. } = self.shard_hyperparameters(&shard);
            let moved = value.tensor::<1>().sub(direction.tensor::<1>().mul_scalar(lr * ratio));
            (shard, DynTensor::new(moved))
        };
        Ok(directions.into_iter().map(apply).collect())
    }

    /// Computes LAMB's update direction of a shard.
    fn lamb_direction(
        &mut self,
        lamb: Lamb,
        step: ShardStep<DynTensor<B::InnerBackend>>,
    ) -> ShardDirection<B::InnerBackend> {
        let ShardStep { shard, value, gradient } = step;
        let Some(gradient) = gradient else { return ShardDirection { shard, value, direction: None } };
        let (id, hyperparameters) = (self.parameter(&shard).id, self.shard_hyperparameters(&shard));
        let state = self.states.device.remove(&id);
        let gradient = optimizer::scale_gradient(gradient.tensor(), hyperparameters.grad_scale);
        let parameter = value.clone().tensor::<1>();
        let (direction, state) = lamb.direction(hyperparameters.weight_decay, &parameter, gradient, state);
        self.states.device.insert(id, state);
        ShardDirection { shard, value, direction: Some(DynTensor::new(direction)) }
    }

    /// Sums the squared norms of all shards, by parameter.
    fn all_reduce_norms(&self, norms: HashMap<usize, SquaredNorms>) -> Result<HashMap<usize, SquaredNorms>, Error> {
        let ShardContext { layout, communicator, .. } = self.context;
        let mut own = Vec::new();
        for (parameter, sums) in &norms {
            own.extend((*parameter as u64).to_le_bytes());
            own.extend(sums.parameter.to_bytes());
            own.extend(sums.direction.to_bytes());
        }
        let messages = communicator.submit("share", move |group| group.all_gather_object(&own)).wait()?;
        let mut all: HashMap<usize, SquaredNorms> = HashMap::new();
        for message in messages.iter().take(layout.num_shards) {
            let mut rest = message.as_slice();
            while let Some((number, after)) = rest.split_first_chunk::<8>() {
                let (parameter, after) = ExactSum::from_bytes(after);
                let (direction, after) = ExactSum::from_bytes(after);
                let sums = all.entry(u64::from_le_bytes(*number) as usize).or_default();
                sums.parameter.merge(parameter);
                sums.direction.merge(direction);
                rest = after;
            }
        }
        Ok(all)
    }
}
