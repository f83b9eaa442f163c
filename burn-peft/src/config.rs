//! PEFT's `adapter_config.json` for LoRA.

use crate::{Error, TargetModules};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::path::Path;

/// LoRA's knobs under PEFT's names, with PEFT's defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// The rank.
    pub r: usize,
    /// The adapter's output is scaled by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// The probability with which an input feature is dropped while training.
    pub lora_dropout: f64,
    /// Scale by `lora_alpha / √r` instead (Kalajdzievski, 2023, arXiv:2312.03732).
    pub use_rslora: bool,
    /// The layers that get an adapter.
    #[serde(deserialize_with = "default_if_null")]
    pub target_modules: TargetModules,
    /// The base model, for the record.
    pub base_model_name_or_path: Option<String>,
}

fn default_if_null<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<TargetModules, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: TargetModules::default(),
            base_model_name_or_path: None,
        }
    }
}

/// What PEFT writes and what we can only follow at this value.
fn neutral_fields() -> Map<String, Value> {
    let fields = json!({
        "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "bias": "none", "corda_config": null,
        "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "init_lora_weights": true,
        "kasa_config": null, "layer_replication": null, "layers_pattern": null, "layers_to_transform": null,
        "loftq_config": {}, "lora_bias": false, "lora_ga_config": null, "modules_to_save": null,
        "monteclora_config": null, "rank_pattern": {}, "target_parameters": null, "trainable_token_indices": null,
        "use_bdlora": null, "use_dora": false, "use_qalora": false, "velora_config": null,
    });
    match fields {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

/// Fields that change nothing for a trained adapter.
const IGNORED: [&str; 10] = [
    "auto_mapping",
    "inference_mode",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
    "ensure_weight_tying",
];
const OWN: [&str; 6] = ["r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "base_model_name_or_path"];

impl LoraConfig {
    /// `lora_alpha / r`, or `lora_alpha / √r` with `use_rslora`.
    pub fn scaling(&self) -> f64 {
        self.lora_alpha / if self.use_rslora { (self.r as f64).sqrt() } else { self.r as f64 }
    }

    /// Refuses values that no adapter can have.
    ///
    /// # Errors
    /// Names the field, its value and what would do.
    pub fn check(&self) -> Result<(), Error> {
        if self.r == 0 {
            return Err(Error::config("`r` should be a positive integer value but the value passed is 0"));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            let found = self.lora_dropout;
            return Err(Error::config(format!("`lora_dropout` should be at least 0 and below 1 but is {found}")));
        }
        self.target_modules.matcher().map(|_| ())
    }

    /// Reads `adapter_config.json`'s content; the second value names fields that are not known here (a newer PEFT's), which
    /// the caller should warn about.
    ///
    /// # Errors
    /// If the adapter is of another kind or uses a feature that is not supported.
    pub fn from_json(path: &Path, value: Value) -> Result<(Self, Vec<String>), Error> {
        let Value::Object(fields) = &value else {
            return Err(Error::format(path, "adapter_config.json", "a JSON object", value));
        };
        match fields.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            other => return Err(Error::format(path, "peft_type", "LORA", other.unwrap_or("nothing"))),
        }
        let neutral = neutral_fields();
        let mut unknown = Vec::new();
        for (name, found) in fields {
            match neutral.get(name) {
                // What decides only how training starts does not matter for a trained adapter.
                Some(_) if name == "init_lora_weights" => {}
                Some(expected) if found == expected || found.is_null() || found == &json!({}) => {}
                Some(expected) => {
                    return Err(Error::format(
                        path,
                        name,
                        format!("{expected} (nothing else is supported yet)"),
                        found,
                    ));
                }
                None if IGNORED.contains(&name.as_str()) || OWN.contains(&name.as_str()) => {}
                None => unknown.push(name.clone()),
            }
        }
        let config: Self = serde_json::from_value(value)
            .map_err(|e| Error::format(path, "adapter_config.json", "LoRA's fields", e))?;
        config.check()?;
        Ok((config, unknown))
    }

    /// `adapter_config.json` as PEFT writes it.
    pub fn to_json(&self) -> Value {
        let mut fields = neutral_fields();
        let target = match &self.target_modules {
            TargetModules::Pattern(p) if p == "qkv" => json!(["q_proj", "k_proj", "v_proj"]),
            other => json!(other),
        };
        let integral = self.lora_alpha.fract() == 0.0;
        let own = json!({
            "auto_mapping": null, "base_model_name_or_path": self.base_model_name_or_path, "inference_mode": true,
            "lora_alpha": if integral { json!(self.lora_alpha as i64) } else { json!(self.lora_alpha) },
            "lora_dropout": self.lora_dropout, "megatron_config": null, "megatron_core": "megatron.core",
            "peft_type": "LORA", "qalora_group_size": 16, "r": self.r, "revision": null, "target_modules": target,
            "task_type": "CAUSAL_LM", "use_rslora": self.use_rslora, "ensure_weight_tying": false,
        });
        if let Value::Object(own) = own {
            fields.extend(own);
        }
        fields.sort_keys();
        Value::Object(fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scaling_follows_peft() {
        let config = LoraConfig { r: 4, lora_alpha: 6.0, ..Default::default() };
        assert_eq!(config.scaling(), 1.5);
        assert_eq!(LoraConfig { use_rslora: true, ..config }.scaling(), 3.0);
        assert_eq!(LoraConfig::default().scaling(), 1.0);
    }

    #[test]
    fn a_config_survives_its_own_file_and_unknown_fields_are_told() {
        let config = LoraConfig { r: 3, lora_alpha: 8.5, use_rslora: true, ..Default::default() };
        let mut json = config.to_json();
        json["from_the_future"] = json!(1);
        let (read, unknown) = LoraConfig::from_json(Path::new("x"), json).unwrap();
        assert_eq!((read, unknown), (config, vec!["from_the_future".to_owned()]));
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let mut json = LoraConfig::default().to_json();
        json["use_dora"] = json!(true);
        let error = LoraConfig::from_json(Path::new("x"), json).unwrap_err().to_string();
        assert!(error.contains("use_dora"), "{error}");
        let zero = LoraConfig { r: 0, ..Default::default() }.check().unwrap_err().to_string();
        assert_eq!(zero, "`r` should be a positive integer value but the value passed is 0");
    }
}
