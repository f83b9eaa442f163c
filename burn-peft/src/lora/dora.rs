//! The magnitude of a weight, learned apart from its direction (Liu et al., 2024, arXiv:2402.09353).

use super::Lora;
use crate::{
    kernel,
    kernel::{Compute, LinearKernels, Stored},
    param,
};
use burn::{
    module::{Module, Param},
    tensor::{DType, Tensor, s},
};

/// The layer's weight becomes `m·(W + s·B·A) / ‖W + s·B·A‖`, row by row. The norm is a constant to the gradient.
#[derive(Module, Debug)]
pub struct Dora<B: LinearKernels> {
    /// `m [out]`, PEFT's `lora_magnitude_vector`.
    pub magnitude: Param<Tensor<B, 1>>,
    /// `m / ‖W + s·B·A‖` at the time of merging, while merged.
    pub(super) merged: Option<Tensor<B, 1>>,
}

impl<B: LinearKernels> Dora<B> {
    /// With the given magnitude `[out]`.
    pub(crate) fn new(path: &str, name: &str, magnitude: Tensor<B, 1>) -> Self {
        let id = param::id(&format!("{path}.lora_magnitude_vector.{name}.weight"));
        Self { magnitude: Param::initialized(id, magnitude.detach().require_grad()), merged: None }
    }

    /// What the rows of the sum are multiplied by: `m / ‖W + s·B·A‖ [out]`.
    pub(super) fn factor(&self, lora: &Lora<B>, weight: &Stored<B>) -> Tensor<B, 1> {
        self.magnitude.val() / norm(lora, weight)
    }
}

/// The number of a weight's values that are widened at a time.
const TILE: usize = 1 << 20;

/// `‖W + s·B·A‖ [out]`, without forming the sum: `‖w‖² + 2s·b·(A·w) + s²·b·(A·Aᵀ)·b` for every row, a few rows at a time.
pub(crate) fn norm<B: LinearKernels>(lora: &Lora<B>, weight: &Stored<B>) -> Tensor<B, 1> {
    let (a, b) = (lora.lora_a.val().detach(), lora.lora_b.val().detach());
    let own = a.clone().matmul(a.clone().transpose()) * lora.scaling.powi(2);
    let [out, features] = weight.shape();
    let rows = (TILE / features.max(1)).max(1);
    let tile = |from: usize| {
        let range = from..out.min(from + rows);
        // A detached leaf still asks for a gradient, which a weight in half precision cannot have.
        let weight = weight.rows(range.clone()).detach().set_require_grad(false);
        let b = b.clone().slice(s![range, ..]);
        let across = kernel::linear(a.clone(), weight.clone(), Compute::F32).transpose() * (2.0 * lora.scaling);
        let weight = weight.cast(DType::F32);
        let square = (weight.clone() * weight).sum_dim(1) + ((across + b.clone().matmul(own.clone())) * b).sum_dim(1);
        // Rounding may leave a row that vanishes a little below zero.
        square.clamp_min(0.0).sqrt().squeeze_dim::<1>(1)
    };
    Tensor::cat((0..out).step_by(rows).map(tile).collect(), 0).detach()
}
