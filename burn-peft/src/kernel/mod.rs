//! The products of a linear layer, as a backend extension.
//!
//! The default bodies are tensor operations and serve every backend; a backend that can do better overrides them. The
//! implementation for [`Autodiff`](burn::backend::Autodiff) has a hand-written backward pass: a frozen weight costs no product and keeps no
//! activation, and a weight stored in half precision or packed is widened for the moment of a product only.

mod autodiff;
#[cfg(feature = "flex")]
mod awake;
mod backends;
mod by_tensors;
#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "flex")]
pub mod instructions;
#[cfg(feature = "flex")]
pub mod matrix;
#[cfg(feature = "flex")]
pub mod scratch;
mod stored;

pub use autodiff::found_before;
pub use by_tensors::product;
#[cfg(feature = "flex")]
pub use flex::few;
pub use stored::Stored;

use crate::packed::{self, Packed};
use burn::tensor::{
    DType, FloatDType, Slice, Tensor, TensorMetadata, TensorPrimitive, backend::Backend, ops::FloatTensor,
};

/// In what products are computed. Their sums are f32 in any case, and so is what comes out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compute {
    /// Products of f32.
    #[default]
    F32,
    /// Products of bf16, to which both factors are rounded first.
    Bf16,
    /// Products of f16, to which both factors are rounded first: what lies beyond its range becomes infinite, so losses are
    /// scaled.
    F16,
}

/// Products with a weight `[out, in]` that may be stored in another type than the activations.
pub trait LinearKernels: Backend {
    /// `y = x·Wᵀ`: `x [tokens, in]`, `weight [out, in]` in f32, f16 or bf16; `y [tokens, out]` in the type of `x`.
    fn linear_forward(x: FloatTensor<Self>, weight: FloatTensor<Self>, compute: Compute) -> FloatTensor<Self> {
        by_tensors::forward::<Self>(x, weight, compute)
    }

    /// The gradient of `x`: `dx = dy·W`, with `dy [tokens, out]` and `weight [out, in]`; added to what others found of it, where
    /// nobody else holds that in its place.
    fn linear_backward_input(
        dy: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        found: Option<FloatTensor<Self>>,
        compute: Compute,
    ) -> FloatTensor<Self> {
        added::<Self>(by_tensors::backward_input::<Self>(dy, weight, compute), found)
    }

    /// The gradient of the weight: `dW = dyᵀ·x`, `[out, in]`, in the type of `x`.
    fn linear_backward_weight(x: FloatTensor<Self>, dy: FloatTensor<Self>, compute: Compute) -> FloatTensor<Self> {
        by_tensors::backward_weight::<Self>(x, dy, compute)
    }

    /// The values of packed rows, `[out, in]` in f32.
    fn unpack(weight: &Packed<Self>) -> FloatTensor<Self> {
        packed::unpack(weight)
    }

    /// [`LinearKernels::linear_forward`] with a packed weight, decoded tile by tile.
    fn packed_forward(x: FloatTensor<Self>, weight: &Packed<Self>, compute: Compute) -> FloatTensor<Self> {
        packed::forward(x, weight, compute)
    }

    /// [`LinearKernels::linear_backward_input`] with a packed weight, decoded tile by tile.
    fn packed_backward_input(
        dy: FloatTensor<Self>,
        weight: &Packed<Self>,
        found: Option<FloatTensor<Self>>,
        compute: Compute,
    ) -> FloatTensor<Self> {
        added::<Self>(packed::backward_input(dy, weight, compute), found)
    }

    /// `x + y`, of the same shape and type, in the memory of `x` where nobody else holds it.
    fn add(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_add(x, y)
    }

    /// Runs `work`, whose operations follow each other without a pause, as the backend does best: a step of training, say. On
    /// Flex other threads wait for their parts awake meanwhile. Within another such work it changes nothing.
    fn at_work<R>(work: impl FnOnce() -> R) -> R {
        work()
    }

    /// `values` in the memory of `target`, of the same shape and type, where nobody else holds it.
    fn overwrite(target: FloatTensor<Self>, values: FloatTensor<Self>) -> FloatTensor<Self> {
        let all: Vec<Slice> = target.shape().iter().map(|&n| Slice::from(0..n)).collect();
        Self::float_slice_assign(target, &all, values)
    }
}

fn float_dtype(dtype: DType) -> FloatDType {
    match dtype {
        DType::F64 => FloatDType::F64,
        DType::F32 => FloatDType::F32,
        DType::Flex32 => FloatDType::Flex32,
        DType::F16 => FloatDType::F16,
        DType::BF16 => FloatDType::BF16,
        other => panic!("a float tensor has the type {other:?}"),
    }
}

/// [`LinearKernels::linear_forward`] on tensors: `x [tokens, in]`, `weight [out, in]` → `[tokens, out]`.
///
/// # Panics
/// If the inner dimensions differ.
pub fn linear<B: LinearKernels>(x: Tensor<B, 2>, weight: Tensor<B, 2>, compute: Compute) -> Tensor<B, 2> {
    let ([_, features], [out, inner]) = (x.dims(), weight.dims());
    assert_eq!(features, inner, "activations have {features} features, the weight [{out}, {inner}] takes {inner}");
    let y = B::linear_forward(x.into_primitive().tensor(), weight.into_primitive().tensor(), compute);
    tensor(y)
}

/// `x + y` on tensors: see [`LinearKernels::add`].
///
/// # Panics
/// If the shapes differ.
pub fn add<B: LinearKernels, const D: usize>(x: Tensor<B, D>, y: Tensor<B, D>) -> Tensor<B, D> {
    assert_eq!(x.dims(), y.dims(), "what is added has the same shape");
    tensor(B::add(x.into_primitive().tensor(), y.into_primitive().tensor()))
}

/// A gradient with what others found of it.
fn added<B: LinearKernels>(gradient: FloatTensor<B>, found: Option<FloatTensor<B>>) -> FloatTensor<B> {
    match found {
        Some(found) => B::add(gradient, found),
        None => gradient,
    }
}

/// The tensor of a primitive.
pub(crate) fn tensor<B: Backend, const D: usize>(primitive: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}
