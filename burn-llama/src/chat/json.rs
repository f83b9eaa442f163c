//! Python's `json.dumps`, as the filter `tojson` of `transformers` calls it.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

use super::arguments::{Arguments, Others};
use super::repr;

/// The keyword arguments of `json.dumps`.
struct JsonDumps {
    /// The text of one level of nesting; `None` writes a single line.
    indent: Option<String>,
    /// Separator between items.
    item_separator: String,
    /// Separator between key and value.
    key_separator: String,
    /// True if keys are sorted.
    sort_keys: bool,
    /// True if characters outside ASCII are escaped.
    ensure_ascii: bool,
}

/// Implements the filter `tojson`. Its parameters have the order and defaults that `transformers` gives them:
/// `ensure_ascii=False, indent=None, separators=None, sort_keys=False`.
pub(super) fn tojson(value: &Value, others: Others) -> Result<String, Error> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let arguments = Arguments::bind("tojson", names, &others.into_values())?;
    let indent = match arguments.get(1).map(Value::as_str) {
        Some(Some(text)) => Some(text.to_owned()),
        _ => arguments.integer(1)?.map(|spaces| " ".repeat(usize::try_from(spaces).unwrap_or(0))),
    };
    // With `indent`, Python writes no space after the comma at the end of a line.
    let mut item_separator = if indent.is_some() { "," } else { ", " }.to_owned();
    let mut key_separator = ": ".to_owned();
    if let Some(pair) = arguments.get(2) {
        let parts: Vec<Value> = pair.try_iter()?.collect();
        match [0, 1].map(|part| parts.get(part).and_then(Value::as_str)) {
            [Some(item), Some(key)] => (item_separator, key_separator) = (item.to_owned(), key.to_owned()),
            _ => return Err(arguments.wrong(2, "two strings")),
        }
    }
    let (ensure_ascii, sort_keys) = (arguments.flag(0), arguments.flag(3));
    let style = JsonDumps { indent, item_separator, key_separator, sort_keys, ensure_ascii };
    let mut out = String::new();
    style.write_value(value, 1, &mut out)?;
    Ok(out)
}

impl JsonDumps {
    fn write_value(&self, value: &Value, level: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None | ValueKind::Bool | ValueKind::Number => out.push_str(&scalar(value)),
            ValueKind::String => out.push_str(&self.json_string(value.as_str().unwrap_or_default())),
            // A generator has no length.
            ValueKind::Iterable if value.len().is_none() => return Err(not_json("generator")),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<_> = value.try_iter()?.collect();
                out.push('[');
                self.write_items(&items, level, out, |item, out| self.write_value(item, level + 1, out))?;
                out.push(']');
            }
            ValueKind::Map => {
                let mut keys: Vec<_> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                out.push('{');
                self.write_items(&keys, level, out, |key, out| {
                    out.push_str(&self.json_string(&key_text(key)?));
                    out.push_str(&self.key_separator);
                    self.write_value(&value.get_item(key)?, level + 1, out)
                })?;
                out.push('}');
            }
            other => return Err(not_json(&other.to_string())),
        }
        Ok(())
    }

    /// Writes the items between two brackets.
    fn write_items(
        &self,
        items: &[Value],
        level: usize,
        out: &mut String,
        write: impl Fn(&Value, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                out.push_str(&self.item_separator);
            }
            self.write_newline(level, out);
            write(item, out)?;
        }
        if !items.is_empty() {
            self.write_newline(level - 1, out);
        }
        Ok(())
    }

    /// Starts a new line at a nesting level, if output is indented.
    fn write_newline(&self, level: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.push_str(&indent.repeat(level));
        }
    }

    /// Returns a string as a quoted JSON string.
    fn json_string(&self, text: &str) -> String {
        let quoted = serde_json::Value::from(text).to_string();
        if !self.ensure_ascii {
            return quoted;
        }
        let mut out = String::new();
        for c in quoted.chars() {
            if matches!(c, ' '..='~') || repr::is_placeholder(c) {
                out.push(c);
            } else {
                out.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
            }
        }
        out
    }
}

/// Returns null, a boolean or a number as JSON.
fn scalar(value: &Value) -> String {
    match (value.kind(), repr::as_float(value)) {
        (ValueKind::None, _) => "null".to_owned(),
        (ValueKind::Bool, _) => value.is_true().to_string(),
        (_, Some(number)) if number.is_nan() => "NaN".to_owned(),
        (_, Some(number)) if number.is_infinite() => if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned(),
        (_, Some(number)) => repr::float(number),
        _ => value.to_string(),
    }
}

/// Returns the text of a key: `json.dumps` takes strings, numbers, booleans and none.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.to_string()),
        ValueKind::None | ValueKind::Bool | ValueKind::Number => Ok(scalar(key)),
        other => Err(not_json(&other.to_string())),
    }
}

fn not_json(kind: &str) -> Error {
    Error::new(ErrorKind::BadSerialization, format!("tojson: a value of the kind {kind} cannot be written as JSON"))
}
