//! The products of a linear layer by tensor operations.

use super::float_dtype;
use burn::tensor::{TensorMetadata, backend::Backend, ops::FloatTensor};

pub(super) fn forward<B: Backend>(x: FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
    let weight = as_type_of::<B>(&x, weight);
    B::float_matmul(x, B::float_transpose(weight))
}

pub(super) fn backward_input<B: Backend>(dy: FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
    let weight = as_type_of::<B>(&dy, weight);
    B::float_matmul(dy, weight)
}

pub(super) fn backward_weight<B: Backend>(x: FloatTensor<B>, dy: FloatTensor<B>) -> FloatTensor<B> {
    B::float_matmul(B::float_transpose(dy), x)
}

/// `weight` in the type of `x`; the same tensor if it has it already.
fn as_type_of<B: Backend>(x: &FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
    if x.dtype() == weight.dtype() { weight } else { B::float_cast(weight, float_dtype(x.dtype())) }
}
