//! Sharding of a model: parameters in a fixed order are packed into buckets, and each bucket is split into equal,
//! aligned shards.
//!
//! ```text
//!  bucket         │ q_proj.weight ·│ k_proj.weight ·│ o_proj.weight        ·····│     · padding
//!  bucket shard   │        0       │        1       │        2       │     3     │     one per rank
//!  param shards   │ q_proj[0..]    │ k_proj[0..]    │ o_proj[0..]    │ o_proj[n..]
//! ```
//!
//! Every parameter and every shard starts at a multiple of [`ALIGN`], counted from the start of its bucket. So a block
//! of [`ALIGN`] values of a parameter is never split between ranks, whatever the world size, and results computed per
//! block (the terms of the global norm, the scales of 8-bit states) do not depend on the number of ranks.

use crate::{
    comm::AsyncCommunicator,
    segment::{Segments, TrainSegments},
    stage::ZeroStage,
};
use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::{DType, Device, Tensor, backend::AutodiffBackend},
};
use std::{collections::HashMap, ops::Range};

/// The number of values in a block.
pub const ALIGN: usize = 256;

/// The settings of ZeRO: what is sharded among the ranks, and the bucket size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sharding {
    /// The ZeRO stage.
    pub stage: ZeroStage,
    /// The number of values that are reduced or gathered at a time. A parameter is never split between buckets, so a
    /// bucket holds more values if a single parameter does. Default: 4 Mi.
    pub bucket_size: usize,
}

impl Default for Sharding {
    fn default() -> Self {
        Self { stage: ZeroStage::Disabled, bucket_size: 4 << 20 }
    }
}

/// A rank's number and the number of ranks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RankInfo {
    pub rank: usize,
    pub world: usize,
}

impl From<&AsyncCommunicator> for RankInfo {
    fn from(communicator: &AsyncCommunicator) -> Self {
        Self { rank: communicator.rank(), world: communicator.world_size() }
    }
}

/// The metadata of a float parameter of the model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Parameter {
    pub id: ParamId,
    pub path: String,
    pub dims: Vec<usize>,
    pub dtype: DType,
    pub trainable: bool,
    /// The segments that use the parameter, ascending.
    pub segments: Vec<usize>,
    /// The chunk of this rank that uses the parameter first; none if another rank of the pipeline does, which then
    /// updates it.
    pub chunk: Option<usize>,
}

impl Parameter {
    pub(crate) fn elements(&self) -> usize {
        self.dims.iter().product()
    }
}

/// Parameters that are communicated together; all have one dtype.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Bucket {
    /// The parameters, in ascending order of their offsets.
    pub param_offsets: Vec<ParamOffset>,
    /// The number of values including padding: a multiple of [`ALIGN`] times the world size.
    pub length: usize,
    pub dtype: DType,
    pub trainable: bool,
    /// The segments that use a parameter of the bucket, ascending.
    pub segments: Vec<usize>,
}

impl Bucket {
    /// Returns the indices of the parameters, in the order of their offsets.
    pub(crate) fn parameters(&self) -> impl Iterator<Item = usize> {
        self.param_offsets.iter().map(|slot| slot.parameter)
    }
}

/// The place of a parameter in a bucket.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ParamOffset {
    /// The index of the parameter in the layout.
    pub parameter: usize,
    /// The offset of its first value in the bucket.
    pub offset: usize,
}

/// A parameter shard: the part of a parameter that lies in one shard of a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ParamShard {
    pub parameter: usize,
    /// The values of the parameter that belong to the shard.
    pub range: Range<usize>,
    /// The offset of these values in the bucket shard.
    pub offset: usize,
}

/// The layout of a sharded model: parameters, buckets and shards.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ShardLayout {
    pub parameters: Vec<Parameter>,
    pub parameter_index: HashMap<ParamId, usize>,
    pub buckets: Vec<Bucket>,
    /// The number of shards of the optimizer states: 1 if every rank holds all of them.
    pub num_shards: usize,
    /// The index of this rank's shard.
    pub shard_index: usize,
    pub num_segments: usize,
}

impl ShardLayout {
    /// Computes the layout of a model that has all its weights. In stage 3 all float parameters are sharded and no
    /// bucket mixes parameters that are used by different segments; in the other stages frozen parameters are not
    /// sharded. `chunk_of` returns the chunk of this rank that runs a segment, or none.
    pub(crate) fn new<B: AutodiffBackend, M: TrainSegments<B>>(
        model: &M,
        sharding: Sharding,
        rank: RankInfo,
        chunk_of: impl Fn(usize) -> Option<usize>,
    ) -> Self {
        let mut visitor = ParameterVisitor::default();
        let segments = Segments::segments(model);
        for segment in 0..segments {
            visitor.segment = segment;
            model.visit_segment(segment, &mut visitor);
        }
        visitor.parameters.iter_mut().for_each(|parameter| parameter.chunk = chunk_of(parameter.segments[0]));
        visitor.into_layout(sharding, rank, segments)
    }

    /// Computes the layout of the parameters that `range`, a part of the segments, uses first, in stage 3. `part` has
    /// their values; `self` is the layout of the whole model, whose parameters were placeholders of one element, and gets
    /// their sizes. The buckets are those of the whole model, because none mixes parameters of different segments.
    pub(crate) fn measure_part<B: AutodiffBackend, M: TrainSegments<B>>(
        &mut self,
        part: &M,
        range: &Range<usize>,
        sharding: Sharding,
        rank: RankInfo,
    ) -> Self {
        let mut visitor = ParameterVisitor::default();
        range.clone().for_each(|segment| part.visit_segment(segment, &mut visitor));
        for Parameter { id, dims, dtype, .. } in visitor.parameters {
            let known = &mut self.parameters[self.parameter_index[&id]];
            if range.contains(&known.segments[0]) {
                (known.dims, known.dtype) = (dims, dtype);
            }
        }
        let mut layout = Self::from_parameters(self.parameters.clone(), sharding, rank, self.num_segments);
        layout.buckets.retain(|bucket| range.contains(&bucket.segments[0]));
        layout
    }

    /// Computes the layout of parameters.
    pub(crate) fn from_parameters(
        parameters: Vec<Parameter>,
        sharding: Sharding,
        rank: RankInfo,
        segments: usize,
    ) -> Self {
        let index = parameters.iter().enumerate().map(|(index, parameter)| (parameter.id, index)).collect();
        ParameterVisitor { parameters, index, ..ParameterVisitor::default() }.into_layout(sharding, rank, segments)
    }

    /// Computes the layout of a module that is not a list of segments.
    pub(crate) fn for_module<B: AutodiffBackend, M: Module<B>>(model: &M, sharding: Sharding, rank: RankInfo) -> Self {
        let mut visitor = ParameterVisitor::default();
        model.visit(&mut visitor);
        visitor.into_layout(sharding, rank, 1)
    }

    /// Returns the parameter shards in one shard of a bucket, ascending.
    pub(crate) fn param_shards(&self, bucket: &Bucket, shard_index: usize) -> Vec<ParamShard> {
        let length = bucket.length / self.num_shards;
        let bucket_shard = shard_index * length..(shard_index + 1) * length;
        let shard = |&ParamOffset { parameter, offset: start }: &ParamOffset| {
            let end = start + self.parameters[parameter].elements();
            let (from, to) = (start.max(bucket_shard.start), end.min(bucket_shard.end));
            (from < to).then(|| {
                let range = from - start..to - start;
                ParamShard { parameter, range, offset: from - bucket_shard.start }
            })
        };
        bucket.param_offsets.iter().filter_map(shard).collect()
    }

    /// Returns this rank's parameter shards of a bucket.
    pub(crate) fn local_param_shards(&self, bucket: &Bucket) -> Vec<ParamShard> {
        self.param_shards(bucket, self.shard_index)
    }

    /// Returns the trainable buckets, with their indices.
    pub(crate) fn trainable_buckets(&self) -> impl Iterator<Item = (usize, &Bucket)> {
        self.buckets.iter().enumerate().filter(|(_, bucket)| bucket.trainable)
    }

    /// Returns the trainable buckets that have all their gradients once the backward pass has left `segment`. The rest
    /// of the pass does not use their weights either.
    pub(crate) fn buckets_ready_after(&self, segment: usize) -> impl Iterator<Item = usize> {
        self.trainable_buckets().filter(move |(_, bucket)| bucket.segments[0] == segment).map(|(index, _)| index)
    }

    /// Returns true if this rank updates a parameter.
    pub(crate) fn updates(&self, id: ParamId) -> bool {
        let parameter = self.parameter_index.get(&id).map(|&index| &self.parameters[index]);
        parameter.is_some_and(|parameter| parameter.trainable && parameter.chunk.is_some())
    }
}

/// The properties that all parameters of a bucket share; buckets are sorted by them, in the order of the fields.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct BucketKey<'a> {
    trainable: bool,
    has_master_weights: bool,
    dtype_size: usize,
    /// The chunk, so that all gradients of a bucket are there after one backward pass of a micro-batch.
    chunk: Option<usize>,
    /// The segments that use the parameters; empty unless weights are sharded.
    segments: &'a [usize],
}

fn bucket_key(parameter: &Parameter, stage: ZeroStage) -> BucketKey<'_> {
    BucketKey {
        trainable: parameter.trainable,
        has_master_weights: parameter.dtype != DType::F32,
        dtype_size: parameter.dtype.size(),
        chunk: parameter.chunk,
        segments: if stage == ZeroStage::Weights { &parameter.segments } else { &[] },
    }
}

fn build_buckets(parameters: &[Parameter], sharding: Sharding, world: usize) -> Vec<Bucket> {
    let divided = |&i: &usize| {
        let shared = parameters[i].trainable || sharding.stage == ZeroStage::Weights;
        shared && parameters[i].chunk.is_some()
    };
    let mut order: Vec<usize> = (0..parameters.len()).filter(divided).collect();
    // Sort by bucket key, then in the order in which the model runs, then by path.
    order
        .sort_by_key(|&i| (bucket_key(&parameters[i], sharding.stage), parameters[i].segments[0], &parameters[i].path));
    let mut buckets: Vec<Bucket> = Vec::new();
    let mut last = None;
    for i in order {
        let (parameter, new) = (&parameters[i], bucket_key(&parameters[i], sharding.stage));
        let fits = |bucket: &&mut Bucket| {
            bucket.length + parameter.elements() <= sharding.bucket_size && bucket.dtype == parameter.dtype
        };
        let current = buckets.last_mut().filter(|_| last.as_ref() == Some(&new)).filter(fits);
        let bucket = match current {
            Some(bucket) => bucket,
            None => {
                let (dtype, trainable) = (parameter.dtype, parameter.trainable);
                buckets.push(Bucket { param_offsets: Vec::new(), length: 0, dtype, trainable, segments: Vec::new() });
                buckets.last_mut().expect("a bucket was pushed above")
            }
        };
        bucket.param_offsets.push(ParamOffset { parameter: i, offset: bucket.length });
        bucket.length += parameter.elements().next_multiple_of(ALIGN);
        bucket.segments.extend(&parameter.segments);
        last = Some(new);
    }
    for bucket in &mut buckets {
        bucket.length = bucket.length.next_multiple_of(ALIGN * world);
        bucket.segments.sort_unstable();
        bucket.segments.dedup();
    }
    buckets
}

/// Collects the metadata of float parameters.
#[derive(Default)]
struct ParameterVisitor {
    segment: usize,
    path: Vec<String>,
    index: HashMap<ParamId, usize>,
    parameters: Vec<Parameter>,
}

impl ParameterVisitor {
    fn into_layout(self, sharding: Sharding, RankInfo { rank, world }: RankInfo, segments: usize) -> ShardLayout {
        let buckets = build_buckets(&self.parameters, sharding, world);
        let (shard_index, num_shards) =
            if sharding.stage >= ZeroStage::OptimizerStates { (rank, world) } else { (0, 1) };
        ShardLayout {
            parameters: self.parameters,
            parameter_index: self.index,
            buckets,
            num_shards,
            shard_index,
            num_segments: segments,
        }
    }
}

impl<B: AutodiffBackend> ModuleVisitor<B> for ParameterVisitor {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(&known) = self.index.get(&param.id) {
            let segments = &mut self.parameters[known].segments;
            if segments.last() != Some(&self.segment) {
                segments.push(self.segment);
            }
            return;
        }
        let value = param.val();
        self.index.insert(param.id, self.parameters.len());
        self.parameters.push(Parameter {
            id: param.id,
            path: self.path.join("."),
            dims: value.dims().to_vec(),
            dtype: value.dtype(),
            trainable: value.is_require_grad(),
            segments: vec![self.segment],
            chunk: Some(0),
        });
    }
}

/// Returns the device of the first float parameter; the default device for a model without float parameters.
pub(crate) fn device_of<B: AutodiffBackend, M: Module<B>>(model: &M) -> Device<B> {
    let mut find = FindDevice::<B>(None);
    model.visit(&mut find);
    find.0.unwrap_or_default()
}

struct FindDevice<B: AutodiffBackend>(Option<Device<B>>);

impl<B: AutodiffBackend> ModuleVisitor<B> for FindDevice<B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.0.get_or_insert_with(|| param.val().device());
    }
}

#[cfg(test)]
mod tests;
