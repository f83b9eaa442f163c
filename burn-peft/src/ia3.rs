//! IA3: scales features by learned factors (Liu et al., 2022, arXiv:2205.05638).

use crate::{
    Error, Loaded, TargetModules,
    config_file::{KnownFields, parse_fields},
    param,
};
use burn::{
    module::{Module, Param},
    tensor::{DType, Tensor},
};
use burn_peft_kernels::LinearKernels;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{path::Path, sync::Arc};

/// The IA3 factors of one linear layer: they scale its output features, or its input features in a feed-forward layer.
#[derive(Module, Debug)]
pub struct Ia3<B: LinearKernels> {
    /// PEFT's `ia3_l`: `[out, 1]`, or `[1, in]` in a feed-forward layer.
    pub ia3_l: Param<Tensor<B, 2>>,
    /// The adapter's name.
    pub name: String,
    /// The configuration that the adapter was attached or loaded with.
    #[module(skip)]
    pub config: Arc<Ia3Config>,
    /// True if the factors are merged into the layer's weight.
    pub merged: bool,
    /// True if the adapter is active: a forward pass without a route applies it.
    pub active: bool,
}

impl<B: LinearKernels> Ia3<B> {
    /// Creates the factors of the layer at `path`.
    pub(crate) fn new(path: &str, name: &str, config: &Arc<Ia3Config>, factors: Tensor<B, 2>) -> Self {
        let id = param::id(&format!("{path}.ia3_l.{name}"));
        Self {
            ia3_l: Param::initialized(id, factors.require_grad()),
            name: name.to_owned(),
            config: Arc::clone(config),
            merged: false,
            active: true,
        }
    }

    /// Returns true if the factors scale the input features.
    pub fn is_feedforward(&self) -> bool {
        self.ia3_l.lazy_shape()[0] == 1
    }

    /// Scales the features of `x [tokens, features]`.
    pub(crate) fn scale(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let (dtype, features) = (x.dtype(), x.dims()[1]);
        (x.cast(DType::F32) * self.ia3_l.val().reshape([1, features])).cast(dtype)
    }
}

/// PEFT's `adapter_config.json` for IA3.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ia3Config {
    /// The layers that get IA3 factors.
    pub target_modules: TargetModules,
    /// The target modules whose input features are scaled instead of the output features.
    pub feedforward_modules: TargetModules,
    /// Layers that get no factors even if `target_modules` selects them.
    pub exclude_modules: Option<TargetModules>,
    /// If true, the factors are initialized to 1, which changes nothing.
    pub init_ia3_weights: bool,
    /// The name or path of the base model, for information only.
    pub base_model_name_or_path: Option<String>,
}

fn suffixes(names: &[&str]) -> TargetModules {
    TargetModules::Suffixes(names.iter().map(|name| (*name).to_owned()).collect())
}

impl Default for Ia3Config {
    /// Returns PEFT's default for LLaMA.
    fn default() -> Self {
        Self {
            target_modules: suffixes(&["k_proj", "v_proj", "down_proj"]),
            feedforward_modules: suffixes(&["down_proj"]),
            exclude_modules: None,
            init_ia3_weights: true,
            base_model_name_or_path: None,
        }
    }
}

/// Fields that make no difference for a trained adapter.
const IGNORED: [&str; 6] = ["auto_mapping", "inference_mode", "peft_type", "peft_version", "revision", "task_type"];

impl Ia3Config {
    /// Parses the content of `adapter_config.json`.
    ///
    /// # Errors
    /// If the adapter is not IA3 or uses a feature that is not supported.
    pub fn from_json(path: &Path, value: Value) -> Result<Loaded<Self>, Error> {
        let value = parse_fields(path, value, &["IA3"])?;
        let neutral = json!({ "fan_in_fan_out": false, "modules_to_save": null });
        let known = KnownFields { own: &json!(Self::default()), neutral: &neutral, ignored: &IGNORED };
        let unknown_fields = known.unknown(path, &value)?;
        let config =
            serde_json::from_value(value).map_err(|e| Error::format(path, "adapter_config.json", "IA3's fields", e))?;
        Ok(Loaded { value: config, unknown_fields })
    }

    /// Returns the content of `adapter_config.json` as PEFT writes it.
    pub fn to_json(&self) -> Value {
        let mut all = json!(self);
        let fixed = json!({
            "auto_mapping": null, "fan_in_fan_out": false, "inference_mode": true, "modules_to_save": null,
            "peft_type": "IA3", "revision": null, "task_type": "CAUSAL_LM",
        });
        if let (Value::Object(all), Value::Object(fixed)) = (&mut all, fixed) {
            all.extend(fixed);
            all.sort_keys();
        }
        all
    }
}
