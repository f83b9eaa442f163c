//! DoRA: trains the magnitude of a weight separately from its direction (Liu et al., 2024, arXiv:2402.09353).

use super::Lora;
use crate::param;
use burn::{
    module::{Module, Param},
    tensor::{DType, Tensor, s},
};
use burn_peft_kernels::{LinearKernels, MatmulPrecision, WeightMatrix, linear};

/// The magnitude `m` of DoRA. The layer's weight becomes `m·(W + s·B·A) / ‖W + s·B·A‖`, row by row. The norm is treated
/// as a constant in the backward pass.
#[derive(Module, Debug)]
pub struct Dora<B: LinearKernels> {
    /// The magnitude `m [out]`, PEFT's `lora_magnitude_vector`.
    pub magnitude: Param<Tensor<B, 1>>,
    /// `m / ‖W + s·B·A‖` at the time of merging, if the adapter is merged.
    pub(super) merged_scale: Option<Tensor<B, 1>>,
}

impl<B: LinearKernels> Dora<B> {
    /// Creates the trainable parameter from the given magnitude `[out]`.
    pub(crate) fn new(path: &str, name: &str, magnitude: Tensor<B, 1>) -> Self {
        let id = param::id(&format!("{path}.lora_magnitude_vector.{name}.weight"));
        Self { magnitude: Param::initialized(id, magnitude.detach().require_grad()), merged_scale: None }
    }

    /// Computes `m / ‖W + s·B·A‖ [out]`, the factors of the rows of `W + s·B·A`.
    pub(super) fn mag_norm_scale(&self, lora: &Lora<B>, weight: &WeightMatrix<B>) -> Tensor<B, 1> {
        self.magnitude.val() / weight_norm(lora, weight)
    }
}

/// The number of a weight's values that are converted to f32 at a time.
const TILE: usize = 1 << 20;

/// Computes the row norms `‖W + s·B·A‖ [out]` without forming the sum, a few rows at a time, from
/// `‖w‖² + 2s·b·(A·w) + s²·b·(A·Aᵀ)·b` for the rows `w` of `W` and `b` of `B`.
pub(crate) fn weight_norm<B: LinearKernels>(lora: &Lora<B>, weight: &WeightMatrix<B>) -> Tensor<B, 1> {
    let (a, b) = (lora.lora_a.val().detach(), lora.lora_b.val().detach());
    let own = a.clone().matmul(a.clone().transpose()) * lora.scaling.powi(2);
    let [out, features] = weight.shape();
    let rows = (TILE / features.max(1)).max(1);
    let tile = |from: usize| {
        let range = from..out.min(from + rows);
        // A detached leaf still requires a gradient, which a weight in half precision cannot have.
        let weight = weight.rows(range.clone()).detach().set_require_grad(false);
        let b = b.clone().slice(s![range, ..]);
        let across = linear(a.clone(), weight.clone(), MatmulPrecision::F32).transpose() * (2.0 * lora.scaling);
        let weight = weight.cast(DType::F32);
        let square = (weight.clone() * weight).sum_dim(1) + ((across + b.clone().matmul(own.clone())) * b).sum_dim(1);
        // Rounding may make the square of a vanishing row slightly negative.
        square.clamp_min(0.0).sqrt().squeeze_dim::<1>(1)
    };
    Tensor::cat((0..out).step_by(rows).map(tile).collect(), 0).detach()
}
