//! LAMB (You et al., "Large Batch Optimization for Deep Learning", 2020, algorithm 2), with DeepSpeed's bounds on the
//! trust ratio.

use super::{OptimizerState, adamw::to_dtype};
use crate::segment::DynTensor;
use burn::tensor::{DType, Tensor, backend::Backend};

/// The settings of LAMB; the defaults are DeepSpeed's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lamb {
    /// The decay rates of the running means of gradients and of their squares. Default: (0.9, 0.999).
    pub betas: (f64, f64),
    /// The number added to the denominator. Default: 1e-8.
    pub epsilon: f64,
    /// The weight decay, which is part of the update direction. Default: 0.
    pub weight_decay: f64,
    /// The smallest trust ratio. Default: 0.01.
    pub min_coeff: f64,
    /// The largest trust ratio. Default: 10.
    pub max_coeff: f64,
}

impl Default for Lamb {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), epsilon: 1e-8, weight_decay: 0.0, min_coeff: 0.01, max_coeff: 10.0 }
    }
}

impl Lamb {
    /// Returns the update direction of a shard, `m̂ / (√v̂ + ε) + λ p` in f32, before it is scaled by the trust ratio
    /// of the full tensor.
    pub(crate) fn direction<B: Backend>(
        &self,
        weight_decay: f64,
        parameter: &Tensor<B, 1>,
        gradient: Tensor<B, 1>,
        state: Option<OptimizerState<B>>,
    ) -> (Tensor<B, 1>, OptimizerState<B>) {
        let (beta1, beta2) = self.betas;
        let gradient = to_dtype(gradient, DType::F32);
        let square = gradient.clone().mul(gradient.clone()).mul_scalar(1.0 - beta2);
        let fresh = gradient.mul_scalar(1.0 - beta1);
        let (step, exp_avg, exp_avg_sq) = match state.map(OptimizerState::into_parts) {
            None => (1, fresh, square),
            Some((step, [exp_avg, exp_avg_sq])) => (
                step + 1,
                exp_avg.tensor::<1>().mul_scalar(beta1).add(fresh),
                exp_avg_sq.tensor::<1>().mul_scalar(beta2).add(square),
            ),
        };
        let (correction1, correction2) = (1.0 - beta1.powi(step as i32), 1.0 - beta2.powi(step as i32));
        let root = exp_avg_sq.clone().div_scalar(correction2).sqrt().add_scalar(self.epsilon);
        let mut direction = exp_avg.clone().div_scalar(correction1).div(root);
        if weight_decay != 0.0 {
            direction = direction.add(to_dtype(parameter.clone(), DType::F32).mul_scalar(weight_decay));
        }
        (direction, OptimizerState { step, slots: vec![DynTensor::new(exp_avg), DynTensor::new(exp_avg_sq)] })
    }

    /// Returns the trust ratio for the norms of a tensor and of its update direction.
    pub(crate) fn trust_ratio(&self, parameter: f64, direction: f64) -> f64 {
        if parameter > 0.0 && direction > 0.0 {
            (parameter / direction).clamp(self.min_coeff, self.max_coeff)
        } else {
            1.0
        }
    }
}
