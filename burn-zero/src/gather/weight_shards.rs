//! This rank's weight shards: on the device, in host memory or in a file.

use super::{PendingGather, ShardContext, ShardTensors, TakeParams, WeightStore, start_all_gather};
use crate::{
    Error, bucket,
    comm::{AsyncCommunicator, Collectives, Lane},
    host_or_device::DeviceHostBytes,
    offload::{MemoryTier, OffloadFile},
    segment::DynTensor,
    sharding::{ParamShard, RankInfo, ShardLayout},
};
use burn::{
    module::{Module, ParamId},
    tensor::backend::{AutodiffBackend, Backend},
};
use std::{collections::HashMap, sync::Arc};

/// This rank's shards of all weights.
pub(crate) struct WeightShards<B: Backend> {
    /// The shards of each bucket, by the bucket's first parameter.
    shards: HashMap<ParamId, BucketShard<B>>,
    /// The file of the shards, if they are in a file.
    file: Option<OffloadFile>,
    tier: MemoryTier,
}

/// The weight shards as a [`WeightStore`], for the update.
pub(crate) struct WeightShardStore<'a, B: Backend>(&'a mut WeightShards<B>, ShardContext<'a, B>);

impl<B: Backend> WeightStore<B> for WeightShardStore<'_, B> {
    fn take(&mut self, index: usize) -> Result<ShardTensors<B>, Error> {
        self.0.take(self.1.layout, index, self.1.device)
    }

    fn put(&mut self, index: usize, shards: ShardTensors<B>) -> Result<(), Error> {
        self.0.put(self.1.layout, index, shards)
    }
}

/// A rank's shard of a bucket.
enum BucketShard<B: Backend> {
    Device(ShardTensors<B>),
    /// The bytes of the bucket shard, as the all-gather sends them.
    Host(Arc<Vec<u8>>),
    /// The place of the bytes in the file.
    File {
        start: u64,
        length: usize,
    },
}

/// Returns the id of the first parameter of a bucket.
fn first_id(layout: &ShardLayout, index: usize) -> ParamId {
    layout.parameters[layout.buckets[index].param_offsets[0].parameter].id
}

impl<B: Backend> WeightShards<B> {
    /// Creates the shards of a model without parameters, to be kept in `tier`.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the shards go to a file that cannot be created.
    pub(crate) fn new(tier: &MemoryTier, rank: RankInfo) -> Result<Self, Error> {
        let file = match tier {
            MemoryTier::File(folder) => Some(OffloadFile::create(folder, rank.rank)?),
            _ => None,
        };
        Ok(Self { shards: HashMap::new(), file, tier: tier.clone() })
    }

    /// Takes this rank's shards of the parameters in the layout out of a model and leaves placeholders of one element.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the shards go to a file that cannot be written.
    pub(crate) fn add<A: AutodiffBackend<InnerBackend = B>, M: Module<A>>(
        &mut self,
        model: M,
        layout: &ShardLayout,
        device: &B::Device,
    ) -> Result<M, Error> {
        let mut take = TakeParams { layout, selects: |_| true, values: HashMap::new() };
        let model = model.map(&mut take);
        let mut values = take.values;
        for (index, bucket) in layout.buckets.iter().enumerate() {
            let own = layout.local_param_shards(bucket).into_iter();
            let shards = own.map(|shard| {
                let value = values.remove(&shard.parameter).expect("the model has every parameter of the layout");
                let value = bucket::slice_shard(value, &shard, true, device);
                (shard, value)
            });
            self.put(layout, index, shards.collect())?;
        }
        Ok(model)
    }

    /// Returns the shards as a store for the update.
    pub(crate) fn as_store<'a>(&'a mut self, context: ShardContext<'a, B>) -> WeightShardStore<'a, B> {
        WeightShardStore(self, context)
    }

    /// Stores this rank's shards of a bucket in their memory tier.
    fn put(&mut self, layout: &ShardLayout, index: usize, shards: ShardTensors<B>) -> Result<(), Error> {
        let bytes = || bucket::pack_shard(layout, &layout.buckets[index], &shards);
        let shard = match (&self.tier, &mut self.file) {
            (MemoryTier::Device, _) => BucketShard::Device(shards),
            (_, None) => BucketShard::Host(Arc::new(bytes())),
            (_, Some(file)) => {
                let bytes = bytes();
                let start = match self.shards.get(&first_id(layout, index)) {
                    Some(&BucketShard::File { start, .. }) => start,
                    _ => file.allocate(bytes.len()),
                };
                file.write(start, &bytes)?;
                BucketShard::File { start, length: bytes.len() }
            }
        };
        self.shards.insert(first_id(layout, index), shard);
        Ok(())
    }

    /// Returns this rank's shards of a bucket on the device, to be updated in place and [put](Self::put) back.
    fn take(&mut self, layout: &ShardLayout, index: usize, device: &B::Device) -> Result<ShardTensors<B>, Error> {
        match self.shards.get_mut(&first_id(layout, index)) {
            Some(BucketShard::Device(shards)) => Ok(std::mem::take(shards)),
            _ => self.read(layout, index, device),
        }
    }

    /// Returns a copy of this rank's shards of a bucket, on the device.
    pub(crate) fn read(
        &self,
        layout: &ShardLayout,
        index: usize,
        device: &B::Device,
    ) -> Result<ShardTensors<B>, Error> {
        let bucket = &layout.buckets[index];
        let bytes = match (&self.shards[&first_id(layout, index)], &self.file) {
            (BucketShard::Device(shards), _) => return Ok(shards.clone()),
            (BucketShard::Host(bytes), _) => bytes.clone(),
            (BucketShard::File { start, length }, Some(file)) => Arc::new(file.reader(*start, *length)()?),
            (BucketShard::File { .. }, None) => unreachable!("a shard in a file implies an open file"),
        };
        let size = bucket.dtype.size();
        let read = |shard: ParamShard| {
            let bytes = &bytes[shard.offset * size..][..shard.range.len() * size];
            let value = bucket::tensor_from_bytes(bytes, &[shard.range.len()], bucket.dtype, device);
            (shard, value)
        };
        Ok(layout.local_param_shards(bucket).into_iter().map(read).collect())
    }

    /// Starts the all-gather of a bucket.
    pub(crate) fn gather(
        &self,
        layout: &ShardLayout,
        index: usize,
        communicator: &AsyncCommunicator,
    ) -> PendingGather<B> {
        let bucket = &layout.buckets[index];
        let (size, trace) = (bucket.dtype.size(), communicator.trace().clone());
        match (&self.shards[&first_id(layout, index)], &self.file) {
            (BucketShard::Device(shards), _) => start_all_gather(layout, bucket, shards.clone(), communicator),
            (BucketShard::Host(bytes), _) => {
                let bytes = bytes.clone();
                PendingGather::InFlight(
                    communicator.submit("all_gather", move |group| group.all_gather_bytes(&bytes, size)),
                )
            }
            (BucketShard::File { start, length }, Some(file)) => {
                let read = file.reader(*start, *length);
                PendingGather::InFlight(communicator.submit("all_gather", move |group| {
                    let bytes = trace.numbered_span("from the file", index, Lane::Transfer, read)?;
                    group.all_gather_bytes(&bytes, size)
                }))
            }
            (BucketShard::File { .. }, None) => unreachable!("a shard in a file implies an open file"),
        }
    }

    /// Gathers all weights and returns them by parameter.
    pub(crate) fn gather_all(&self, context: ShardContext<'_, B>) -> Result<HashMap<ParamId, DynTensor<B>>, Error> {
        let ShardContext { layout, communicator, device } = context;
        let mut values = HashMap::new();
        for (index, bucket) in layout.buckets.iter().enumerate() {
            values.extend(self.gather(layout, index, communicator).wait(layout, bucket, device)?);
        }
        Ok(values)
    }

    /// Returns the bytes of the trainable or of the frozen buckets.
    pub(crate) fn bytes(&self, layout: &ShardLayout, trainable: bool) -> DeviceHostBytes {
        let buckets = (0..layout.buckets.len()).filter(|&index| layout.buckets[index].trainable == trainable);
        let own = buckets.filter_map(|index| self.shards.get(&first_id(layout, index)));
        let bytes = |shard: &BucketShard<B>| match shard {
            BucketShard::Device(shards) => {
                DeviceHostBytes { device: shards.iter().map(|(_, value)| value.bytes()).sum(), host: 0 }
            }
            BucketShard::Host(bytes) => DeviceHostBytes { device: 0, host: bytes.len() },
            BucketShard::File { .. } => DeviceHostBytes::default(),
        };
        own.map(bytes).sum()
    }
}
