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
    segment::{Segments, TrainSegments},
    stage::ZeroStage,
};
use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::{DType, Tensor, backend::AutodiffBackend},
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
}

impl Parameter {
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }
}

/// Parameters that are communicated together; all have one dtype.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Bucket {
    /// Parameter indices, each with the parameter's offset in the bucket, ascending.
    pub param_offsets: Vec<(usize, usize)>,
    /// The number of values including padding: a multiple of [`ALIGN`] times the world size.
    pub length: usize,
    pub dtype: DType,
    pub trainable: bool,
    /// The segments that use a parameter of the bucket, ascending.
    pub segments: Vec<usize>,
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
    /// sharded.
    pub fn new<B: AutodiffBackend, M: TrainSegments<B>>(
        model: &M,
        sharding: Sharding,
        (rank, world): (usize, usize),
    ) -> Self {
        let mut visitor =
            ParameterVisitor { segment: 0, path: Vec::new(), index: HashMap::new(), parameters: Vec::new() };
        let segments = Segments::segments(model);
        for segment in 0..segments {
            visitor.segment = segment;
            model.visit_segment(segment, &mut visitor);
        }
        visitor.into_layout(sharding, (rank, world), segments)
    }

    /// Computes the layout of a module that is not a list of segments.
    pub fn for_module<B: AutodiffBackend, M: Module<B>>(
        model: &M,
        sharding: Sharding,
        rank_and_world: (usize, usize),
    ) -> Self {
        let mut visitor =
            ParameterVisitor { segment: 0, path: Vec::new(), index: HashMap::new(), parameters: Vec::new() };
        model.visit(&mut visitor);
        visitor.into_layout(sharding, rank_and_world, 1)
    }

    /// Returns the parameter shards in one shard of a bucket, ascending.
    pub fn param_shards(&self, bucket: &Bucket, part: usize) -> Vec<ParamShard> {
        let length = bucket.length / self.num_shards;
        let part = part * length..(part + 1) * length;
        let shard = |&(parameter, start): &(usize, usize)| {
            let end = start + self.parameters[parameter].elements();
            let (from, to) = (start.max(part.start), end.min(part.end));
            (from < to).then(|| ParamShard { parameter, range: from - start..to - start, offset: from - part.start })
        };
        bucket.param_offsets.iter().filter_map(shard).collect()
    }

    /// Returns this rank's parameter shards of a bucket.
    pub fn local_param_shards(&self, bucket: &Bucket) -> Vec<ParamShard> {
        self.param_shards(bucket, self.shard_index)
    }

    /// Returns the trainable buckets, with their indices.
    pub fn trainable_buckets(&self) -> impl Iterator<Item = (usize, &Bucket)> {
        self.buckets.iter().enumerate().filter(|(_, bucket)| bucket.trainable)
    }

    /// Returns the trainable buckets that have all their gradients once the backward pass has left `segment`. The rest
    /// of the pass does not use their weights either.
    pub fn buckets_ready_after(&self, segment: usize) -> impl Iterator<Item = usize> {
        self.trainable_buckets().filter(move |(_, bucket)| bucket.segments[0] == segment).map(|(index, _)| index)
    }

    /// Returns the first segment with a trainable parameter; the number of segments if there is none.
    pub fn first_trainable_segment(&self) -> usize {
        self.trainable_buckets().map(|(_, bucket)| bucket.segments[0]).min().unwrap_or(self.num_segments)
    }
}

/// The properties that all parameters of a bucket share; buckets are sorted by this key.
type BucketKey<'a> = (bool, bool, usize, &'a [usize]);

fn bucket_key(parameter: &Parameter, stage: ZeroStage) -> BucketKey<'_> {
    let segments = if stage == ZeroStage::Weights { parameter.segments.as_slice() } else { &[] };
    (parameter.trainable, parameter.dtype != DType::F32, parameter.dtype.size(), segments)
}

fn build_buckets(parameters: &[Parameter], sharding: Sharding, world: usize) -> Vec<Bucket> {
    let divided = |&i: &usize| parameters[i].trainable || sharding.stage == ZeroStage::Weights;
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
        let open = buckets.last_mut().filter(|_| last == Some(new)).filter(fits);
        let bucket = match open {
            Some(bucket) => bucket,
            None => {
                let (dtype, trainable) = (parameter.dtype, parameter.trainable);
                buckets.push(Bucket { param_offsets: Vec::new(), length: 0, dtype, trainable, segments: Vec::new() });
                buckets.last_mut().expect("a bucket was pushed above")
            }
        };
        bucket.param_offsets.push((i, bucket.length));
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

struct ParameterVisitor {
    segment: usize,
    path: Vec<String>,
    index: HashMap<ParamId, usize>,
    parameters: Vec<Parameter>,
}

impl ParameterVisitor {
    fn into_layout(self, sharding: Sharding, (rank, world): (usize, usize), segments: usize) -> ShardLayout {
        let buckets = build_buckets(&self.parameters, sharding, world);
        let (part, parts) = if sharding.stage >= ZeroStage::OptimizerStates { (rank, world) } else { (0, 1) };
        ShardLayout {
            parameters: self.parameters,
            parameter_index: self.index,
            buckets,
            num_shards: parts,
            shard_index: part,
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
        });
    }
}

#[cfg(test)]
mod tests;
