//! Rows of JSON: JSONL, objects over several lines, an array, or an object that holds the array.

use super::location::{JsonRows, RowLocation};
use crate::schema::{Format, Schema};
use anyhow::{Result, anyhow, bail};
use serde_json::{Deserializer, Map, Value};
use std::path::Path;

/// Parses the rows of a text.
///
/// # Errors
/// If the text as a whole is malformed. A malformed line of JSONL is an error of that row alone.
pub(super) fn parse(path: &Path, text: &str, schema: &Schema) -> Result<JsonRows> {
    if schema.format == Format::PubMedQa {
        return parse_pubmedqa_items(path, text);
    }
    if text.trim_start().starts_with('[') {
        return Ok(numbered(parse_json(path, text)?));
    }
    let rows = if is_over_lines(text) { parse_objects(path, text)? } else { parse_jsonl(text) };
    match rows.as_slice() {
        [(_, Ok(Value::Object(only)))] if !has_columns(only, schema) => match wrapped_rows(path, only)? {
            Some(rows) => Ok(numbered(rows)),
            None => Ok(rows),
        },
        _ => Ok(rows),
    }
}

/// Returns whether the first object spans several lines: its first line is incomplete, and the second is no object.
fn is_over_lines(text: &str) -> bool {
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let (first, second) = (lines.next().unwrap_or_default(), lines.next());
    let incomplete = serde_json::from_str::<Value>(first).is_err_and(|error| error.is_eof());
    incomplete && second.is_some_and(|line| serde_json::from_str::<Map<String, Value>>(line).is_err())
}

fn numbered(rows: Vec<Value>) -> JsonRows {
    rows.into_iter().enumerate().map(|(i, value)| (RowLocation::Row(i + 1), Ok(value))).collect()
}

/// Parses one object per line.
fn parse_jsonl(text: &str) -> JsonRows {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let value = |line| serde_json::from_str(line).map_err(|e| anyhow!("expected a JSON object: {e}"));
    lines.map(|(i, line)| (RowLocation::Line(i + 1), value(line))).collect()
}

/// Parses objects that span several lines, one after the other. The location of a row is its first line.
fn parse_objects(path: &Path, text: &str) -> Result<JsonRows> {
    let mut values = Deserializer::from_str(text).into_iter::<Value>();
    let (mut rows, mut line, mut counted) = (JsonRows::new(), 1, 0);
    loop {
        let rest = text.get(values.byte_offset()..).unwrap_or_default();
        let start = text.len() - rest.trim_start().len();
        line += text.get(counted..start).unwrap_or_default().matches('\n').count();
        counted = start;
        match values.next() {
            None => return Ok(rows),
            Some(Ok(value)) => rows.push((RowLocation::Line(line), Ok(value))),
            Some(Err(error)) => {
                bail!("{}: expected JSON objects, one per line or each over several lines: {error}", path.display())
            }
        }
    }
}

/// Returns whether an object has a column of the format, and so is a row.
fn has_columns(row: &Map<String, Value>, schema: &Schema) -> bool {
    schema.format.columns().iter().any(|column| row.contains_key(schema.columns.name(column)))
}

/// Returns the rows inside an object such as `{"data": [...]}`, or `None` if it holds no list of objects.
fn wrapped_rows(path: &Path, object: &Map<String, Value>) -> Result<Option<Vec<Value>>> {
    let is_rows = |value: &Value| value.as_array().is_some_and(|list| list.first().is_some_and(Value::is_object));
    let lists: Vec<&String> = object.iter().filter(|(_, value)| is_rows(value)).map(|(key, _)| key).collect();
    match lists.as_slice() {
        [] => Ok(None),
        [key] => Ok(object.get(*key).and_then(Value::as_array).cloned()),
        _ => {
            let keys: Vec<String> = lists.iter().map(|key| format!("`{key}`")).collect();
            bail!(
                "{}: expected one list of rows, found several, under {}; write each into a file of its own",
                path.display(),
                keys.join(", ")
            )
        }
    }
}

/// Parses PubMedQA's file: one JSON object of items by PubMed id.
fn parse_pubmedqa_items(path: &Path, text: &str) -> Result<JsonRows> {
    let Value::Object(items) = parse_json(path, text)? else {
        bail!("{}: expected an object of items by PubMed id, found another kind of JSON", path.display());
    };
    Ok(items.into_iter().map(|(pmid, item)| (RowLocation::Key(pmid), Ok(item))).collect())
}

fn parse_json<T: serde::de::DeserializeOwned>(path: &Path, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| anyhow!("{}: expected JSON: {e}", path.display()))
}
