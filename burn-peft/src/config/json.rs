//! PEFT's `adapter_config.json` for LoRA.

use super::{InitLoraWeights, LoraConfig};
use crate::{
    Error, Loaded, TargetModules,
    config_file::{KnownFields, parse_fields},
};
use serde_json::{Value, json};
use std::path::Path;

/// Returns the fields of PEFT's file that are supported only with the given value.
fn neutral_fields() -> Value {
    json!({
        "alora_invocation_tokens": null, "arrow_config": null, "corda_config": null, "eva_config": null,
        "fan_in_fan_out": false, "kasa_config": null, "layer_replication": null, "lora_bias": false,
        "lora_ga_config": null, "monteclora_config": null, "target_parameters": null,
        "use_bdlora": null, "use_qalora": false, "velora_config": null,
    })
}

/// Fields that make no difference for a trained adapter.
const IGNORED: [&str; 10] = [
    "auto_mapping",
    "inference_mode",
    // Parameters of the initialization; `init_lora_weights` tells if the base weights differ because of it.
    "loftq_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
];

/// AdaLoRA's fields for training.
const ADALORA_TRAINING: [&str; 9] =
    ["init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"];

/// Unsupported initializations that change the base weights, so that the adapter does not fit the original ones.
const MUTATING_INITS: [&str; 2] = ["corda", "lora_ga"];

impl LoraConfig {
    /// Parses the content of `adapter_config.json`. `r` of an AdaLoRA adapter is its initial rank.
    ///
    /// # Errors
    /// If the adapter is neither LoRA nor AdaLoRA, or uses a feature that is not supported.
    pub fn from_json(path: &Path, value: Value) -> Result<Loaded<Self>, Error> {
        let mut value = parse_fields(path, value, &["LORA", "ADALORA"])?;
        let mut ignored = IGNORED.to_vec();
        if value["peft_type"] == "ADALORA" {
            value = to_lora_fields(value);
            ignored.extend(ADALORA_TRAINING);
        }
        let known = KnownFields { own: &json!(Self::default()), neutral: &neutral_fields(), ignored: &ignored };
        let unknown_fields = known.unknown(path, &value)?;
        let config: Self = serde_json::from_value(value)
            .map_err(|e| Error::format(path, "adapter_config.json", "LoRA's fields", e))?;
        config.check()?;
        match &config.init_lora_weights {
            InitLoraWeights::Other(name) if MUTATING_INITS.contains(&name.as_str()) => {
                let expected = "an adapter of the unchanged base model (save it with \
                                path_initial_model_for_weight_conversion, which makes it plain LoRA)";
                Err(Error::format(path, "init_lora_weights", expected, name))
            }
            InitLoraWeights::Loftq => {
                let expected = "true, as in an adapter that was saved for loading (\"loftq\" would initialize it \
                                again; if the base model was saved with the adapter, set this to true and load the \
                                adapter on that base)";
                Err(Error::format(path, "init_lora_weights", expected, "loftq"))
            }
            _ => Ok(Loaded { value: config, unknown_fields }),
        }
    }

    /// Returns the content of `adapter_config.json` as PEFT writes it.
    pub fn to_json(&self) -> Value {
        let mut all = neutral_fields();
        let target = match &self.target_modules {
            TargetModules::Pattern(p) if p == "qkv" => json!(["q_proj", "k_proj", "v_proj"]),
            other => json!(other),
        };
        let integral = self.lora_alpha.fract() == 0.0;
        // Like PEFT's own LoftQ script: with "loftq" PEFT would initialize the adapter again when it loads the file.
        let init = if self.init_lora_weights == InitLoraWeights::Loftq {
            &InitLoraWeights::True
        } else {
            &self.init_lora_weights
        };
        let alpha = if integral { json!(self.lora_alpha as i64) } else { json!(self.lora_alpha) };
        let fixed = json!({
            "auto_mapping": null, "inference_mode": true, "init_lora_weights": init, "loftq_config": {},
            "lora_alpha": alpha, "megatron_config": null, "megatron_core": "megatron.core",
            "peft_type": "LORA", "qalora_group_size": 16, "revision": null,
            "target_modules": target, "task_type": "CAUSAL_LM",
        });
        for fields in [json!(self), fixed] {
            if let (Value::Object(all), Value::Object(fields)) = (&mut all, fields) {
                all.extend(fields);
            }
        }
        if let Some(adalora) = &self.adalora {
            all["peft_type"] = "ADALORA".into();
            // PEFT ignores `r` and warns of other values than its default.
            (all["init_r"], all["r"]) = (self.r.into(), 8.into());
            if self.rank_pattern.is_empty() {
                all["rank_pattern"] = Value::Null;
            }
            if let (Value::Object(all), Value::Object(fields)) = (&mut all, json!(adalora)) {
                all.extend(fields);
            }
        }
        // Keys inside the patterns are not sorted: their order matters.
        if let Value::Object(all) = &mut all {
            all.sort_keys();
        }
        all
    }
}

/// Returns the fields of LoRA in the fields of an AdaLoRA configuration.
fn to_lora_fields(mut fields: Value) -> Value {
    if let Value::Object(fields) = &mut fields {
        let r = fields.get("init_r").cloned().unwrap_or(json!(12));
        fields.insert("r".to_owned(), r);
        // AdaLoRA's pattern lists the ranks that are left, which the tensors' shapes tell as well.
        // Its matrices begin as plain ones, whatever `init_lora_weights` says.
        let other = ["rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"];
        fields.retain(|name, _| !other.contains(&name.as_str()));
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Bias, OneOrMany};

    #[test]
    fn a_config_survives_its_own_file_and_unknown_fields_are_told() {
        let map = |value: Value| value.as_object().unwrap().clone();
        let config = LoraConfig {
            r: 3,
            lora_alpha: 8.5,
            use_rslora: true,
            use_dora: true,
            init_lora_weights: InitLoraWeights::Pissa { niter: Some(4) },
            exclude_modules: Some(TargetModules::Pattern(".*k_proj".into())),
            layers_to_transform: Some(OneOrMany::Many(vec![0, 2])),
            layers_pattern: Some(OneOrMany::One("layers".into())),
            rank_pattern: map(json!({ "z": 1, "a": 2 })),
            alpha_pattern: map(json!({ "z": 1.5 })),
            bias: Bias::LoraOnly,
            modules_to_save: Some(vec!["lm_head".into()]),
            ..Default::default()
        };
        let mut json = config.to_json();
        json["from_the_future"] = json!(1);
        let read = LoraConfig::from_json(Path::new("x"), json).unwrap();
        assert_eq!(read.value.rank_pattern.keys().collect::<Vec<_>>(), ["z", "a"], "the order of patterns matters");
        assert_eq!(read, Loaded { value: config, unknown_fields: vec!["from_the_future".to_owned()] });
    }

    #[test]
    fn settings_written_in_other_ways_mean_the_same() {
        let expected = LoraConfig { r: 4, ..Default::default() };
        let mut json = expected.to_json();
        let fields = json.as_object_mut().unwrap();
        for (name, value) in [
            ("r", json!(4.0)),
            ("lora_alpha", json!(8.0)),
            ("lora_dropout", json!(0)),
            ("layers_to_transform", json!([])),
            ("modules_to_save", json!([])),
            ("exclude_modules", json!([])),
            ("megatron_config", json!({})),
            ("layer_replication", json!([])),
            ("rank_pattern", json!(null)),
            ("bias", json!(null)),
            ("use_rslora", json!(null)),
            ("init_lora_weights", json!(null)),
            ("from_the_future", json!(null)),
        ] {
            fields.insert(name.to_owned(), value);
        }
        let read = LoraConfig::from_json(Path::new("x"), json).unwrap();
        assert_eq!(read, Loaded { value: expected, unknown_fields: vec![] });
    }

    #[test]
    fn an_adapter_of_another_kind_is_refused_with_the_kinds_that_can_be_read() {
        for (kind, expected) in [
            (json!("LOHA"), "expected LORA, ADALORA, IA3, PREFIX_TUNING, PROMPT_TUNING or P_TUNING"),
            (json!(null), "expected LORA, ADALORA, IA3, PREFIX_TUNING, PROMPT_TUNING or P_TUNING"),
            (json!("IA3"), "expected LORA or ADALORA here"),
        ] {
            let mut json = LoraConfig::default().to_json();
            json["peft_type"] = kind.clone();
            let error = LoraConfig::from_json(Path::new("x"), json).unwrap_err().to_string();
            let found = format!("found {}", kind.as_str().unwrap_or("nothing"));
            assert!(error.contains(expected) && error.ends_with(&found), "{error}");
        }
    }

    #[test]
    fn loftq_is_saved_as_a_plain_adapter() {
        let config = LoraConfig { init_lora_weights: InitLoraWeights::Loftq, ..Default::default() };
        let mut json = config.to_json();
        assert_eq!((&json["init_lora_weights"], &json["loftq_config"]), (&json!(true), &json!({})));
        // PEFT's script writes true there, and keeps this field.
        json["loftq_config"] = json!({ "loftq_bits": 4, "loftq_iter": 5 });
        let read = LoraConfig::from_json(Path::new("x"), json).unwrap();
        assert_eq!(read, Loaded { value: LoraConfig::default(), unknown_fields: vec![] });
    }

    #[test]
    fn unsupported_fields_are_rejected_by_name() {
        for (field, value) in [
            ("lora_bias", json!(true)),
            ("layer_replication", json!([[0, 1]])),
            ("init_lora_weights", json!("corda")),
            ("init_lora_weights", json!("loftq")),
        ] {
            let mut json = LoraConfig::default().to_json();
            json[field] = value;
            let error = LoraConfig::from_json(Path::new("x"), json).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
