//! Optimizers, and the groups of parameters that they treat alike.
//!
//! All of them work on flat pieces of parameters, so that a rank can own any part of a model. All but LAMB are element-wise; LAMB
//! needs two norms per tensor, which the engine adds up over ranks.

mod adamw;
pub mod cpu_adam;
mod eight_bit;
mod group;
mod lamb;
mod lion;
mod sgd;

pub use adamw::{AdamW, Moments};
pub(crate) use eight_bit::{EightBit, LEAST as LEAST_8BIT};
pub use group::{Group, Groups, no_decay};
pub use lamb::Lamb;
pub use lion::Lion;
pub use sgd::Sgd;

use crate::{Error, bucket, ds_config, segment::Value};
use burn::tensor::{Tensor, backend::Backend};

/// A rule by which parameters are updated, with its settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Optimizer {
    /// Adam with decoupled weight decay.
    AdamW(AdamW),
    /// Adam with weight decay added to the gradient.
    Adam(AdamW),
    /// AdamW whose moments are kept in 8 bits, on the host (Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
    /// 2022). Pieces of fewer than 4096 values keep theirs in 32 bits, as bitsandbytes has it.
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

impl From<ds_config::Optimizer> for Optimizer {
    fn from(optimizer: ds_config::Optimizer) -> Self {
        let adam =
            |adam: ds_config::Adam| AdamW { betas: adam.betas, epsilon: adam.eps, weight_decay: adam.weight_decay };
        match optimizer {
            ds_config::Optimizer::AdamW(settings) => Self::AdamW(adam(settings)),
            ds_config::Optimizer::Adam(settings) => Self::Adam(adam(settings)),
            ds_config::Optimizer::Lamb(lamb) => Self::Lamb(Lamb {
                betas: lamb.betas,
                epsilon: lamb.eps,
                weight_decay: lamb.weight_decay,
                min_coeff: lamb.min_coeff,
                max_coeff: lamb.max_coeff,
            }),
            ds_config::Optimizer::Lion(lion) => Self::Lion(Lion { betas: lion.betas, weight_decay: lion.weight_decay }),
            ds_config::Optimizer::Sgd(sgd) => {
                Self::Sgd(Sgd { momentum: sgd.momentum, weight_decay: sgd.weight_decay, nesterov: sgd.nesterov })
            }
        }
    }
}

/// The rates of one update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rates {
    pub lr: f64,
    pub weight_decay: f64,
    /// What gradients are multiplied by: clipping, and the loss scale undone.
    pub scale: f64,
}

/// What an optimizer remembers of a piece, on the device.
#[derive(Debug, Clone)]
pub(crate) struct State<B: Backend> {
    /// The number of updates so far.
    pub step: usize,
    /// Flat f32 tensors, in the order of [`Optimizer::slots`].
    pub slots: Vec<Value<B>>,
}

impl<B: Backend> State<B> {
    /// The number of updates, and the tensors.
    fn take<const N: usize>(self) -> (usize, [Value<B>; N]) {
        let found = self.slots.len();
        let slots = self.slots.try_into().unwrap_or_else(|_| panic!("expected a state of {N} tensors, found {found}"));
        (self.step, slots)
    }
}

impl Optimizer {
    /// Refuses settings that cannot work.
    ///
    /// # Errors
    /// [`Error::Setting`] for a beta or momentum outside [0, 1), or something negative or not finite.
    pub fn check(&self) -> Result<(), Error> {
        let adam = |betas, epsilon, weight_decay| AdamW { betas, epsilon, weight_decay }.check();
        match *self {
            Self::AdamW(settings) | Self::Adam(settings) | Self::AdamW8bit(settings) => settings.check(),
            Self::Lamb(lamb) => adam(lamb.betas, lamb.epsilon, lamb.weight_decay),
            Self::Lion(lion) => adam(lion.betas, 0.0, lion.weight_decay),
            Self::Sgd(sgd) => adam((sgd.momentum, 0.0), 0.0, sgd.weight_decay),
        }
    }

    /// The weight decay of parameters that decay.
    pub fn weight_decay(&self) -> f64 {
        match *self {
            Self::AdamW(settings) | Self::Adam(settings) | Self::AdamW8bit(settings) => settings.weight_decay,
            Self::Lamb(lamb) => lamb.weight_decay,
            Self::Lion(lion) => lion.weight_decay,
            Self::Sgd(sgd) => sgd.weight_decay,
        }
    }

    /// The names of what is remembered of each parameter, torch's.
    pub fn slots(&self) -> &'static [&'static str] {
        match self {
            Self::AdamW(_) | Self::Adam(_) | Self::AdamW8bit(_) | Self::Lamb(_) => &["exp_avg", "exp_avg_sq"],
            Self::Lion(_) => &["exp_avg"],
            Self::Sgd(Sgd { momentum: 0.0, .. }) => &[],
            Self::Sgd(_) => &["momentum_buffer"],
        }
    }

    /// The Adam that the host can compute, and whether its decay is decoupled.
    pub(crate) fn adam(&self) -> Option<(AdamW, bool)> {
        match *self {
            Self::AdamW(settings) | Self::AdamW8bit(settings) => Some((settings, true)),
            Self::Adam(settings) => Some((settings, false)),
            _ => None,
        }
    }

    /// A flat f32 piece after one update, and its state.
    ///
    /// # Panics
    /// For LAMB, which needs the whole tensor's norms, and for 8-bit states, which are on the host.
    pub(crate) fn update<B: Backend>(
        &self,
        rates: Rates,
        parameter: Tensor<B, 1>,
        gradient: Tensor<B, 1>,
        state: Option<State<B>>,
    ) -> (Tensor<B, 1>, State<B>) {
        if let (Some((settings, decoupled)), true) = (self.adam(), on_the_host::<B>()) {
            return adam_in_place((settings, decoupled), rates, (parameter, gradient), state);
        }
        let (pair, gradient) = ((rates.lr, rates.weight_decay), scaled(gradient, rates.scale));
        match self {
            Self::AdamW(settings) => adam(settings, true, pair, (parameter, gradient), state),
            Self::Adam(settings) => adam(settings, false, pair, (parameter, gradient), state),
            Self::Lion(lion) => lion.update(pair, parameter, gradient, state),
            Self::Sgd(sgd) => sgd.update(pair, parameter, gradient, state),
            Self::Lamb(_) | Self::AdamW8bit(_) => panic!("{self:?} is not updated piece by piece on the device"),
        }
    }
}

/// Adam on the device. The tensors are moved along: what no one else holds is updated in place.
fn adam<B: Backend>(
    settings: &AdamW,
    decoupled: bool,
    rates: (f64, f64),
    tensors: (Tensor<B, 1>, Tensor<B, 1>),
    state: Option<State<B>>,
) -> (Tensor<B, 1>, State<B>) {
    let moments = state.map(|state| {
        let (step, [exp_avg, exp_avg_sq]) = state.take();
        Moments { step, exp_avg, exp_avg_sq }
    });
    let (parameter, moments) = settings.update_with(decoupled, rates, tensors, moments);
    let Moments { step, exp_avg, exp_avg_sq } = moments;
    (parameter, State { step, slots: vec![exp_avg, exp_avg_sq] })
}

/// Whether the device's memory is this process's own.
fn on_the_host<B: Backend>() -> bool {
    #[cfg(feature = "flex")]
    return std::any::TypeId::of::<B>() == std::any::TypeId::of::<burn::backend::Flex>();
    #[cfg(not(feature = "flex"))]
    false
}

/// Adam on the tensors' own buffers, in one pass.
fn adam_in_place<B: Backend>(
    (settings, decoupled): (AdamW, bool),
    Rates { lr, weight_decay, scale }: Rates,
    (parameter, gradient): (Tensor<B, 1>, Tensor<B, 1>),
    state: Option<State<B>>,
) -> (Tensor<B, 1>, State<B>) {
    let (device, n) = (parameter.device(), parameter.dims()[0]);
    let (before, [mut exp_avg, mut exp_avg_sq]) = match state {
        None => (0, [vec![-0.0; n], vec![0.0; n]]),
        Some(state) => {
            let (step, moments) = state.take();
            (step, moments.map(bucket::to_host))
        }
    };
    let step = before + 1;
    let (mut parameter, gradient) = (bucket::to_host(Value::new(parameter)), bucket::to_host(Value::new(gradient)));
    let slices = cpu_adam::Slices {
        parameter: &mut parameter,
        gradient: &gradient,
        exp_avg: &mut exp_avg,
        exp_avg_sq: &mut exp_avg_sq,
    };
    cpu_adam::Update { settings, decoupled, lr, weight_decay, scale, step }.apply(slices, cpu_adam::Copy::None);
    let slots = [exp_avg, exp_avg_sq].map(|moment| bucket::from_vec(moment, &device)).into();
    (bucket::from_vec(parameter, &device).tensor(), State { step, slots })
}

/// A gradient as it is clipped.
pub(crate) fn scaled<B: Backend>(gradient: Tensor<B, 1>, scale: f64) -> Tensor<B, 1> {
    if scale == 1.0 { gradient } else { gradient.mul_scalar(scale) }
}

#[cfg(test)]
mod tests;
