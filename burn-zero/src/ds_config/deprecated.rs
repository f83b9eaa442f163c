//! Replacement of the deprecated keys of a ds_config by the names that DeepSpeed has today.

use crate::ConfigError;
use serde_json::{Map, Value, json};

/// The deprecated and the current names of keys of `zero_optimization`.
const RENAMED: &[(&str, &str)] = &[
    ("stage3_gather_fp16_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"),
    ("gather_16bit_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"),
    ("prefetch_bucket_size", "stage3_prefetch_bucket_size"),
    ("param_persistence_threshold", "stage3_param_persistence_threshold"),
    ("model_persistence_threshold", "stage3_model_persistence_threshold"),
    ("max_live_parameters", "stage3_max_live_parameters"),
    ("max_reuse_distance", "stage3_max_reuse_distance"),
];

/// Replaces deprecated keys.
///
/// # Errors
/// [`ConfigError::InvalidValue`] if both the deprecated and the current key are present.
pub(super) fn replace_deprecated_keys(root: &mut Map<String, Value>) -> Result<(), ConfigError> {
    rename(root, "", "bfloat16", "bf16")?;
    if let Some(Value::Bool(on)) = root.get("zero_optimization") {
        let block = json!({"stage": u8::from(*on)});
        root.insert("zero_optimization".to_owned(), block);
    }
    let Some(Value::Object(zero)) = root.get_mut("zero_optimization") else {
        return Ok(());
    };
    let block = "zero_optimization.";
    for (old, new) in RENAMED {
        rename(zero, block, old, new)?;
    }
    for (old, new) in [("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")] {
        match zero.get(old) {
            Some(Value::Bool(true)) => {
                zero.insert(old.to_owned(), json!({"device": "cpu"}));
                rename(zero, block, old, new)?;
            }
            Some(Value::Bool(false) | Value::Null) => drop(zero.shift_remove(old)),
            Some(other) => {
                return Err(ConfigError::invalid_value(format!("{block}{old}"), "true or false", other.to_string()));
            }
            None => {}
        }
    }
    Ok(())
}

fn rename(map: &mut Map<String, Value>, block: &str, old: &str, new: &str) -> Result<(), ConfigError> {
    if !map.contains_key(old) {
        return Ok(());
    }
    if map.contains_key(new) {
        return Err(ConfigError::invalid_value(
            format!("{block}{old}"),
            format!("only its new spelling `{new}`"),
            "both",
        ));
    }
    // The map is rebuilt so that the keys keep their order.
    let renamed =
        std::mem::take(map).into_iter().map(|(key, value)| (if key == old { new.to_owned() } else { key }, value));
    *map = renamed.collect();
    Ok(())
}
