//! Rows of JSON: JSONL, objects over several lines, an array, or an object that holds the array.

use super::{
    json_scanner::{JsonScanner, ScannedValue},
    location::{RawRow, RawRows, RowPlace},
    recognize,
    text::{TextFile, utf8},
};
use crate::schema::{Format, Schema};
use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value};
use std::{
    io::{BufRead, Cursor, Read},
    path::Path,
};

/// Opens the rows of a text. Its format may be `certain` before a row is read.
///
/// # Errors
/// If the text as a whole is malformed at its beginning. A malformed line of JSONL is an error of that row alone.
pub(super) fn open(path: &Path, text: TextFile, certain: Option<&Schema>) -> Result<RawRows> {
    let array = text.start().starts_with('[');
    let reader = text.into_read();
    if certain.is_some_and(|schema| schema.format == Format::PubMedQa) && !array {
        return pubmedqa_items(path, reader);
    }
    if array {
        if certain.is_some_and(|schema| schema.format == Format::PubMedQa) {
            bail!("{}: expected an object of items by PubMed id, found another kind of JSON", path.display());
        }
        return Ok(array_rows(JsonScanner::array(reader).with_context(|| path.display().to_string())?));
    }
    let mut rows = object_rows(path, reader)?;
    let Some(first) = rows.next() else { return Ok(Box::new(std::iter::empty())) };
    let second = rows.next();
    if let (RawRow { value: Ok(Value::Object(only)), .. }, None) = (&first, &second)
        && !recognize::has_columns(only, certain)
    {
        if let Some(items) = recognize::pubmedqa_items(only) {
            return Ok(keyed(items));
        }
        if let Some(rows) = wrapped_rows(path, only)? {
            return Ok(numbered(rows));
        }
    }
    Ok(Box::new([Some(first), second].into_iter().flatten().chain(rows)))
}

fn numbered(rows: Vec<Value>) -> RawRows {
    Box::new(rows.into_iter().enumerate().map(|(i, value)| RawRow { place: RowPlace::Row(i + 1), value: Ok(value) }))
}

fn keyed(items: Map<String, Value>) -> RawRows {
    Box::new(items.into_iter().map(|(key, item)| RawRow { place: RowPlace::Key(key), value: Ok(item) }))
}

/// Returns the elements of an array, each with its number.
fn array_rows(scanner: JsonScanner) -> RawRows {
    let parse = |ScannedValue { bytes, .. }: ScannedValue| {
        serde_json::from_str(utf8(&bytes)?).map_err(|error| anyhow!("expected JSON: {error}"))
    };
    let mut number = 0;
    scanned(scanner, move |scanned| {
        number += 1;
        let value = scanned.map_err(|error| anyhow!("expected JSON: {error:#}")).and_then(parse);
        RawRow { place: RowPlace::Row(number), value }
    })
}

/// Returns the rows of a scanner, up to the first error of the scanner itself.
fn scanned(mut scanner: JsonScanner, mut row: impl FnMut(Result<ScannedValue>) -> RawRow + Send + 'static) -> RawRows {
    let mut ended = false;
    Box::new(std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let next = scanner.next_value().transpose()?;
        ended = next.is_err();
        Some(row(next))
    }))
}

/// Returns objects one after the other: one per line, or each over several lines. The first two lines tell.
fn object_rows(path: &Path, mut reader: Box<dyn BufRead + Send>) -> Result<RawRows> {
    let (mut lines, mut begun) = (Vec::new(), Vec::new());
    while lines.len() < 2 {
        let mut line = Vec::new();
        let read = reader.read_until(b'\n', &mut line);
        if read.with_context(|| format!("{}: cannot be read", path.display()))? == 0 {
            break;
        }
        begun.extend_from_slice(&line);
        if !line.trim_ascii().is_empty() {
            lines.push(line);
        }
    }
    let incomplete = |line: &Vec<u8>| serde_json::from_slice::<Value>(line).is_err_and(|error| error.is_eof());
    let no_object = |line: &Vec<u8>| serde_json::from_slice::<Map<String, Value>>(line).is_err();
    let over_lines = lines.first().is_some_and(incomplete) && lines.get(1).is_some_and(no_object);
    let reader: Box<dyn BufRead + Send> = Box::new(Cursor::new(begun).chain(reader));
    Ok(if over_lines { multi_line_rows(JsonScanner::values(reader)) } else { jsonl_rows(reader) })
}

/// Returns one row per line that is not blank.
fn jsonl_rows(mut reader: Box<dyn BufRead + Send>) -> RawRows {
    let (mut number, mut bytes) = (0, Vec::new());
    Box::new(std::iter::from_fn(move || {
        loop {
            bytes.clear();
            number += 1;
            let place = RowPlace::Line(number);
            match reader.read_until(b'\n', &mut bytes) {
                Ok(0) => return None,
                Ok(_) if bytes.trim_ascii().is_empty() => continue,
                Ok(_) => {
                    let parse = |line| serde_json::from_str(line).map_err(|e| anyhow!("expected a JSON object: {e}"));
                    return Some(RawRow { place, value: utf8(&bytes).and_then(parse) });
                }
                Err(error) => {
                    let problem = Err(anyhow!("the file cannot be read to its end: {error}"));
                    reader = Box::new(std::io::empty());
                    return Some(RawRow { place, value: problem });
                }
            }
        }
    }))
}

/// Returns objects that span several lines, one after the other. The place of a row is its first line.
fn multi_line_rows(scanner: JsonScanner) -> RawRows {
    let mut last = 1;
    scanned(scanner, move |scanned| {
        let expected = |error| anyhow!("expected JSON objects, one per line or each over several lines: {error:#}");
        let value = scanned.and_then(|ScannedValue { line, bytes }| {
            last = line;
            Ok(serde_json::from_str(utf8(&bytes)?)?)
        });
        RawRow { place: RowPlace::Line(last), value: value.map_err(expected) }
    })
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

/// Parses PubMedQA's file: one JSON object of items by PubMed id, or an item per line.
fn pubmedqa_items(path: &Path, mut reader: Box<dyn BufRead + Send>) -> Result<RawRows> {
    let mut first = Vec::new();
    let read = reader.read_until(b'\n', &mut first);
    read.with_context(|| format!("{}: cannot be read", path.display()))?;
    let item = serde_json::from_slice::<Map<String, Value>>(&first).is_ok_and(|item| item.contains_key("QUESTION"));
    let mut whole: Box<dyn BufRead + Send> = Box::new(Cursor::new(first).chain(reader));
    if item {
        return Ok(jsonl_rows(whole));
    }
    let mut bytes = Vec::new();
    whole.read_to_end(&mut bytes).with_context(|| format!("{}: cannot be read", path.display()))?;
    let value = utf8(&bytes).and_then(|text| serde_json::from_str(text).map_err(|e| anyhow!("expected JSON: {e}")));
    match value.with_context(|| path.display().to_string())? {
        Value::Object(items) => Ok(keyed(items)),
        _ => bail!("{}: expected an object of items by PubMed id, found another kind of JSON", path.display()),
    }
}
