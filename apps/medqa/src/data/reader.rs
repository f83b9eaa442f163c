//! Reading of data files of every kind: the location and the content of every row.

use super::{
    content::{self, RowContent},
    csv_rows::{self, Delimiter},
    json_rows,
    location::{JsonRows, RowLocation},
    parquet_rows,
    text::DataFile,
};
use crate::{
    identify::{self, Purpose},
    schema::Schema,
};
use anyhow::{Result, anyhow, bail};
use serde_json::Value;
use std::path::Path;

/// One row of a data file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub location: RowLocation,
    pub content: RowContent,
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
    let values = read_values(path, schema)?;
    if values.is_empty() {
        bail!("{}: expected at least one row, found none", path.display());
    }
    let row = |(place, value): (RowLocation, Result<Value>)| {
        (place, value.and_then(|value| content::parse_row(value, schema)))
    };
    Ok(values.into_iter().map(row).collect())
}

/// Reads the rows as JSON values. Parquet and compression are recognized by their first bytes, CSV by the file's name;
/// anything else is JSON.
fn read_values(path: &Path, schema: &Schema) -> Result<JsonRows> {
    let file = DataFile::read(path)?;
    if file.bytes.starts_with(parquet_rows::MAGIC) {
        if file.compressed {
            bail!(
                "{}: expected Parquet as it is, found it compressed by gzip or zstd; unpack it first",
                path.display()
            );
        }
        return parquet_rows::read(path);
    }
    let delimiter = match (file.has_extension("csv"), file.has_extension("tsv")) {
        (true, _) => Some(Delimiter::Comma),
        (_, true) => Some(Delimiter::Tab),
        _ => None,
    };
    let text = file.text(path)?;
    if text.trim().is_empty() {
        return Ok(JsonRows::new());
    }
    if let Some(delimiter) = delimiter {
        return csv_rows::parse(path, &text, delimiter, schema);
    }
    let json = text.trim_start().starts_with(['{', '[']);
    if let Some(found) = (!json).then(|| identify::advice(path, Purpose::Rows)).flatten() {
        bail!("{}: expected rows in JSON; {found}", path.display());
    }
    json_rows::parse(path, &text, schema)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::Format;

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
