//! Optimizers and parameter groups.
//!
//! All optimizers work on flat parameter shards, so a rank can own any part of a model. All but LAMB are element-wise;
//! LAMB needs two norms per tensor, which the engine sums over the ranks.

mod adamw;
pub mod cpu_adam;
mod eight_bit;
mod group;
mod kind;
mod lamb;
mod lion;
mod sgd;

pub(crate) use adamw::AdamVariant;
pub use adamw::{AdamW, Moments};
pub(crate) use eight_bit::{EightBitMoments, MIN_8BIT_SIZE};
pub use group::{NamedLrScale, ParamGroups, no_decay};
pub use kind::OptimizerKind;
pub use lamb::Lamb;
pub use lion::Lion;
pub use sgd::Sgd;

use crate::{ConfigError, backend, bucket, segment::DynTensor};
use burn::tensor::{Tensor, backend::Backend};

/// An optimizer with its settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Optimizer {
    /// Adam with decoupled weight decay.
    AdamW(AdamW),
    /// Adam with weight decay added to the gradient.
    Adam(AdamW),
    /// AdamW with 8-bit moments in host memory (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022).
    /// Parameters of fewer than 4096 values keep 32-bit moments, as in bitsandbytes.
    AdamW8bit(AdamW),
    /// LAMB.
    Lamb(Lamb),
    /// Lion.
    Lion(Lion),
    /// Stochastic gradient descent.
    Sgd(Sgd),
}

impl From<AdamW> for Optimizer {
    fn from(settings: AdamW) -> Self {
        Self::AdamW(settings)
    }
}

/// The hyperparameters of one update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hyperparameters {
    pub lr: f64,
    pub weight_decay: f64,
    /// The factor applied to gradients: clipping, and the inverse of the loss scale.
    pub grad_scale: f64,
}

/// The optimizer state of a shard, on the device.
#[derive(Debug, Clone)]
pub(crate) struct OptimizerState<B: Backend> {
    /// The number of updates so far.
    pub step: usize,
    /// Flat f32 tensors, in the order of [`Optimizer::slot_names`].
    pub slots: Vec<DynTensor<B>>,
}

impl<B: Backend> OptimizerState<B> {
    /// Returns the number of updates and the tensors.
    fn into_parts<const N: usize>(self) -> (usize, [DynTensor<B>; N]) {
        let found = self.slots.len();
        let slots = self.slots.try_into().unwrap_or_else(|_| panic!("expected a state of {N} tensors, found {found}"));
        (self.step, slots)
    }
}

impl Optimizer {
    /// Checks the settings.
    ///
    /// # Errors
    /// Returns [`ConfigError::InvalidValue`] for a beta or momentum outside [0, 1), and for a negative or non-finite
    /// value.
    pub fn check(&self) -> Result<(), ConfigError> {
        let adam = |betas, epsilon, weight_decay| AdamW { betas, epsilon, weight_decay }.check();
        match *self {
            Self::AdamW(settings) | Self::Adam(settings) | Self::AdamW8bit(settings) => settings.check(),
            Self::Lamb(lamb) => adam(lamb.betas, lamb.epsilon, lamb.weight_decay),
            Self::Lion(lion) => adam(lion.betas, 0.0, lion.weight_decay),
            Self::Sgd(sgd) => adam((sgd.momentum, 0.0), 0.0, sgd.weight_decay),
        }
    }

    /// Returns the weight decay of the parameters that decay.
    pub fn weight_decay(&self) -> f64 {
        match *self {
            Self::AdamW(settings) | Self::Adam(settings) | Self::AdamW8bit(settings) => settings.weight_decay,
            Self::Lamb(lamb) => lamb.weight_decay,
            Self::Lion(lion) => lion.weight_decay,
            Self::Sgd(sgd) => sgd.weight_decay,
        }
    }

    /// Returns the names of the state tensors of a parameter, as torch calls them.
    pub(crate) fn slot_names(&self) -> &'static [&'static str] {
        match self {
            Self::AdamW(_) | Self::Adam(_) | Self::AdamW8bit(_) | Self::Lamb(_) => &["exp_avg", "exp_avg_sq"],
            Self::Lion(_) => &["exp_avg"],
            Self::Sgd(Sgd { momentum: 0.0, .. }) => &[],
            Self::Sgd(_) => &["momentum_buffer"],
        }
    }

    /// Returns the settings of AdamW and Adam, the optimizers that can run on the host; none for the others.
    pub(crate) fn adam_variant(&self) -> Option<AdamVariant> {
        match *self {
            Self::AdamW(settings) | Self::AdamW8bit(settings) => Some(AdamVariant { settings, decoupled: true }),
            Self::Adam(settings) => Some(AdamVariant { settings, decoupled: false }),
            _ => None,
        }
    }

    /// Returns a flat f32 shard after one update, and its new state.
    ///
    /// # Panics
    /// Panics for LAMB, which needs the norms of full tensors, and for AdamW with 8-bit states, which are on the host.
    pub(crate) fn update<B: Backend>(
        &self,
        hyperparameters: Hyperparameters,
        parameter: Tensor<B, 1>,
        gradient: Tensor<B, 1>,
        state: Option<OptimizerState<B>>,
    ) -> (Tensor<B, 1>, OptimizerState<B>) {
        if let (Some(adam), true) = (self.adam_variant(), backend::has_host_memory::<B>()) {
            return adam_on_host(adam, hyperparameters, parameter, gradient, state);
        }
        match (self, self.adam_variant()) {
            (Self::Lion(lion), _) => lion.update(hyperparameters, parameter, gradient, state),
            (Self::Sgd(sgd), _) => sgd.update(hyperparameters, parameter, gradient, state),
            (Self::AdamW(_) | Self::Adam(_), Some(adam)) => {
                adam_on_device(adam, hyperparameters, parameter, gradient, state)
            }
            _ => panic!("{self:?} does not update single shards on the device"),
        }
    }
}

/// Runs Adam on the device. The tensors are passed by value, so those without another owner are updated in place.
fn adam_on_device<B: Backend>(
    adam: AdamVariant,
    hyperparameters: Hyperparameters,
    parameter: Tensor<B, 1>,
    gradient: Tensor<B, 1>,
    state: Option<OptimizerState<B>>,
) -> (Tensor<B, 1>, OptimizerState<B>) {
    let moments = state.map(|state| {
        let (step, [exp_avg, exp_avg_sq]) = state.into_parts();
        Moments { step, exp_avg, exp_avg_sq }
    });
    let (parameter, moments) = adam.update(hyperparameters, parameter, gradient, moments);
    let Moments { step, exp_avg, exp_avg_sq } = moments;
    (parameter, OptimizerState { step, slots: vec![exp_avg, exp_avg_sq] })
}

/// Runs Adam on the tensors' own host buffers, in one pass.
fn adam_on_host<B: Backend>(
    adam: AdamVariant,
    hyperparameters: Hyperparameters,
    parameter: Tensor<B, 1>,
    gradient: Tensor<B, 1>,
    state: Option<OptimizerState<B>>,
) -> (Tensor<B, 1>, OptimizerState<B>) {
    let (device, n) = (parameter.device(), parameter.dims()[0]);
    let (before, [mut exp_avg, mut exp_avg_sq]) = match state {
        None => (0, [vec![-0.0; n], vec![0.0; n]]),
        Some(state) => {
            let (step, moments) = state.into_parts();
            (step, moments.map(bucket::to_host))
        }
    };
    let step = before + 1;
    let (mut parameter, gradient) =
        (bucket::to_host(DynTensor::new(parameter)), bucket::to_host(DynTensor::new(gradient)));
    let slices = cpu_adam::AdamSlices {
        parameter: &mut parameter,
        gradient: &gradient,
        exp_avg: &mut exp_avg,
        exp_avg_sq: &mut exp_avg_sq,
    };
    cpu_adam::AdamUpdate::new(adam, hyperparameters, step).apply(slices, cpu_adam::HalfCopy::None);
    let slots = [exp_avg, exp_avg_sq].map(|moment| bucket::tensor_from_vec(moment, &device)).into();
    (bucket::tensor_from_vec(parameter, &device).tensor(), OptimizerState { step, slots })
}

/// Multiplies a gradient by the factor for clipping and loss scale.
pub(crate) fn scale_gradient<B: Backend, const D: usize>(gradient: Tensor<B, D>, scale: f64) -> Tensor<B, D> {
    if scale == 1.0 { gradient } else { gradient.mul_scalar(scale) }
}

#[cfg(test)]
mod tests;
