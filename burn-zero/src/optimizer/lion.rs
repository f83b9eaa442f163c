//! Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, algorithm 2).

use super::{Hyperparameters, OptimizerState, adamw::to_dtype, scale_gradient};
use crate::segment::DynTensor;
use burn::tensor::{DType, Tensor, backend::Backend};

/// The settings of Lion; the defaults are the paper's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lion {
    /// The weights of the old momentum in the update and in the new momentum. Default: (0.9, 0.99).
    pub betas: (f64, f64),
    /// The decoupled weight decay, per unit of learning rate. Default: 0.
    pub weight_decay: f64,
}

impl Default for Lion {
    fn default() -> Self {
        Self { betas: (0.9, 0.99), weight_decay: 0.0 }
    }
}

impl Lion {
    /// Returns a shard after one update, and its state:
    ///
    /// ```text
    /// p ← p (1 − lr λ) − lr sign(β₁ m + (1 − β₁) g)        m ← β₂ m + (1 − β₂) g
    /// ```
    pub(super) fn update<B: Backend>(
        &self,
        hyperparameters: Hyperparameters,
        parameter: Tensor<B, 1>,
        gradient: Tensor<B, 1>,
        state: Option<OptimizerState<B>>,
    ) -> (Tensor<B, 1>, OptimizerState<B>) {
        let (beta1, beta2) = self.betas;
        let Hyperparameters { lr, weight_decay, grad_scale } = hyperparameters;
        let dtype = parameter.dtype();
        let mut parameter = to_dtype(parameter, DType::F32);
        let gradient = scale_gradient(to_dtype(gradient, DType::F32), grad_scale);
        if weight_decay != 0.0 {
            parameter = parameter.mul_scalar(1.0 - lr * weight_decay);
        }
        let (step, momentum) = match state.map(OptimizerState::into_parts) {
            None => (1, gradient.zeros_like()),
            Some((step, [momentum])) => (step + 1, momentum.tensor::<1>()),
        };
        let direction = momentum.clone().mul_scalar(beta1).add(gradient.clone().mul_scalar(1.0 - beta1)).sign();
        let momentum = momentum.mul_scalar(beta2).add(gradient.mul_scalar(1.0 - beta2));
        parameter = parameter.sub(direction.mul_scalar(lr));
        (to_dtype(parameter, dtype), OptimizerState { step, slots: vec![DynTensor::new(momentum)] })
    }
}
