//! Portable matrix products of a linear layer, made of tensor operations.

use super::float_dtype;
use crate::MatmulPrecision;
use burn::tensor::{DType, TensorMetadata, backend::Backend, ops::FloatTensor};

pub(crate) fn forward<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    precision: MatmulPrecision,
) -> FloatTensor<B> {
    matmul::<B>(x, B::float_transpose(weight), precision)
}

pub(crate) fn backward_input<B: Backend>(
    dy: FloatTensor<B>,
    weight: FloatTensor<B>,
    precision: MatmulPrecision,
) -> FloatTensor<B> {
    matmul::<B>(dy, weight, precision)
}

pub(crate) fn backward_weight<B: Backend>(
    x: FloatTensor<B>,
    dy: FloatTensor<B>,
    precision: MatmulPrecision,
) -> FloatTensor<B> {
    let dtype = x.dtype();
    as_type::<B>(matmul::<B>(B::float_transpose(dy), x, precision), dtype)
}

/// Returns `a·b` in the type of `a`, made of tensor operations.
pub fn matmul<B: Backend>(a: FloatTensor<B>, b: FloatTensor<B>, precision: MatmulPrecision) -> FloatTensor<B> {
    let dtype = a.dtype();
    let half = match precision {
        MatmulPrecision::F32 => return B::float_matmul(a, as_type::<B>(b, dtype)),
        MatmulPrecision::Bf16 => DType::BF16,
        MatmulPrecision::F16 => DType::F16,
    };
    as_type::<B>(B::float_matmul(as_type::<B>(a, half), as_type::<B>(b, half)), dtype)
}

/// Casts `x` to a type; returns the same tensor if it has that type already.
fn as_type<B: Backend>(x: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if x.dtype() == dtype { x } else { B::float_cast(x, float_dtype(dtype)) }
}
