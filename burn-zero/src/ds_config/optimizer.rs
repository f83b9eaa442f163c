//! The optimizer's type and parameters, with DeepSpeed's defaults.

use crate::optimizer::{AdamW, Lamb, Lion, Optimizer, Sgd};
use serde_json::{Map, Value};

/// The parameters of Adam and AdamW.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct AdamParams {
    /// The learning rate, unless a scheduler sets it.
    pub lr: f64,
    /// The decay rates of the first and the second moment.
    pub betas: (f64, f64),
    /// The constant that is added to the root of the second moment.
    pub eps: f64,
    /// The weight decay.
    pub weight_decay: f64,
}

impl Default for AdamParams {
    fn default() -> Self {
        Self { lr: 1e-3, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0 }
    }
}

/// The parameters of LAMB.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct LambParams {
    /// The learning rate, unless a scheduler sets it.
    pub lr: f64,
    /// The decay rates of the first and the second moment.
    pub betas: (f64, f64),
    /// The constant that is added to the root of the second moment.
    pub eps: f64,
    /// The weight decay.
    pub weight_decay: f64,
    /// The largest trust ratio.
    pub max_coeff: f64,
    /// The smallest trust ratio.
    pub min_coeff: f64,
}

impl Default for LambParams {
    fn default() -> Self {
        let AdamParams { lr, betas, eps, weight_decay } = AdamParams::default();
        Self { lr, betas, eps, weight_decay, max_coeff: 10.0, min_coeff: 0.01 }
    }
}

/// The parameters of Lion.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct LionParams {
    /// The learning rate, unless a scheduler sets it.
    pub lr: f64,
    /// The weights of the old momentum in the update and in the new momentum.
    pub betas: (f64, f64),
    /// The decoupled weight decay.
    pub weight_decay: f64,
}

impl Default for LionParams {
    fn default() -> Self {
        Self { lr: 1e-3, betas: (0.9, 0.999), weight_decay: 0.0 }
    }
}

/// The parameters of stochastic gradient descent.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct SgdParams {
    /// The learning rate, unless a scheduler sets it.
    pub lr: f64,
    /// The weight of the old momentum in the new one.
    pub momentum: f64,
    /// The weight decay, added to the gradient.
    pub weight_decay: f64,
    /// True for Nesterov momentum.
    pub nesterov: bool,
}

impl Default for SgdParams {
    fn default() -> Self {
        Self { lr: 1e-3, momentum: 0.0, weight_decay: 0.0, nesterov: false }
    }
}

/// The `optimizer` block.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "type", content = "params")]
pub enum OptimizerConfig {
    /// Adam with decoupled weight decay: the type AdamW, or Adam with its default `adam_w_mode`.
    AdamW(AdamParams),
    /// Adam with the weight decay added to the gradient: the type Adam with `adam_w_mode: false`.
    Adam(AdamParams),
    /// LAMB.
    Lamb(LambParams),
    /// Lion.
    Lion(LionParams),
    /// Stochastic gradient descent.
    #[serde(rename = "SGD")]
    Sgd(SgdParams),
}

impl OptimizerConfig {
    /// Returns the learning rate, which holds unless a scheduler sets it.
    pub fn learning_rate(&self) -> f64 {
        match self {
            Self::AdamW(adam) | Self::Adam(adam) => adam.lr,
            Self::Lamb(lamb) => lamb.lr,
            Self::Lion(lion) => lion.lr,
            Self::Sgd(sgd) => sgd.lr,
        }
    }
}

impl From<OptimizerConfig> for Optimizer {
    fn from(optimizer: OptimizerConfig) -> Self {
        let adam = |adam: AdamParams| AdamW { betas: adam.betas, epsilon: adam.eps, weight_decay: adam.weight_decay };
        match optimizer {
            OptimizerConfig::AdamW(settings) => Self::AdamW(adam(settings)),
            OptimizerConfig::Adam(settings) => Self::Adam(adam(settings)),
            OptimizerConfig::Lamb(lamb) => Self::Lamb(Lamb {
                betas: lamb.betas,
                epsilon: lamb.eps,
                weight_decay: lamb.weight_decay,
                min_coeff: lamb.min_coeff,
                max_coeff: lamb.max_coeff,
            }),
            OptimizerConfig::Lion(lion) => Self::Lion(Lion { betas: lion.betas, weight_decay: lion.weight_decay }),
            OptimizerConfig::Sgd(sgd) => {
                Self::Sgd(Sgd { momentum: sgd.momentum, weight_decay: sgd.weight_decay, nesterov: sgd.nesterov })
            }
        }
    }
}

/// Returns true if the optimizer block of the file asks for torch's optimizer (`torch_adam`).
pub(super) fn is_torch_adam(root: &Map<String, Value>) -> bool {
    let params = root.get("optimizer").and_then(|optimizer| optimizer.get("params"));
    params.and_then(|params| params.get("torch_adam")).is_some_and(|flag| *flag == true)
}

/// Replaces `adam_w_mode` by the type Adam or AdamW, and sets the default weight decay of torch where it differs.
pub(super) fn resolve_adam_w_mode(optimizer: &mut Map<String, Value>, torch: bool) {
    let adam_w = optimizer.get("type").is_some_and(|name| name == "AdamW");
    let adam = optimizer.get("type").is_some_and(|name| name == "Adam");
    let Some(Value::Object(params)) = optimizer.get_mut("params") else {
        return;
    };
    let mode = params.shift_remove("adam_w_mode");
    let decoupled = adam_w || adam && mode != Some(Value::Bool(false));
    if decoupled && torch {
        // torch.optim.AdamW has weight decay by default, DeepSpeed's AdamW has none.
        params.entry("weight_decay").or_insert_with(|| 0.01.into());
    }
    if decoupled {
        optimizer.insert("type".to_owned(), "AdamW".into());
    }
}

/// Replaces the type Adam by `adam_w_mode: false`, the inverse, for writing.
pub(super) fn restore_adam_w_mode(optimizer: &mut Map<String, Value>) {
    if optimizer.get("type").is_some_and(|name| name == "Adam")
        && let Some(Value::Object(params)) = optimizer.get_mut("params")
    {
        params.insert("adam_w_mode".to_owned(), false.into());
    }
}
