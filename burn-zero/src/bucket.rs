//! Values on their way between tensors and flat host buffers.

use crate::{
    partition::{Bucket, Layout, Piece},
    segment::Value,
};
use burn::tensor::{DType, TensorData, backend::Backend};
use half::{bf16, f16};

/// The flat f32 buffer of a bucket from whole parameters; what has none stays zero.
pub(crate) fn flatten<B: Backend>(bucket: &Bucket, mut values: impl FnMut(usize) -> Option<Value<B>>) -> Vec<f32> {
    if let &[(parameter, _)] = bucket.slots.as_slice() {
        // Its own buffer where that can be had: a bucket of one may be the largest tensor of the model.
        let mut flat = values(parameter).map_or_else(Vec::new, to_host);
        flat.resize(bucket.length, 0.0);
        return flat;
    }
    let mut flat = vec![0.0; bucket.length];
    for &(parameter, start) in &bucket.slots {
        let Some(value) = values(parameter) else { continue };
        let data = value.into_f32().flatten().into_data();
        flat[start..start + data.num_elements()].iter_mut().zip(data.iter::<f32>()).for_each(|(to, from)| *to = from);
    }
    flat
}

/// The bytes of a part of a bucket from its pieces, in the bucket's type.
pub(crate) fn part_bytes<B: Backend>(layout: &Layout, bucket: &Bucket, pieces: &[(Piece, Value<B>)]) -> Vec<u8> {
    let size = bucket.dtype.size();
    let mut bytes = vec![0; bucket.length / layout.parts * size];
    for (piece, value) in pieces {
        assert_eq!(value.dtype(), bucket.dtype, "a piece has the type of its bucket");
        let data = value.clone().flatten().into_data();
        bytes[piece.at * size..][..piece.range.len() * size].copy_from_slice(data.as_bytes());
    }
    bytes
}

/// The whole parameters of a bucket from its bytes.
pub(crate) fn parameters<B: Backend>(
    layout: &Layout,
    bucket: &Bucket,
    mut bytes: Vec<u8>,
    device: &B::Device,
) -> Vec<(usize, Value<B>)> {
    let size = bucket.dtype.size();
    if let &[(parameter, _)] = bucket.slots.as_slice() {
        // In the buffer that has come: a bucket of one may be the largest tensor of the model.
        let known = &layout.parameters[parameter];
        bytes.truncate(known.elements() * size);
        let data = TensorData::from_bytes_vec(bytes, known.dims.clone(), bucket.dtype);
        return vec![(parameter, Value::from_primitive(B::float_from_data(data, device)))];
    }
    let whole = |&(parameter, start): &(usize, usize)| {
        let known = &layout.parameters[parameter];
        let bytes = &bytes[start * size..][..known.elements() * size];
        (parameter, tensor(bytes, &known.dims, bucket.dtype, device))
    };
    bucket.slots.iter().map(whole).collect()
}

/// A tensor from little-endian bytes, in a buffer of its own.
pub(crate) fn tensor<B: Backend>(bytes: &[u8], dims: &[usize], dtype: DType, device: &B::Device) -> Value<B> {
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
    Value::from_primitive(B::float_from_data(data, device))
}

/// A flat tensor from host values.
pub(crate) fn from_host<B: Backend>(values: &[f32], device: &B::Device) -> Value<B> {
    from_vec(values.to_vec(), device)
}

/// A flat tensor that takes host values over.
pub(crate) fn from_vec<B: Backend>(values: Vec<f32>, device: &B::Device) -> Value<B> {
    let n = values.len();
    Value::from_primitive(B::float_from_data(TensorData::new(values, [n]), device))
}

/// A flat tensor in another type, rounded on the host.
pub(crate) fn rounded<B: Backend>(values: &[f32], dtype: DType, device: &B::Device) -> Value<B> {
    let data = TensorData::new(values.to_vec(), [values.len()]).convert_dtype(dtype);
    Value::from_primitive(B::float_from_data(data, device))
}

/// The values of a tensor on the host, in f32; the tensor's own buffer where it is on the host and no one else holds it.
pub(crate) fn to_host<B: Backend>(value: Value<B>) -> Vec<f32> {
    let data = value.into_f32().flatten().into_data();
    data.into_vec().unwrap_or_else(|error| panic!("an f32 tensor has f32 values: {error:?}"))
}

/// A piece of a whole parameter, flat. `apart` copies it, so that the rest of the parameter can go.
pub(crate) fn cut<B: Backend>(value: Value<B>, piece: &Piece, apart: bool, device: &B::Device) -> Value<B> {
    let n = value.elements();
    if piece.range == (0..n) {
        return Value::new(value.flatten());
    }
    if !apart {
        return Value::new(value.flatten().narrow(0, piece.range.start, piece.range.len()));
    }
    let (dtype, size) = (value.dtype(), value.dtype().size());
    let data = value.flatten().into_data();
    let bytes = &data.as_bytes()[piece.range.start * size..piece.range.end * size];
    tensor(bytes, &[piece.range.len()], dtype, device)
}
