//! Access to the columns of a row.

use crate::schema::Columns;
use anyhow::{Context, Result};
use serde_json::{Map, Value};

/// A JSON object whose keys may be renamed columns of the format.
pub(super) struct MappedObject<'a> {
    pub row: &'a Map<String, Value>,
    pub columns: &'a Columns,
}

impl<'a> MappedObject<'a> {
    /// Returns a column's value; null counts as absent.
    pub(super) fn get(&self, column: &str) -> Option<&'a Value> {
        self.row.get(self.columns.name(column)).filter(|value| !value.is_null())
    }

    /// Returns the value of a key that has no other name; null counts as absent.
    pub(super) fn plain(&self, key: &str) -> Option<&'a Value> {
        self.row.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn required(&self, column: &str) -> Result<&'a Value> {
        self.row.get(self.columns.name(column)).with_context(|| {
            let found: Vec<_> = self.row.keys().map(String::as_str).collect();
            let found = if found.is_empty() { "none".to_owned() } else { found.join(", ") };
            format!("expected the key `{}`, found {found}", self.columns.name(column))
        })
    }

    pub(super) fn unexpected(&self, column: &str, expected: &str, found: &Value) -> anyhow::Error {
        anyhow::anyhow!("`{}`: expected {expected}, found {}", self.columns.name(column), excerpt(found))
    }

    pub(super) fn string(&self, column: &str) -> Result<String> {
        match self.required(column)? {
            Value::String(text) => Ok(text.clone()),
            other => Err(self.unexpected(column, "a string", other)),
        }
    }

    /// Returns a text column, or an empty text if it is absent.
    pub(super) fn string_or_empty(&self, column: &str) -> Result<String> {
        if self.get(column).is_some() { self.string(column) } else { Ok(String::new()) }
    }

    pub(super) fn array(&self, column: &str) -> Result<&'a [Value]> {
        let value = self.required(column)?;
        value.as_array().map(Vec::as_slice).ok_or_else(|| self.unexpected(column, "a list", value))
    }
}

/// Returns the beginning of a value's JSON text, for an error message.
pub(super) fn excerpt(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
