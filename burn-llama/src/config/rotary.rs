//! The rotary settings of `config.json`, in the spelling of `transformers` 4 (`rope_theta` and `rope_scaling`) and in
//! that of `transformers` 5 (`rope_parameters`).

use super::{ConfigFields, LlamaConfig};
use crate::{Error, rope::RopeScaling};
use serde_json::{Map, Value, json};

/// The base of the rotary frequencies and the rule that scales them.
pub(super) struct RotaryConfig {
    pub theta: f64,
    pub scaling: RopeScaling,
}

impl RotaryConfig {
    /// Reads both spellings.
    ///
    /// # Errors
    /// If a value is impossible or not supported, or the two spellings disagree.
    pub(super) fn read(fields: &ConfigFields<'_>, max_positions: usize, head_dim: usize) -> Result<Self, Error> {
        let mut theta = fields.optional_positive_number("rope_theta")?.map(|theta| ("rope_theta".to_owned(), theta));
        let mut scaling: Option<(RopeScaling, &Value)> = None;
        for name in ["rope_parameters", "rope_scaling"] {
            let Some(value) = fields.get(name) else { continue };
            let rule = value.as_object().ok_or_else(|| Error::config(name, "an object", value))?;
            if let Some(found) = ConfigFields(rule).optional_positive_number("rope_theta")? {
                let (first, expected) = theta.get_or_insert((format!("{name}.rope_theta"), found));
                if *expected != found {
                    let expected = format!("{expected}, the value of `{first}`");
                    return Err(Error::config(format!("{name}.rope_theta"), expected, found));
                }
            }
            let found = RopeScaling::from_json(Some(value), max_positions, head_dim)?;
            let (first, rule) = scaling.get_or_insert((found.clone(), value));
            if *first != found {
                return Err(Error::config(name, format!("the rule of `rope_parameters`, {rule}"), value));
            }
        }
        Ok(Self {
            theta: theta.map_or(10_000.0, |(_, theta)| theta),
            scaling: scaling.map_or(RopeScaling::None, |(scaling, _)| scaling),
        })
    }
}

/// Writes both spellings, so that `transformers` 4.40 to 5 read the same.
pub(super) fn write(config: &LlamaConfig, fields: &mut Map<String, Value>) {
    let stored = ["rope_parameters", "rope_scaling"].iter().find_map(|name| fields.get(*name)?.as_object()).cloned();
    let mut rule = match config.rope_scaling.as_llama3(config.head_dim, config.rope_theta) {
        Some(Value::Object(rule)) => rule,
        _ => stored.unwrap_or_default(),
    };
    rule.remove("rope_theta");
    let kinds = ["type", "rope_type"].map(|name| rule.remove(name));
    let kind = kinds.into_iter().flatten().next_back().unwrap_or_else(|| json!("default"));
    // Version 4.40 accepts no whole number as a factor.
    if let Some(factor) = rule.get("factor").and_then(Value::as_f64) {
        rule.insert("factor".to_owned(), json!(factor));
    }
    let mut parameters = rule.clone();
    parameters.insert("rope_type".to_owned(), kind.clone());
    parameters.insert("rope_theta".to_owned(), json!(config.rope_theta));
    let scaling = match kind.as_str() {
        Some("default") => Value::Null,
        _ => {
            // Version 4.40 knows these two kinds, and accepts no other key than `type` and `factor`.
            if !matches!(kind.as_str(), Some("linear" | "dynamic")) {
                rule.insert("rope_type".to_owned(), kind.clone());
            }
            rule.insert("type".to_owned(), kind);
            Value::Object(rule)
        }
    };
    fields.insert("rope_theta".to_owned(), json!(config.rope_theta));
    fields.insert("rope_scaling".to_owned(), scaling);
    fields.insert("rope_parameters".to_owned(), Value::Object(parameters));
}
