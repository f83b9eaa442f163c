//! The kinds of optimizers, by name.

use super::{AdamW, Lamb, Lion, Optimizer, Sgd};

/// A kind of optimizer, without its settings. Its textual form is its name in lower case, such as `adamw8bit`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay.
    #[default]
    AdamW,
    /// Adam with weight decay in the gradient.
    Adam,
    /// AdamW with 8-bit moments.
    AdamW8bit,
    /// LAMB.
    Lamb,
    /// Lion.
    Lion,
    /// Stochastic gradient descent.
    Sgd,
}

impl OptimizerKind {
    /// Returns the optimizer of this kind with the settings of AdamW, as far as it has them: the momentum of
    /// [`OptimizerKind::Sgd`] is the first of the betas. Other settings are the defaults.
    pub fn with_settings(self, settings: AdamW) -> Optimizer {
        let AdamW { betas, epsilon, weight_decay } = settings;
        match self {
            Self::AdamW => Optimizer::AdamW(settings),
            Self::Adam => Optimizer::Adam(settings),
            Self::AdamW8bit => Optimizer::AdamW8bit(settings),
            Self::Lamb => Optimizer::Lamb(Lamb { betas, epsilon, weight_decay, ..Lamb::default() }),
            Self::Lion => Optimizer::Lion(Lion { betas, weight_decay }),
            Self::Sgd => Optimizer::Sgd(Sgd { momentum: betas.0, weight_decay, nesterov: false }),
        }
    }
}
