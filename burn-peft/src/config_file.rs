//! Reading of `adapter_config.json`, as far as it is the same for all methods.

use crate::Error;
use serde_json::{Value, json};
use std::path::Path;

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
    pub fn unknown(&self, path: &Path, content: &Value) -> Result<Vec<String>, Error> {
        let mut unknown = Vec::new();
        for (name, found) in content.as_object().into_iter().flatten() {
            match self.neutral.get(name) {
                Some(expected) if found == expected || found.is_null() || found == &json!({}) => {}
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
