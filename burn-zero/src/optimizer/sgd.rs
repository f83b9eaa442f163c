//! Stochastic gradient descent with momentum, as `torch.optim.SGD` computes it.

use super::{Hyperparameters, OptimizerState, adamw::to_dtype, scale_gradient};
use crate::segment::DynTensor;
use burn::tensor::{DType, Tensor, backend::Backend};

/// The settings of SGD; the defaults are torch's.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sgd {
    /// The factor of the old momentum in the new one. Default: 0.
    pub momentum: f64,
    /// The weight decay, added to the gradient. Default: 0.
    pub weight_decay: f64,
    /// True for Nesterov momentum. Default: false.
    pub nesterov: bool,
}

impl Sgd {
    /// Returns a shard after one update, and its state:
    ///
    /// ```text
    /// g ← g + λ p        b ← μ b + g (at first g)        p ← p − lr (g + μ b if nesterov, else b)
    /// ```
    pub(super) fn update<B: Backend>(
        &self,
        hyperparameters: Hyperparameters,
        parameter: Tensor<B, 1>,
        gradient: Tensor<B, 1>,
        state: Option<OptimizerState<B>>,
    ) -> (Tensor<B, 1>, OptimizerState<B>) {
        let Hyperparameters { lr, weight_decay, grad_scale } = hyperparameters;
        let (dtype, parameter) = (parameter.dtype(), to_dtype(parameter, DType::F32));
        let mut gradient = scale_gradient(to_dtype(gradient, DType::F32), grad_scale);
        if weight_decay != 0.0 {
            gradient = gradient.add(parameter.clone().mul_scalar(weight_decay));
        }
        if self.momentum == 0.0 {
            let step = state.map_or(1, |state| state.step + 1);
            return (
                to_dtype(parameter.sub(gradient.mul_scalar(lr)), dtype),
                OptimizerState { step, slots: Vec::new() },
            );
        }
        let (step, buffer) = match state.map(OptimizerState::into_parts) {
            None => (1, gradient.clone()),
            Some((step, [buffer])) => (step + 1, buffer.tensor::<1>().mul_scalar(self.momentum).add(gradient.clone())),
        };
        let direction =
            if self.nesterov { gradient.add(buffer.clone().mul_scalar(self.momentum)) } else { buffer.clone() };
        let parameter = parameter.sub(direction.mul_scalar(lr));
        (to_dtype(parameter, dtype), OptimizerState { step, slots: vec![DynTensor::new(buffer)] })
    }
}
