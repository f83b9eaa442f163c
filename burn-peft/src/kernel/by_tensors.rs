//! The products of a linear layer by tensor operations.

use super::{Compute, float_dtype};
use burn::tensor::{DType, TensorMetadata, backend::Backend, ops::FloatTensor};

pub(super) fn forward<B: Backend>(x: FloatTensor<B>, weight: FloatTensor<B>, compute: Compute) -> FloatTensor<B> {
    product::<B>(x, B::float_transpose(weight), compute)
}

pub(super) fn backward_input<B: Backend>(
    dy: FloatTensor<B>,
    weight: FloatTensor<B>,
    compute: Compute,
) -> FloatTensor<B> {
    product::<B>(dy, weight, compute)
}

pub(super) fn backward_weight<B: Backend>(x: FloatTensor<B>, dy: FloatTensor<B>, compute: Compute) -> FloatTensor<B> {
    let dtype = x.dtype();
    as_type::<B>(product::<B>(B::float_transpose(dy), x, compute), dtype)
}

/// `a·b` by tensor operations, in the type of `a`.
pub fn product<B: Backend>(a: FloatTensor<B>, b: FloatTensor<B>, compute: Compute) -> FloatTensor<B> {
    let dtype = a.dtype();
    let half = match compute {
        Compute::F32 => return B::float_matmul(a, as_type::<B>(b, dtype)),
        Compute::Bf16 => DType::BF16,
        Compute::F16 => DType::F16,
    };
    as_type::<B>(B::float_matmul(as_type::<B>(a, half), as_type::<B>(b, half)), dtype)
}

/// `x` in a type; the same tensor if it has it already.
fn as_type<B: Backend>(x: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if x.dtype() == dtype { x } else { B::float_cast(x, float_dtype(dtype)) }
}
