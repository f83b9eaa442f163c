//! Reading rows: files to places and contents.

use super::{
    content::{self, Content},
    schema::{Format, Schema},
};
use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use std::{fmt, path::Path};

/// One row of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub place: Place,
    pub content: Content,
}

/// Where in its file a row stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A line, counted from 1.
    Line(usize),
    /// An item of an array, counted from 1.
    Row(usize),
    /// A key.
    Item(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Line(n) => write!(f, "line {n}"),
            Self::Row(n) => write!(f, "row {n}"),
            Self::Item(key) => f.write_str(key),
        }
    }
}

impl Place {
    /// The place with its file, as editors and compilers write it.
    pub fn of(&self, path: &Path) -> String {
        match self {
            Self::Line(n) => format!("{}:{n}", path.display()),
            place => format!("{}: {place}", path.display()),
        }
    }
}

/// All rows of a file, at least one.
pub fn read(path: &Path, schema: &Schema) -> Result<Vec<Row>> {
    let rows = read_each(path, schema)?.into_iter();
    rows.map(|(place, content)| {
        let content = content.map_err(|problem| anyhow!("{}: {problem:#}", place.of(path)))?;
        Ok(Row { place, content })
    })
    .collect()
}

/// Every row of a file by itself, at least one, so that a row's mistake does not hide those of others.
pub fn read_each(path: &Path, schema: &Schema) -> Result<Vec<(Place, Result<Content>)>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let text = text.trim_start_matches('\u{feff}');
    let values = match schema.format {
        Format::PubMedQa => items(path, text)?,
        _ if text.trim_start().starts_with('[') => array(path, text)?,
        _ => lines(text),
    };
    if values.is_empty() {
        bail!("{}: expected at least one row, found none", path.display());
    }
    let row = |(place, value): (Place, Result<Value>)| (place, value.and_then(|value| content::of(value, schema)));
    Ok(values.into_iter().map(row).collect())
}

type Values = Vec<(Place, Result<Value>)>;

/// JSONL.
fn lines(text: &str) -> Values {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let value = |line| serde_json::from_str(line).map_err(|e| anyhow!("expected a JSON object: {e}"));
    lines.map(|(i, line)| (Place::Line(i + 1), value(line))).collect()
}

/// One JSON array.
fn array(path: &Path, text: &str) -> Result<Values> {
    let list: Vec<Value> = json(path, text)?;
    Ok(list.into_iter().enumerate().map(|(i, value)| (Place::Row(i + 1), Ok(value))).collect())
}

/// PubMedQA's one object, of items by id.
fn items(path: &Path, text: &str) -> Result<Values> {
    let Value::Object(items) = json(path, text)? else {
        bail!("{}: expected an object of items by PubMed id, found another kind of JSON", path.display());
    };
    Ok(items.into_iter().map(|(pmid, item)| (Place::Item(pmid), Ok(item))).collect())
}

fn json<T: serde::de::DeserializeOwned>(path: &Path, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| anyhow!("{}: expected JSON: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str, format: Format) -> Result<Vec<Row>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read(file.path(), &Schema { format, ..Schema::default() })
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
        let places: Vec<_> = found.iter().map(|row| row.place.to_string()).collect();
        assert_eq!(places, ["9", "1"]);
        let (line, array) = ("{\"question\":\"a\",\"answer\":\"b\"}", "[{\"question\":\"a\",\"answer\":\"b\"}]");
        let (line, array) = (rows(&format!("\u{feff}{line}\n"), Format::Qa), rows(array, Format::Qa));
        assert_eq!(line.unwrap()[0].content, array.unwrap()[0].content);
    }
}
