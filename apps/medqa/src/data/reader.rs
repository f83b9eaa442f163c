//! Reading of data files: the location and the content of every row.

use super::content::{self, RowContent};
use crate::schema::{Format, Schema};
use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use std::{fmt, path::Path};

/// One row of a data file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub location: RowLocation,
    pub content: RowContent,
}

/// Location of a row in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowLocation {
    /// Line number, counted from 1.
    Line(usize),
    /// Position in a JSON array, counted from 1.
    Row(usize),
    /// Key in a JSON object.
    Key(String),
}

impl fmt::Display for RowLocation {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Line(n) => write!(f, "line {n}"),
            Self::Row(n) => write!(f, "row {n}"),
            Self::Key(key) => f.write_str(key),
        }
    }
}

impl RowLocation {
    /// Formats the location with its file, as editors and compilers do.
    pub fn in_file(&self, path: &Path) -> String {
        match self {
            Self::Line(n) => format!("{}:{n}", path.display()),
            place => format!("{}: {place}", path.display()),
        }
    }
}

/// Reads all rows of a file, at least one.
pub fn read_rows(path: &Path, schema: &Schema) -> Result<Vec<Row>> {
    let rows = read_each_row(path, schema)?.into_iter();
    rows.map(|(location, content)| {
        let content = content.map_err(|problem| anyhow!("{}: {problem:#}", location.in_file(path)))?;
        Ok(Row { location, content })
    })
    .collect()
}

/// Reads the rows of a file, at least one. Each row has a result of its own, so that a mistake in one row does not hide
/// those in others.
pub fn read_each_row(path: &Path, schema: &Schema) -> Result<Vec<(RowLocation, Result<RowContent>)>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let text = text.trim_start_matches('\u{feff}');
    let values = match schema.format {
        Format::PubMedQa => parse_pubmedqa_items(path, text)?,
        _ if text.trim_start().starts_with('[') => parse_array(path, text)?,
        _ => parse_jsonl(text),
    };
    if values.is_empty() {
        bail!("{}: expected at least one row, found none", path.display());
    }
    let row = |(place, value): (RowLocation, Result<Value>)| {
        (place, value.and_then(|value| content::parse_row(value, schema)))
    };
    Ok(values.into_iter().map(row).collect())
}

/// Rows as JSON values, before their format is applied.
type JsonRows = Vec<(RowLocation, Result<Value>)>;

/// Parses a JSONL file.
fn parse_jsonl(text: &str) -> JsonRows {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let value = |line| serde_json::from_str(line).map_err(|e| anyhow!("expected a JSON object: {e}"));
    lines.map(|(i, line)| (RowLocation::Line(i + 1), value(line))).collect()
}

/// Parses a file that is one JSON array.
fn parse_array(path: &Path, text: &str) -> Result<JsonRows> {
    let list: Vec<Value> = parse_json(path, text)?;
    Ok(list.into_iter().enumerate().map(|(i, value)| (RowLocation::Row(i + 1), Ok(value))).collect())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str, format: Format) -> Result<Vec<Row>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read_rows(file.path(), &Schema { format, ..Schema::default() })
    }

    #[test]
    fn mistakes_name_the_line_and_the_key() {
        let item = "{\"7\":{\"QUESTION\":\"q\",\"CONTEXTS\":[],\"final_decision\":\"perhaps\"}}";
        for (text, format, words) in [
            ("{\"question\":\"a\",\"answer\":\"b\"}\n\n{\"question\":1}", Format::Qa, ":3: `question`"),
            ("[{\"question\":\"a\",\"answer\":\"b\"},\n3]", Format::Qa, ": row 2: expected an object, found 3"),
            ("{\"question\":\"a\"}", Format::Qa, ":1: expected the key `answer`, found question"),
            ("", Format::Qa, "at least one row"),
            ("[]", Format::Qa, "at least one row"),
            ("[{]", Format::Messages, ": expected JSON: "),
            ("[1]", Format::PubMedQa, "an object of items"),
            (item, Format::PubMedQa, ": 7: `final_decision`: expected yes, no or maybe, found \"perhaps\""),
        ] {
            let error = format!("{:#}", rows(text, format).unwrap_err());
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn rows_keep_the_order_of_the_file() {
        let item = "{\"QUESTION\":\"q\",\"CONTEXTS\":[\"a\",\"b\"],\"final_decision\":\"yes\"}";
        let found = rows(&format!("{{\"9\":{item},\"1\":{item}}}"), Format::PubMedQa).unwrap();
        let places: Vec<_> = found.iter().map(|row| row.location.to_string()).collect();
        assert_eq!(places, ["9", "1"]);
        let (line, array) = ("{\"question\":\"a\",\"answer\":\"b\"}", "[{\"question\":\"a\",\"answer\":\"b\"}]");
        let (line, array) = (rows(&format!("\u{feff}{line}\n"), Format::Qa), rows(array, Format::Qa));
        assert_eq!(line.unwrap()[0].content, array.unwrap()[0].content);
    }
}
