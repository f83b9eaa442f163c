//! The tensors of one file of a checkpoint, each fetched from device, host or file when it is written.

use super::place::Place;
use crate::{offload::OffloadedStates, segment::DynTensor};
use burn::{
    module::{ModuleVisitor, Param, ParamId},
    tensor::{
        DType, Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use safetensors::{Dtype, View};
use serde_json::json;
use std::{borrow::Cow, collections::HashMap, ops::Range};

/// The tensors of one file of a checkpoint.
pub(super) struct CheckpointTensors<'a, B: Backend> {
    /// The tensors, by name.
    pub tensors: Vec<(String, CheckpointTensor<'a, B>)>,
    /// The [`Place`] of each float tensor.
    pub places: serde_json::Map<String, serde_json::Value>,
    pub num_shards: usize,
}

impl<'a, B: Backend> CheckpointTensors<'a, B> {
    /// Adds the values `range` of a float tensor whose full shape is `dims`.
    pub(super) fn add(&mut self, name: String, range: &Range<usize>, dims: Vec<usize>, source: TensorSource<'a, B>) {
        self.places.insert(name.clone(), json!(Place::flat(range, dims.clone())));
        let shape = if self.num_shards == 1 { dims } else { vec![range.len()] };
        self.tensors.push((name, CheckpointTensor::Floats(shape, source)));
    }
}

/// A tensor of a checkpoint that is fetched from device, host or file when it is written.
pub(super) enum CheckpointTensor<'a, B: Backend> {
    Floats(Vec<usize>, TensorSource<'a, B>),
    Step([u8; 8]),
}

/// The place of a tensor's values.
pub(super) enum TensorSource<'a, B: Backend> {
    Device(Tensor<B, 1>),
    Host(&'a [f32]),
    /// One of the two moments of a shard in host memory or in the offload file.
    Offload(&'a OffloadedStates, ParamId, usize),
}

impl<B: Backend> View for CheckpointTensor<'_, B> {
    fn dtype(&self) -> Dtype {
        match self {
            Self::Floats(..) => Dtype::F32,
            Self::Step(_) => Dtype::I64,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::Floats(shape, _) => shape,
            Self::Step(_) => &[],
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Floats(_, TensorSource::Device(values)) => {
                Cow::Owned(values.clone().into_data().convert_dtype(DType::F32).as_bytes().to_vec())
            }
            Self::Floats(_, TensorSource::Host(values)) => Cow::Owned(le_bytes(values)),
            Self::Floats(_, TensorSource::Offload(offloaded, id, slot)) => {
                Cow::Owned(le_bytes(&offloaded.moment(*id, *slot)))
            }
            Self::Step(bytes) => Cow::Borrowed(bytes),
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Self::Floats(shape, _) => shape.iter().product::<usize>() * 4,
            Self::Step(bytes) => bytes.len(),
        }
    }
}

/// Returns the little-endian bytes of values.
pub(super) fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Collects the values of trainable parameters.
pub(super) struct TrainableValues<B: Backend> {
    pub values: HashMap<ParamId, DynTensor<B>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for TrainableValues<B::InnerBackend> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if param.is_require_grad() {
            self.values.insert(param.id, DynTensor::new(param.val().inner()));
        }
    }
}
