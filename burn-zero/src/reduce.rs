//! Accumulation and reduction of gradients between the backward pass and the optimizer.
//!
//! Full gradients are accumulated as they arrive. A bucket is reduced once its last gradient has arrived: after every
//! micro-batch if gradients are sharded (stages 2 and 3), otherwise before the optimizer step, and in any case during
//! the last micro-batch of a step whose optimizer runs in the backward pass. The result of the reduction is this rank's
//! shard.

use crate::{
    Error, bucket,
    comm::{AsyncCommunicator, Collectives, Lane, Pending},
    host_or_device::{DeviceHostBytes, HostOrDevice},
    segment::{DynTensor, Gradient},
    sharding::{Bucket, ParamShard, ShardLayout},
    stage::ZeroStage,
};
use burn::tensor::backend::Backend;
use std::collections::{HashMap, VecDeque};

/// The largest number of buckets in flight at a time.
const MAX_IN_FLIGHT: usize = 2;

/// The gradients of a step, accumulated or reduced.
pub(crate) struct GradientReducer<B: Backend> {
    /// This rank's accumulated gradients that have not been reduced yet, by parameter, in f32.
    unreduced: HashMap<usize, DynTensor<B>>,
    /// This rank's shards of reduced buckets.
    reduced_shards: HashMap<usize, Vec<f32>>,
    /// The buckets in flight, oldest first.
    pending: VecDeque<InFlightReduction>,
    /// For each parameter, true if this rank had a gradient.
    has_gradient: Vec<bool>,
    /// Bytes of the buckets in flight.
    in_flight_bytes: usize,
    /// Bytes that have been [taken](Self::take_bucket) and wait for their update.
    pub updating_bytes: usize,
    pub peak: PeakMemory,
}

/// A bucket whose reduction has been started.
struct InFlightReduction {
    /// The index of the bucket.
    bucket: usize,
    /// The bytes of this rank's shard.
    shard_bytes: usize,
    result: Pending<Vec<f32>>,
}

/// The largest number of bytes that were in use at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PeakMemory {
    /// Gradients: full ones not yet reduced, and this rank's shards until their update.
    pub gradients: usize,
    /// Gradient buckets in flight.
    pub buckets: usize,
    /// Gathered weights of stage 3.
    pub gathered: usize,
}

/// A rank's gradients of a bucket, by parameter shard; none where the parameter has no gradient.
pub(crate) type ShardGradients<B> = Vec<(ParamShard, Option<HostOrDevice<B>>)>;

impl<B: Backend> GradientReducer<B> {
    pub(crate) fn new(layout: &ShardLayout) -> Self {
        Self {
            unreduced: HashMap::new(),
            reduced_shards: HashMap::new(),
            pending: VecDeque::new(),
            has_gradient: vec![false; layout.parameters.len()],
            in_flight_bytes: 0,
            updating_bytes: 0,
            peak: PeakMemory::default(),
        }
    }

    /// Accumulates the gradients of one segment.
    pub(crate) fn accumulate(&mut self, layout: &ShardLayout, found: Vec<Gradient<B>>) {
        for gradient in found {
            let index = layout.parameter_index[&gradient.id];
            let value = gradient.value.into_f32();
            let value = match self.unreduced.remove(&index) {
                Some(sum) => sum.add(value),
                None => value,
            };
            self.unreduced.insert(index, value);
            self.has_gradient[index] = true;
        }
        self.peak.gradients = self.peak.gradients.max(self.bytes() + self.updating_bytes);
    }

    /// Returns the bytes of all gradients, without the buffers of buckets in flight.
    pub(crate) fn bytes(&self) -> usize {
        self.device_and_host_bytes().total()
    }

    /// Returns the bytes of full gradients on the device, and of this rank's shards in host memory.
    pub(crate) fn device_and_host_bytes(&self) -> DeviceHostBytes {
        let reduced: usize = self.reduced_shards.values().map(|shard| shard.len() * 4).sum();
        let in_flight: usize = self.pending.iter().map(|reduction| reduction.shard_bytes).sum();
        DeviceHostBytes { device: self.unreduced.values().map(DynTensor::bytes).sum(), host: reduced + in_flight }
    }

    /// Returns the gradients that have not been reduced yet, by parameter index.
    pub(crate) fn unreduced(&self) -> &HashMap<usize, DynTensor<B>> {
        &self.unreduced
    }

    /// Returns, for each parameter, whether this rank had a gradient.
    pub(crate) fn has_gradient(&self) -> &[bool] {
        &self.has_gradient
    }

    /// Starts the reduction of the buckets whose last gradient belongs to this segment.
    pub(crate) fn reduce_ready_after(
        &mut self,
        layout: &ShardLayout,
        segment: usize,
        communicator: &AsyncCommunicator,
    ) -> Result<(), Error> {
        layout.buckets_ready_after(segment).try_for_each(|index| self.reduce(layout, index, communicator))
    }

    /// Starts the reduction of a bucket: a reduce-scatter that accumulates onto this rank's shard, or an all-reduce if
    /// nothing is sharded. The gradients are copied off the device by the communication thread.
    pub(crate) fn reduce(
        &mut self,
        layout: &ShardLayout,
        index: usize,
        communicator: &AsyncCommunicator,
    ) -> Result<(), Error> {
        while self.pending.len() >= MAX_IN_FLIGHT || self.is_in_flight(index) {
            self.wait_oldest(layout)?;
        }
        let bucket = layout.buckets[index].clone();
        let num_shards = layout.num_shards;
        let gradient = |parameter| Some((parameter, self.unreduced.remove(&parameter)?));
        let mut full: HashMap<usize, DynTensor<B>> = bucket.parameters().filter_map(gradient).collect();
        self.in_flight_bytes += bucket.length * 4;
        self.peak.buckets = self.peak.buckets.max(self.in_flight_bytes);
        let trace = communicator.trace().clone();
        let mut flatten = move |bucket: &Bucket| {
            let flat = || bucket::flatten(bucket, |parameter| full.remove(&parameter));
            trace.numbered_span("to the host", index, Lane::Transfer, flat)
        };
        let result = if num_shards == 1 && communicator.world_size() > 1 {
            communicator.submit("all_reduce", move |group| {
                let mut flat = flatten(&bucket);
                group.all_reduce(&mut flat).map(|()| flat)
            })
        } else {
            let shard = self.reduced_shards.remove(&index);
            communicator.submit("reduce_scatter", move |group| {
                let flat = flatten(&bucket);
                // Adding to -0 leaves any value unchanged, including the sign of zero.
                let mut shard = shard.unwrap_or_else(|| vec![-0.0; bucket.length / num_shards]);
                group.reduce_scatter_accumulate(&flat, &mut shard).map(|()| shard)
            })
        };
        let shard_bytes = layout.buckets[index].length / num_shards * 4;
        self.pending.push_back(InFlightReduction { bucket: index, shard_bytes, result });
        Ok(())
    }

    fn is_in_flight(&self, bucket: usize) -> bool {
        self.pending.iter().any(|reduction| reduction.bucket == bucket)
    }

    /// Waits for the oldest bucket in flight.
    fn wait_oldest(&mut self, layout: &ShardLayout) -> Result<(), Error> {
        let Some(InFlightReduction { bucket, result, .. }) = self.pending.pop_front() else { return Ok(()) };
        self.reduced_shards.insert(bucket, result.wait()?);
        self.in_flight_bytes -= layout.buckets[bucket].length * 4;
        Ok(())
    }

    /// Waits for all buckets in flight.
    pub(crate) fn wait_all(&mut self, layout: &ShardLayout) -> Result<(), Error> {
        while !self.pending.is_empty() {
            self.wait_oldest(layout)?;
        }
        Ok(())
    }

    /// Reduces all remaining buckets and returns this rank's shards, on the device if one is given. With one rank the
    /// reduction is the identity and nothing leaves the device.
    pub(crate) fn finish(
        mut self,
        layout: &ShardLayout,
        stage: ZeroStage,
        communicator: &AsyncCommunicator,
        device: Option<&B::Device>,
    ) -> Result<HashMap<usize, ShardGradients<B>>, Error> {
        let alone = communicator.world_size() == 1;
        if !alone && stage < ZeroStage::Gradients {
            layout.trainable_buckets().try_for_each(|(index, _)| self.reduce(layout, index, communicator))?;
        }
        self.wait_all(layout)?;
        layout.trainable_buckets().map(|(index, _)| Ok((index, self.take_bucket(layout, index, device)?))).collect()
    }

    /// Returns this rank's gradients of a bucket whose reduction has been [started](Self::reduce) or is not needed; on
    /// the device if one is given.
    pub(crate) fn take_bucket(
        &mut self,
        layout: &ShardLayout,
        index: usize,
        device: Option<&B::Device>,
    ) -> Result<ShardGradients<B>, Error> {
        while self.is_in_flight(index) {
            self.wait_oldest(layout)?;
        }
        let bucket_shard = self.reduced_shards.remove(&index);
        let gradient = |shard: ParamShard| {
            let slice = |reduced: &Vec<f32>| reduced[shard.offset..shard.offset + shard.range.len()].to_vec();
            let value = match (&bucket_shard, device) {
                (Some(reduced), Some(device)) => {
                    Some(HostOrDevice::Device(bucket::tensor_from_vec(slice(reduced), device)))
                }
                (Some(reduced), None) => Some(HostOrDevice::Host(slice(reduced))),
                (None, _) => {
                    let full = self.unreduced.remove(&shard.parameter);
                    full.map(|full| HostOrDevice::Device(DynTensor::new(full.flatten())))
                }
            };
            (shard, value)
        };
        Ok(layout.local_param_shards(&layout.buckets[index]).into_iter().map(gradient).collect())
    }
}
