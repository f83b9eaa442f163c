//! Conversion between tensors and the flat host buffers of buckets.

use crate::{
    segment::DynTensor,
    sharding::{Bucket, ParamOffset, ParamShard, ShardLayout},
};
use burn::{
    module::ParamId,
    tensor::{DType, TensorData, backend::Backend},
};
use half::{bf16, f16};

/// Flattens full parameters into the f32 buffer of a bucket; a parameter without a value is filled with zeros.
pub(crate) fn flatten<B: Backend>(bucket: &Bucket, mut values: impl FnMut(usize) -> Option<DynTensor<B>>) -> Vec<f32> {
    if let &[ParamOffset { parameter, .. }] = bucket.param_offsets.as_slice() {
        // Reuse the tensor's own buffer if possible: the only parameter of a bucket may be the largest tensor of the
        // model.
        let mut flat = values(parameter).map_or_else(Vec::new, to_host);
        flat.resize(bucket.length, 0.0);
        return flat;
    }
    let mut flat = vec![0.0; bucket.length];
    for &ParamOffset { parameter, offset } in &bucket.param_offsets {
        let Some(value) = values(parameter) else { continue };
        let data = value.into_f32().flatten().into_data();
        flat[offset..offset + data.num_elements()].iter_mut().zip(data.iter::<f32>()).for_each(|(to, from)| *to = from);
    }
    flat
}

/// Packs this rank's shards of a bucket into bytes, in the dtype of the bucket.
pub(crate) fn pack_shard<B: Backend>(
    layout: &ShardLayout,
    bucket: &Bucket,
    shards: &[(ParamShard, DynTensor<B>)],
) -> Vec<u8> {
    let size = bucket.dtype.size();
    let mut bytes = vec![0; bucket.length / layout.num_shards * size];
    for (shard, value) in shards {
        assert_eq!(value.dtype(), bucket.dtype, "a shard has the dtype of its bucket");
        let data = value.clone().flatten().into_data();
        bytes[shard.offset * size..][..shard.range.len() * size].copy_from_slice(data.as_bytes());
    }
    bytes
}

/// Unpacks the full parameters of a bucket from its bytes.
pub(crate) fn unpack_parameters<B: Backend>(
    layout: &ShardLayout,
    bucket: &Bucket,
    mut bytes: Vec<u8>,
    device: &B::Device,
) -> Vec<(ParamId, DynTensor<B>)> {
    let size = bucket.dtype.size();
    if let &[ParamOffset { parameter, .. }] = bucket.param_offsets.as_slice() {
        // Reuse the received buffer: the only parameter of a bucket may be the largest tensor of the model.
        let info = &layout.parameters[parameter];
        bytes.truncate(info.elements() * size);
        let data = TensorData::from_bytes_vec(bytes, info.dims.clone(), bucket.dtype);
        return vec![(info.id, DynTensor::from_primitive(B::float_from_data(data, device)))];
    }
    let unpack = |&ParamOffset { parameter, offset }: &ParamOffset| {
        let info = &layout.parameters[parameter];
        let bytes = &bytes[offset * size..][..info.elements() * size];
        (info.id, tensor_from_bytes(bytes, &info.dims, bucket.dtype, device))
    };
    bucket.param_offsets.iter().map(unpack).collect()
}

/// Creates a tensor from little-endian bytes, with a buffer of its own.
pub(crate) fn tensor_from_bytes<B: Backend>(
    bytes: &[u8],
    dims: &[usize],
    dtype: DType,
    device: &B::Device,
) -> DynTensor<B> {
    let four = |b: &[u8]| [b[0], b[1], b[2], b[3]];
    let halves = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    let data = match dtype {
        DType::F32 => {
            let values: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(four(b))).collect();
            TensorData::new(values, dims.to_vec())
        }
        DType::F16 => TensorData::new(halves().map(f16::from_le_bytes).collect(), dims.to_vec()),
        DType::BF16 => TensorData::new(halves().map(bf16::from_le_bytes).collect(), dims.to_vec()),
        other => panic!("parameters are f32, f16 or bf16, not {other:?}"),
    };
    DynTensor::from_primitive(B::float_from_data(data, device))
}

/// Creates a flat tensor from a copy of host values.
pub(crate) fn tensor_from_slice<B: Backend>(values: &[f32], device: &B::Device) -> DynTensor<B> {
    tensor_from_vec(values.to_vec(), device)
}

/// Creates a flat tensor from host values, without a copy.
pub(crate) fn tensor_from_vec<B: Backend>(values: Vec<f32>, device: &B::Device) -> DynTensor<B> {
    let n = values.len();
    DynTensor::from_primitive(B::float_from_data(TensorData::new(values, [n]), device))
}

/// Creates a flat tensor of another dtype; the values are rounded on the host.
pub(crate) fn cast_on_host<B: Backend>(values: &[f32], dtype: DType, device: &B::Device) -> DynTensor<B> {
    let data = TensorData::new(values.to_vec(), [values.len()]).convert_dtype(dtype);
    DynTensor::from_primitive(B::float_from_data(data, device))
}

/// Returns the values of a tensor in host memory, in f32; reuses the tensor's own buffer if that is in host memory and
/// has no other owner.
pub(crate) fn to_host<B: Backend>(value: DynTensor<B>) -> Vec<f32> {
    let data = value.into_f32().flatten().into_data();
    data.into_vec().unwrap_or_else(|error| panic!("an f32 tensor has f32 values: {error:?}"))
}

/// Returns a shard of a full parameter, flattened. `copy` copies the values, so that the rest of the parameter can be
/// freed.
pub(crate) fn slice_shard<B: Backend>(
    value: DynTensor<B>,
    shard: &ParamShard,
    copy: bool,
    device: &B::Device,
) -> DynTensor<B> {
    let n = value.elements();
    if shard.range == (0..n) {
        return DynTensor::new(value.flatten());
    }
    if !copy {
        return DynTensor::new(value.flatten().narrow(0, shard.range.start, shard.range.len()));
    }
    let (dtype, size) = (value.dtype(), value.dtype().size());
    let data = value.flatten().into_data();
    let bytes = &data.as_bytes()[shard.range.start * size..shard.range.end * size];
    tensor_from_bytes(bytes, &[shard.range.len()], dtype, device)
}
