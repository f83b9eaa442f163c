//! Access to Flex tensors as slices of f32.

use burn::tensor::{DType, Shape, TensorData, bf16, f16};
use burn_flex::FlexTensor;
use std::borrow::Cow;

pub(super) use burn_peft_kernels::scratch::{uninit_vec, with_scratch};

/// Returns the tensor with its values contiguous from the start of its buffer.
pub(super) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    tensor.to_contiguous()
}

/// Returns the values of a contiguous f32 tensor.
pub(super) fn values(tensor: &FlexTensor) -> &[f32] {
    tensor.storage::<f32>()
}

/// Returns the values of a contiguous float tensor in f32: borrowed, or converted from half precision.
pub(super) fn to_f32(tensor: &FlexTensor) -> Cow<'_, [f32]> {
    to_f32_range(tensor, 0, tensor.layout().num_elements())
}

/// Returns values `from..to` of a contiguous float tensor in f32.
pub(super) fn to_f32_range(tensor: &FlexTensor, from: usize, to: usize) -> Cow<'_, [f32]> {
    match tensor.dtype() {
        DType::F32 => Cow::Borrowed(&tensor.storage::<f32>()[from..to]),
        DType::F16 => Cow::Owned(tensor.storage::<f16>()[from..to].iter().map(|v| v.to_f32()).collect()),
        DType::BF16 => Cow::Owned(tensor.storage::<bf16>()[from..to].iter().map(|v| v.to_f32()).collect()),
        other => panic!("the type of a weight must be f32, f16 or bf16, not {other:?}"),
    }
}

/// Copies the rows of `new` into `cache`, from slot `slot` on. Returns false, without any change, if the cache is not
/// contiguous or has another owner.
pub(super) fn write_to_cache(cache: &mut FlexTensor, new: &FlexTensor, slot: usize) -> bool {
    let ([_, slots, heads, dim], [_, n, ..]): ([usize; 4], [usize; 4]) =
        (cache.layout().shape().dims(), new.layout().shape().dims());
    let (width, new) = (heads * dim, contiguous(new.clone()));
    if !cache.is_contiguous() || cache.layout().start_offset() != 0 {
        return false;
    }
    let Some(held) = cache.try_storage_mut::<f32>() else { return false };
    for (row, new) in values(&new).chunks_exact(n * width).enumerate() {
        held[(row * slots + slot) * width..][..n * width].copy_from_slice(new);
    }
    true
}

/// Returns the values as i32.
pub(super) fn to_i32(data: TensorData) -> Vec<i32> {
    data.iter::<i32>().collect()
}

/// Creates a tensor of the given values.
pub(super) fn tensor(values: Vec<f32>, shape: &[usize]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, Shape::from(shape.to_vec())))
}
