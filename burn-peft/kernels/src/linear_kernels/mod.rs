//! Matrix products of a linear layer, as an extension trait of Burn's backends.
//!
//! The default bodies are tensor operations and serve every backend; a backend that can do better overrides them. The
//! implementation for [`Autodiff`](burn::backend::Autodiff) has a hand-written backward pass: a frozen weight costs no
//! product and saves no activation, and a weight stored in half precision or packed is converted to f32 only while a
//! product uses it.

mod autodiff;
mod backends;
mod deferred;
pub(crate) mod portable;
pub(crate) mod portable_packed;
mod weight_matrix;

pub use autodiff::take_accumulated_gradient;
pub use deferred::{DeferredWeightGradient, defer_weight_gradients};
pub use portable::matmul;
pub use weight_matrix::WeightMatrix;

use crate::{MatmulPrecision, PackedWeight};
use burn::{
    module::{Param, ParamId},
    tensor::{DType, FloatDType, Slice, Tensor, TensorMetadata, TensorPrimitive, backend::Backend, ops::FloatTensor},
};

/// Matrix products with a weight `[out, in]` that may be stored in another type than the activations.
pub trait LinearKernels: Backend {
    /// Returns `y = x·Wᵀ`: `x [tokens, in]`, `weight [out, in]` in f32, f16 or bf16; `y [tokens, out]` in the type of
    /// `x`. If the weight is a parameter, `_weight_id` is its id, by which
    /// [`defer_weight_gradients`] can put off its gradient.
    fn linear_forward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        _weight_id: Option<ParamId>,
        precision: MatmulPrecision,
    ) -> FloatTensor<Self> {
        portable::forward::<Self>(x, weight, precision)
    }

    /// Returns the gradient of `x`, `dx = dy·W`, with `dy [tokens, out]` and `weight [out, in]`. It is added to
    /// `accumulate_into`, the gradient accumulated so far, in place if no other tensor shares that buffer.
    fn linear_backward_input(
        dy: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        accumulate_into: Option<FloatTensor<Self>>,
        precision: MatmulPrecision,
    ) -> FloatTensor<Self> {
        add_accumulated::<Self>(portable::backward_input::<Self>(dy, weight, precision), accumulate_into)
    }

    /// Returns the gradient of the weight: `dW = dyᵀ·x`, `[out, in]`, in the type of `x`.
    fn linear_backward_weight(
        x: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        precision: MatmulPrecision,
    ) -> FloatTensor<Self> {
        portable::backward_weight::<Self>(x, dy, precision)
    }

    /// Decodes packed rows to f32, `[out, in]`.
    fn unpack(weight: &PackedWeight<Self>) -> FloatTensor<Self> {
        portable_packed::unpack(weight)
    }

    /// Does what [`LinearKernels::linear_forward`] does with a packed weight, which is decoded tile by tile.
    fn packed_forward(
        x: FloatTensor<Self>,
        weight: &PackedWeight<Self>,
        precision: MatmulPrecision,
    ) -> FloatTensor<Self> {
        portable_packed::forward(x, weight, precision)
    }

    /// Does what [`LinearKernels::linear_backward_input`] does with a packed weight, which is decoded tile by tile.
    fn packed_backward_input(
        dy: FloatTensor<Self>,
        weight: &PackedWeight<Self>,
        accumulate_into: Option<FloatTensor<Self>>,
        precision: MatmulPrecision,
    ) -> FloatTensor<Self> {
        add_accumulated::<Self>(portable_packed::backward_input(dy, weight, precision), accumulate_into)
    }

    /// Returns `x + y`, of the same shape and type; in place of `x` if no other tensor shares its buffer.
    fn add(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_add(x, y)
    }

    /// Runs `work`, a long sequence of operations such as a training step, with the backend's worker threads kept
    /// ready. On Flex the idle threads of rayon's pool spin instead of sleeping meanwhile. A nested call has no effect.
    fn with_spinning_pool<R>(work: impl FnOnce() -> R) -> R {
        work()
    }

    /// Writes `values` into `target`, of the same shape and type; in place if no other tensor shares its buffer.
    fn overwrite(target: FloatTensor<Self>, values: FloatTensor<Self>) -> FloatTensor<Self> {
        let all: Vec<Slice> = target.shape().iter().map(|&n| Slice::from(0..n)).collect();
        Self::float_slice_assign(target, &all, values)
    }
}

/// Returns the float type of a tensor as a [`FloatDType`].
pub(crate) fn float_dtype(dtype: DType) -> FloatDType {
    match dtype {
        DType::F64 => FloatDType::F64,
        DType::F32 => FloatDType::F32,
        DType::Flex32 => FloatDType::Flex32,
        DType::F16 => FloatDType::F16,
        DType::BF16 => FloatDType::BF16,
        other => panic!("a float tensor has the type {other:?}"),
    }
}

/// Calls [`LinearKernels::linear_forward`] on tensors: `x [tokens, in]`, `weight [out, in]` → `[tokens, out]`.
///
/// # Panics
/// If the inner dimensions differ.
pub fn linear<B: LinearKernels>(x: Tensor<B, 2>, weight: Tensor<B, 2>, precision: MatmulPrecision) -> Tensor<B, 2> {
    multiply(x, weight, None, precision)
}

/// Computes [`linear`] with a parameter, whose gradient [`defer_weight_gradients`] can put off.
///
/// # Panics
/// If the inner dimensions differ.
pub fn linear_param<B: LinearKernels>(
    x: Tensor<B, 2>,
    weight: &Param<Tensor<B, 2>>,
    precision: MatmulPrecision,
) -> Tensor<B, 2> {
    multiply(x, weight.val(), Some(weight.id), precision)
}

fn multiply<B: LinearKernels>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    weight_id: Option<ParamId>,
    precision: MatmulPrecision,
) -> Tensor<B, 2> {
    let ([_, features], [out, inner]) = (x.dims(), weight.dims());
    assert_eq!(features, inner, "activations have {features} features, the weight [{out}, {inner}] takes {inner}");
    tensor(B::linear_forward(x.into_primitive().tensor(), weight.into_primitive().tensor(), weight_id, precision))
}

/// Calls [`LinearKernels::add`] on tensors: `x + y`.
///
/// # Panics
/// If the shapes differ.
pub fn add<B: LinearKernels, const D: usize>(x: Tensor<B, D>, y: Tensor<B, D>) -> Tensor<B, D> {
    assert_eq!(x.dims(), y.dims(), "both summands must have the same shape");
    tensor(B::add(x.into_primitive().tensor(), y.into_primitive().tensor()))
}

impl<B: LinearKernels> PackedWeight<B> {
    /// Decodes the weight to f32 `[out, in]`, for temporary use.
    pub fn values(&self) -> Tensor<B, 2> {
        tensor(B::unpack(self))
    }

    /// Computes `x·Wᵀ`: `x [tokens, in]` → `[tokens, out]`.
    ///
    /// # Panics
    /// If the inner dimensions differ.
    pub fn linear(&self, x: Tensor<B, 2>, precision: MatmulPrecision) -> Tensor<B, 2> {
        let (features, [out, inner]) = (x.dims()[1], self.shape());
        assert_eq!(features, inner, "activations have {features} features, the weight [{out}, {inner}] takes {inner}");
        tensor(B::packed_forward(x.into_primitive().tensor(), self, precision))
    }
}

/// Adds a gradient to the gradient accumulated so far, if there is one.
pub(crate) fn add_accumulated<B: LinearKernels>(
    gradient: FloatTensor<B>,
    accumulate_into: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    match accumulate_into {
        Some(found) => B::add(gradient, found),
        None => gradient,
    }
}

/// Wraps a primitive as a tensor.
fn tensor<B: Backend, const D: usize>(primitive: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}
