//! Who holds what: parameters in a fixed order, in buckets, each bucket in equal aligned parts.
//!
//! ```text
//!  bucket   │ q_proj.weight ·│ k_proj.weight ·│ o_proj.weight        ·····│     · padding
//!  part     │        0       │        1       │        2       │     3     │     one per rank
//!  pieces   │ q_proj[0..]    │ k_proj[0..]    │ o_proj[0..]    │ o_proj[n..]
//! ```
//!
//! Every parameter and every part starts at a multiple of [`ALIGN`], counted from the start of its bucket. So a block of
//! [`ALIGN`] values of a parameter is never torn, whatever the world, and what is computed per block (the terms of the global
//! norm, the scales of 8-bit states) does not depend on the number of ranks.

use crate::{
    ds_config::{Stage, Zero},
    segment::{Segments, TrainSegments},
};
use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::{DType, Tensor, backend::AutodiffBackend},
};
use std::{collections::HashMap, ops::Range};

/// The values of a block.
pub const ALIGN: usize = 256;

/// How training is divided among the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sharding {
    /// What is divided.
    pub stage: Stage,
    /// The number of values that are reduced or gathered at a time, at least. A parameter is never in two buckets, so a
    /// bucket may hold one that is larger. Default: 4 Mi.
    pub bucket_size: usize,
}

impl Default for Sharding {
    fn default() -> Self {
        Self { stage: Stage::Replicated, bucket_size: 4 << 20 }
    }
}

impl From<&Zero> for Sharding {
    fn from(zero: &Zero) -> Self {
        let bucket_size = usize::try_from(zero.reduce_bucket_size).unwrap_or(usize::MAX);
        Self { stage: zero.stage, bucket_size }
    }
}

/// A float parameter of the model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Parameter {
    pub id: ParamId,
    pub path: String,
    pub dims: Vec<usize>,
    pub dtype: DType,
    pub trainable: bool,
    /// The segments that use it, ascending.
    pub segments: Vec<usize>,
}

impl Parameter {
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }
}

/// Parameters that travel together; all of one type.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Bucket {
    /// Parameters and where each starts, ascending.
    pub slots: Vec<(usize, usize)>,
    /// Values, padding included: a multiple of [`ALIGN`] times the world.
    pub length: usize,
    pub dtype: DType,
    pub trainable: bool,
    /// The segments that use a parameter of it, ascending.
    pub segments: Vec<usize>,
}

/// The part of a parameter that lies in a part of a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub parameter: usize,
    /// Within the parameter.
    pub range: Range<usize>,
    /// Where it starts within the part.
    pub at: usize,
}

/// The division of a model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Layout {
    pub parameters: Vec<Parameter>,
    pub index: HashMap<ParamId, usize>,
    pub buckets: Vec<Bucket>,
    /// In how many parts optimizer states lie: 1 where every rank has all.
    pub parts: usize,
    /// The part of this rank.
    pub part: usize,
    pub segments: usize,
}

impl Layout {
    /// The division of a model whose weights are whole. In stage 3 all float parameters are divided and no bucket spans
    /// parameters that are used in different segments; in the others the frozen ones are left alone.
    pub fn new<B: AutodiffBackend, M: TrainSegments<B>>(
        model: &M,
        sharding: Sharding,
        (rank, world): (usize, usize),
    ) -> Self {
        let mut find = Find { segment: 0, path: Vec::new(), index: HashMap::new(), found: Vec::new() };
        let segments = Segments::segments(model);
        for segment in 0..segments {
            find.segment = segment;
            model.visit_segment(segment, &mut find);
        }
        find.divide(sharding, (rank, world), segments)
    }

    /// The division of a module that is not a list of segments.
    pub fn of_module<B: AutodiffBackend, M: Module<B>>(model: &M, sharding: Sharding, place: (usize, usize)) -> Self {
        let mut find = Find { segment: 0, path: Vec::new(), index: HashMap::new(), found: Vec::new() };
        model.visit(&mut find);
        find.divide(sharding, place, 1)
    }

    /// The pieces of one part of a bucket, ascending.
    pub fn pieces_of(&self, bucket: &Bucket, part: usize) -> Vec<Piece> {
        let length = bucket.length / self.parts;
        let part = part * length..(part + 1) * length;
        let piece = |&(parameter, start): &(usize, usize)| {
            let end = start + self.parameters[parameter].elements();
            let (from, to) = (start.max(part.start), end.min(part.end));
            (from < to).then(|| Piece { parameter, range: from - start..to - start, at: from - part.start })
        };
        bucket.slots.iter().filter_map(piece).collect()
    }

    /// The pieces of this rank.
    pub fn pieces(&self, bucket: &Bucket) -> Vec<Piece> {
        self.pieces_of(bucket, self.part)
    }

    /// The buckets of what is trained, with their numbers.
    pub fn trained(&self) -> impl Iterator<Item = (usize, &Bucket)> {
        self.buckets.iter().enumerate().filter(|(_, bucket)| bucket.trainable)
    }

    /// The buckets of what is trained that have all their gradients once the backward pass has left a segment. From there on
    /// it uses none of their weights either.
    pub fn due_after(&self, segment: usize) -> impl Iterator<Item = usize> {
        self.trained().filter(move |(_, bucket)| bucket.segments[0] == segment).map(|(index, _)| index)
    }

    /// The first segment with a parameter that is trained; the number of segments if there is none.
    pub fn first_trained(&self) -> usize {
        self.trained().map(|(_, bucket)| bucket.segments[0]).min().unwrap_or(self.segments)
    }
}

/// What the parameters of a bucket have in common, in the order in which buckets come.
type Kind<'a> = (bool, bool, usize, &'a [usize]);

fn kind(parameter: &Parameter, stage: Stage) -> Kind<'_> {
    let segments = if stage == Stage::Weights { parameter.segments.as_slice() } else { &[] };
    (parameter.trainable, parameter.dtype != DType::F32, parameter.dtype.size(), segments)
}

fn buckets(parameters: &[Parameter], sharding: Sharding, world: usize) -> Vec<Bucket> {
    let divided = |&i: &usize| parameters[i].trainable || sharding.stage == Stage::Weights;
    let mut order: Vec<usize> = (0..parameters.len()).filter(divided).collect();
    // Within what must not mix, as the model runs, then by path.
    order.sort_by_key(|&i| (kind(&parameters[i], sharding.stage), parameters[i].segments[0], &parameters[i].path));
    let mut buckets: Vec<Bucket> = Vec::new();
    let mut last = None;
    for i in order {
        let (parameter, new) = (&parameters[i], kind(&parameters[i], sharding.stage));
        let fits = |bucket: &&mut Bucket| {
            bucket.length + parameter.elements() <= sharding.bucket_size && bucket.dtype == parameter.dtype
        };
        let open = buckets.last_mut().filter(|_| last == Some(new)).filter(fits);
        let bucket = match open {
            Some(bucket) => bucket,
            None => {
                let (dtype, trainable) = (parameter.dtype, parameter.trainable);
                buckets.push(Bucket { slots: Vec::new(), length: 0, dtype, trainable, segments: Vec::new() });
                buckets.last_mut().expect("one was pushed")
            }
        };
        bucket.slots.push((i, bucket.length));
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

struct Find {
    segment: usize,
    path: Vec<String>,
    index: HashMap<ParamId, usize>,
    found: Vec<Parameter>,
}

impl Find {
    fn divide(self, sharding: Sharding, (rank, world): (usize, usize), segments: usize) -> Layout {
        let buckets = buckets(&self.found, sharding, world);
        let (part, parts) = if sharding.stage >= Stage::States { (rank, world) } else { (0, 1) };
        Layout { parameters: self.found, index: self.index, buckets, parts, part, segments }
    }
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Find {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(&known) = self.index.get(&param.id) {
            let segments = &mut self.found[known].segments;
            if segments.last() != Some(&self.segment) {
                segments.push(self.segment);
            }
            return;
        }
        let value = param.val();
        self.index.insert(param.id, self.found.len());
        self.found.push(Parameter {
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
