//! The optimizer's type and parameters, with DeepSpeed's defaults.

use serde_json::{Map, Value};

/// Adam's parameters.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Adam {
    /// The learning rate, where no scheduler says another.
    pub lr: f64,
    /// The decay of the first and the second moment.
    pub betas: (f64, f64),
    /// What is added to the root of the second moment.
    pub eps: f64,
    /// The weight decay.
    pub weight_decay: f64,
}

impl Default for Adam {
    fn default() -> Self {
        Self { lr: 1e-3, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0 }
    }
}

/// Lamb's parameters.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Lamb {
    /// The learning rate, where no scheduler says another.
    pub lr: f64,
    /// The decay of the first and the second moment.
    pub betas: (f64, f64),
    /// What is added to the root of the second moment.
    pub eps: f64,
    /// The weight decay.
    pub weight_decay: f64,
    /// The largest trust ratio.
    pub max_coeff: f64,
    /// The smallest trust ratio.
    pub min_coeff: f64,
}

impl Default for Lamb {
    fn default() -> Self {
        let Adam { lr, betas, eps, weight_decay } = Adam::default();
        Self { lr, betas, eps, weight_decay, max_coeff: 10.0, min_coeff: 0.01 }
    }
}

/// Lion's parameters.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Lion {
    /// The learning rate, where no scheduler says another.
    pub lr: f64,
    /// The shares of the old momentum in the update and in the new momentum.
    pub betas: (f64, f64),
    /// The decoupled weight decay.
    pub weight_decay: f64,
}

impl Default for Lion {
    fn default() -> Self {
        Self { lr: 1e-3, betas: (0.9, 0.999), weight_decay: 0.0 }
    }
}

/// The parameters of stochastic gradient descent.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Sgd {
    /// The learning rate, where no scheduler says another.
    pub lr: f64,
    /// The share of the old momentum in the new one.
    pub momentum: f64,
    /// The weight decay, added to the gradient.
    pub weight_decay: f64,
    /// Whether the momentum is taken one step ahead.
    pub nesterov: bool,
}

impl Default for Sgd {
    fn default() -> Self {
        Self { lr: 1e-3, momentum: 0.0, weight_decay: 0.0, nesterov: false }
    }
}

/// `optimizer`.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "type", content = "params")]
pub enum Optimizer {
    /// Adam with decoupled weight decay: the type AdamW, or Adam with its default `adam_w_mode`.
    AdamW(Adam),
    /// Adam with weight decay added to the gradient: the type Adam with `adam_w_mode: false`.
    Adam(Adam),
    /// Lamb.
    Lamb(Lamb),
    /// Lion.
    Lion(Lion),
    /// Stochastic gradient descent.
    #[serde(rename = "SGD")]
    Sgd(Sgd),
}

impl Optimizer {
    /// The learning rate, where no scheduler says another.
    pub fn learning_rate(&self) -> f64 {
        match self {
            Self::AdamW(adam) | Self::Adam(adam) => adam.lr,
            Self::Lamb(lamb) => lamb.lr,
            Self::Lion(lion) => lion.lr,
            Self::Sgd(sgd) => sgd.lr,
        }
    }
}

/// Whether the block as it stands asks for torch's optimizer.
pub(super) fn asks_for_torch(root: &Map<String, Value>) -> bool {
    let params = root.get("optimizer").and_then(|optimizer| optimizer.get("params"));
    params.and_then(|params| params.get("torch_adam")).is_some_and(|flag| *flag == true)
}

/// Says by its type what `adam_w_mode` says, and fills what torch has another default for.
pub(super) fn settle(optimizer: &mut Map<String, Value>, torch: bool) {
    let adam_w = optimizer.get("type").is_some_and(|name| name == "AdamW");
    let adam = optimizer.get("type").is_some_and(|name| name == "Adam");
    let Some(Value::Object(params)) = optimizer.get_mut("params") else {
        return;
    };
    let mode = params.shift_remove("adam_w_mode");
    let decoupled = adam_w || adam && mode != Some(Value::Bool(false));
    if decoupled && torch {
        // torch.optim.AdamW decays by default, DeepSpeed's does not.
        params.entry("weight_decay").or_insert_with(|| 0.01.into());
    }
    if decoupled {
        optimizer.insert("type".to_owned(), "AdamW".into());
    }
}

/// The other way round, for writing.
pub(super) fn unsettle(optimizer: &mut Map<String, Value>) {
    if optimizer.get("type").is_some_and(|name| name == "Adam")
        && let Some(Value::Object(params)) = optimizer.get_mut("params")
    {
        params.insert("adam_w_mode".to_owned(), false.into());
    }
}
