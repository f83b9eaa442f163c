//! AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019), as `torch.optim.AdamW` computes it.

use super::{Hyperparameters, scale_gradient};
use crate::{ConfigError, segment::DynTensor};
use burn::tensor::{DType, Tensor, backend::Backend};

/// The settings of AdamW; the defaults are `torch.optim.AdamW`'s.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// The decay rates of the running means of gradients and of their squares. Default: (0.9, 0.999).
    pub betas: (f64, f64),
    /// The number added to the denominator. Default: 1e-8.
    pub epsilon: f64,
    /// The decoupled weight decay, per unit of learning rate. Default: 0.01.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), epsilon: 1e-8, weight_decay: 0.01 }
    }
}

/// AdamW's state of one parameter.
#[derive(Debug, Clone)]
pub struct Moments<B: Backend> {
    /// The number of updates so far.
    pub step: usize,
    /// The running mean of gradients, f32, of the parameter's shape.
    pub exp_avg: DynTensor<B>,
    /// The running mean of squared gradients, f32, of the parameter's shape.
    pub exp_avg_sq: DynTensor<B>,
}

impl AdamW {
    /// Checks the settings.
    ///
    /// # Errors
    /// Returns [`ConfigError::InvalidValue`] if a beta lies outside [0, 1), or if `epsilon` or `weight_decay` is
    /// negative or not finite.
    pub fn check(&self) -> Result<(), ConfigError> {
        let refuse = |field: &str, expected: &str, found: f64| {
            Err(ConfigError::invalid_value(field, expected, found.to_string()))
        };
        for beta in [self.betas.0, self.betas.1] {
            if !(0.0..1.0).contains(&beta) {
                return refuse("betas", "values of at least 0 and below 1", beta);
            }
        }
        for (field, value) in [("epsilon", self.epsilon), ("weight_decay", self.weight_decay)] {
            if !(value.is_finite() && value >= 0.0) {
                return refuse(field, "a finite value of at least 0", value);
            }
        }
        Ok(())
    }

    /// Returns the parameter after one update, in its own dtype, and its new moments. `parameter` and `gradient` have
    /// the same shape; `state` is none at the first update. All arithmetic is f32, in the order of torch's
    /// single-tensor implementation:
    ///
    /// ```text
    /// p ← p · (1 − lr · weight_decay)
    /// m ← m + (g − m) · (1 − β₁)        v ← β₂ · v + (1 − β₂) · g · g
    /// p ← p − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
    /// ```
    ///
    /// Tensors without another owner are updated in place if the backend can do so.
    pub fn update<B: Backend, const D: usize>(
        &self,
        lr: f64,
        weight_decay: f64,
        parameter: Tensor<B, D>,
        gradient: Tensor<B, D>,
        state: Option<Moments<B>>,
    ) -> (Tensor<B, D>, Moments<B>) {
        let adam = AdamVariant { settings: *self, decoupled: true };
        adam.update(Hyperparameters { lr, weight_decay, grad_scale: 1.0 }, parameter, gradient, state)
    }
}

/// AdamW or Adam.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdamVariant {
    pub settings: AdamW,
    /// True if weight decay is decoupled (AdamW), false if it is added to the gradient (`torch.optim.Adam`).
    pub decoupled: bool,
}

impl AdamVariant {
    /// Computes [`AdamW::update`] or the update of Adam.
    pub(super) fn update<B: Backend, const D: usize>(
        self,
        hyperparameters: Hyperparameters,
        parameter: Tensor<B, D>,
        gradient: Tensor<B, D>,
        state: Option<Moments<B>>,
    ) -> (Tensor<B, D>, Moments<B>) {
        let AdamW { betas: (beta1, beta2), epsilon, .. } = self.settings;
        let Hyperparameters { lr, weight_decay, grad_scale } = hyperparameters;
        let dtype = parameter.dtype();
        let mut parameter = to_dtype(parameter, DType::F32);
        let mut gradient = scale_gradient(to_dtype(gradient, DType::F32), grad_scale);
        if weight_decay != 0.0 && self.decoupled {
            parameter = parameter.mul_scalar(1.0 - lr * weight_decay);
        } else if weight_decay != 0.0 {
            gradient = gradient.add(parameter.clone().mul_scalar(weight_decay));
        }
        let square = gradient.clone().mul_scalar(1.0 - beta2).mul(gradient.clone());
        let (step, exp_avg, exp_avg_sq) = match state {
            None => (1, gradient.mul_scalar(1.0 - beta1), square),
            Some(Moments { step, exp_avg, exp_avg_sq }) => {
                let exp_avg = exp_avg.tensor::<D>();
                let change = gradient.sub(exp_avg.clone()).mul_scalar(1.0 - beta1);
                (step + 1, exp_avg.add(change), exp_avg_sq.tensor::<D>().mul_scalar(beta2).add(square))
            }
        };
        let correction1 = 1.0 - beta1.powi(step as i32);
        let correction2 = 1.0 - beta2.powi(step as i32);
        let denominator = exp_avg_sq.clone().sqrt().div_scalar(correction2.sqrt()).add_scalar(epsilon);
        parameter = parameter.add(exp_avg.clone().mul_scalar(-lr / correction1).div(denominator));
        let moments = Moments { step, exp_avg: DynTensor::new(exp_avg), exp_avg_sq: DynTensor::new(exp_avg_sq) };
        (to_dtype(parameter, dtype), moments)
    }
}

/// Casts a tensor to a dtype; a tensor that has the dtype already is returned unchanged.
pub(super) fn to_dtype<B: Backend, const D: usize>(tensor: Tensor<B, D>, dtype: DType) -> Tensor<B, D> {
    if tensor.dtype() == dtype { tensor } else { tensor.cast(dtype) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::{backend::Flex, tensor::TensorData};

    /// Computes AdamW in f64 from the formulas of the paper.
    fn reference(settings: &AdamW, lr: f64, p: &mut [f64], gradients: &[Vec<f64>]) {
        let (b1, b2) = settings.betas;
        let (mut m, mut v) = (vec![0.0; p.len()], vec![0.0; p.len()]);
        for (step, gradient) in gradients.iter().enumerate() {
            let t = step as i32 + 1;
            for (i, g) in gradient.iter().enumerate() {
                m[i] = b1 * m[i] + (1.0 - b1) * g;
                v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                let (m, v) = (m[i] / (1.0 - b1.powi(t)), v[i] / (1.0 - b2.powi(t)));
                p[i] -= lr * settings.weight_decay * p[i] + lr * m / (v.sqrt() + settings.epsilon);
            }
        }
    }

    #[test]
    fn ten_updates_equal_a_host_reference() {
        let device = Default::default();
        let table = [
            (AdamW::default(), 1e-3),
            (AdamW { betas: (0.9, 0.95), epsilon: 1e-5, weight_decay: 0.1 }, 2e-2),
            (AdamW { weight_decay: 0.0, ..AdamW::default() }, 1e-1),
        ];
        for (settings, lr) in table {
            // The start values are exact in f32, so that the reference starts from the same numbers.
            let value = |i: usize, k: usize| ((i * 37 + k * 101) as f64).sin() as f32 as f64;
            let start: Vec<f64> = (0..12).map(|i| value(i, 1000) + 2.0).collect();
            let gradients: Vec<Vec<f64>> = (0..10).map(|k| (0..12).map(|i| value(i, k)).collect()).collect();
            let tensor =
                |v: &[f64]| Tensor::<Flex, 2>::from_data(TensorData::new(v.to_vec(), [3, 4]).convert::<f32>(), &device);
            let (mut p, mut state) = (tensor(&start), None);
            for gradient in &gradients {
                let (next, moments) = settings.update(lr, settings.weight_decay, p, tensor(gradient), state);
                (p, state) = (next, Some(moments));
            }
            let mut expected = start;
            reference(&settings, lr, &mut expected, &gradients);
            assert_eq!(state.unwrap().step, 10);
            for (found, expected) in p.into_data().iter::<f64>().zip(expected) {
                assert!((found - expected).abs() <= 1e-6 * expected.abs(), "expected {expected}, found {found}");
            }
        }
    }

    #[test]
    fn impossible_settings_are_refused() {
        assert!(AdamW::default().check().is_ok());
        let table = [
            (AdamW { betas: (1.0, 0.9), ..AdamW::default() }, "betas"),
            (AdamW { betas: (0.9, -0.1), ..AdamW::default() }, "betas"),
            (AdamW { epsilon: f64::NAN, ..AdamW::default() }, "epsilon"),
            (AdamW { weight_decay: -1.0, ..AdamW::default() }, "weight_decay"),
        ];
        for (settings, field) in table {
            assert!(settings.check().unwrap_err().to_string().contains(field));
        }
    }
}
