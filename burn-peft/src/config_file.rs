//! Reading of `adapter_config.json`, as far as it is the same for all methods.

use crate::Error;
use serde_json::{Map, Value};
use std::path::Path;

/// The values of `peft_type` of the adapters that can be read, for errors.
const READABLE_TYPES: &str = "LORA, ADALORA, IA3, PREFIX_TUNING, PROMPT_TUNING or P_TUNING, the kinds that can be read";

/// Returns the fields of an `adapter_config.json` whose `peft_type` is one of `types`, written in the one way in which
/// they are parsed. Programs write the same setting differently: null and an empty list or map mean the same as an
/// absent field, and `4.0` means the same as `4`.
///
/// # Errors
/// If the content is not an object, or the adapter is of another kind; the message lists the kinds that can be read.
pub(crate) fn parse_fields(path: &Path, content: Value, types: &[&str]) -> Result<Value, Error> {
    let Value::Object(fields) = content else {
        return Err(Error::format(path, "adapter_config.json", "a JSON object", content));
    };
    let given = |(name, value): &(String, Value)| match value {
        Value::Null => false,
        // IA3's empty list says that no layer is a feed-forward layer; PEFT's default has one.
        Value::Array(list) => !list.is_empty() || name == "feedforward_modules",
        Value::Object(map) => !map.is_empty(),
        _ => true,
    };
    let fields = fields.into_iter().filter(given);
    let fields: Map<String, Value> = fields.map(|(name, value)| (name, integral(value))).collect();
    match fields.get("peft_type").and_then(Value::as_str) {
        Some(kind) if types.contains(&kind) => Ok(Value::Object(fields)),
        Some(kind) if READABLE_TYPES.split([',', ' ']).any(|known| known == kind) => {
            Err(Error::format(path, "peft_type", format!("{} here", types.join(" or ")), kind))
        }
        other => Err(Error::format(path, "peft_type", READABLE_TYPES, other.unwrap_or("nothing"))),
    }
}

/// Replaces floats with an integral value by integers.
fn integral(value: Value) -> Value {
    match value {
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() && float.fract() == 0.0 && float.abs() < 9e15 => (float as i64).into(),
            _ => Value::Number(number),
        },
        Value::Array(list) => list.into_iter().map(integral).collect(),
        Value::Object(map) => map.into_iter().map(|(name, value)| (name, integral(value))).collect(),
        other => other,
    }
}

/// A value read from an adapter directory or its `adapter_config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded<T> {
    /// The value.
    pub value: T,
    /// The names of unknown configuration fields (of a newer PEFT), about which the caller should warn.
    pub unknown_fields: Vec<String>,
}

/// The fields of `adapter_config.json` that a method knows.
pub(crate) struct KnownFields<'a> {
    /// An object with the fields of the method's configuration.
    pub own: &'a Value,
    /// An object with the fields that are supported only with the given value.
    pub neutral: &'a Value,
    /// Fields that make no difference for a trained adapter.
    pub ignored: &'a [&'a str],
}

impl KnownFields<'_> {
    /// Returns the names of the fields of `content` that are not known, or an error if one of the neutral fields has
    /// another value than the supported one.
    pub(crate) fn unknown(&self, path: &Path, content: &Value) -> Result<Vec<String>, Error> {
        let mut unknown = Vec::new();
        for (name, found) in content.as_object().into_iter().flatten() {
            match self.neutral.get(name) {
                Some(expected) if found == expected => {}
                Some(expected) => {
                    let expected = format!("{expected} (nothing else is supported)");
                    return Err(Error::format(path, name, expected, found));
                }
                None if self.ignored.contains(&name.as_str()) || self.own.get(name).is_some() => {}
                None => unknown.push(name.clone()),
            }
        }
        Ok(unknown)
    }
}
