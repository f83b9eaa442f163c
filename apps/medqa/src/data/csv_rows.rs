//! Rows of CSV or TSV: a header, then one record per row, as RFC 4180 has it.

use super::location::{JsonRows, RowLocation};
use crate::schema::{Format, Schema};
use anyhow::{Result, anyhow, bail};
use csv::{ReaderBuilder, StringRecord};
use serde_json::{Map, Value};
use std::path::Path;

/// The character between two fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Delimiter {
    Comma,
    Tab,
}

/// A last record that no file has. A quote that is never closed swallows it.
const END: &str = "\u{0}end of file";

/// Parses the rows of a text whose first record names the columns. Values are strings; where the format wants a list,
/// a field holds it as JSON.
///
/// # Errors
/// If the header is malformed or a quote is never closed. A record with another number of fields than the header is an
/// error of that row alone.
pub(super) fn parse(path: &Path, text: &str, delimiter: Delimiter, schema: &Schema) -> Result<JsonRows> {
    let at = path.display();
    let text = format!("{}\n{END}\n", text.strip_suffix('\n').unwrap_or(text));
    let byte = if delimiter == Delimiter::Tab { b'\t' } else { b',' };
    let mut reader =
        ReaderBuilder::new().delimiter(byte).flexible(true).has_headers(false).from_reader(text.as_bytes());
    let mut records = Vec::new();
    for record in reader.records() {
        records.push(record.map_err(|error| anyhow!("{at}: expected CSV: {error}"))?);
    }
    let last = records.pop().unwrap_or_default();
    if last.get(0) != Some(END) {
        bail!("{at}:{}: a quote (\") opens a field of this row and is never closed", line_of(&text, &last));
    }
    let mut records = records.into_iter();
    let Some(header) = records.next() else { return Ok(JsonRows::new()) };
    check_header(path, &header, delimiter)?;
    let lists = list_columns(schema);
    Ok(records.map(|record| (RowLocation::Line(line_of(&text, &record)), row(&header, &record, &lists))).collect())
}

/// Returns the line at which a record of the text begins. The reader's position is before the line ends that it skips.
fn line_of(text: &str, record: &StringRecord) -> usize {
    let start = record.position().map_or(0, |position| usize::try_from(position.byte()).unwrap_or(usize::MAX));
    let rest = text.get(start..).unwrap_or_default();
    let skipped = rest.len() - rest.trim_start_matches(['\r', '\n']).len();
    1 + text.as_bytes().iter().take(start + skipped).filter(|&&byte| byte == b'\n').count()
}

fn check_header(path: &Path, header: &StringRecord, delimiter: Delimiter) -> Result<()> {
    let at = path.display();
    let (name, other) = match delimiter {
        Delimiter::Comma => ("commas", [';', '\t', '|']),
        Delimiter::Tab => ("tabs", [',', ';', '|']),
    };
    if let Some(only) = header.get(0).filter(|only| header.len() == 1 && only.contains(other)) {
        bail!(
            "{at}:1: expected column names separated by {name}, found {only:?}; .csv files have commas, .tsv files tabs"
        );
    }
    for (i, column) in header.iter().enumerate() {
        if column.trim().is_empty() || header.iter().take(i).any(|before| before == column) {
            bail!(
                "{at}:1: expected a header with different column names, found {column:?} as the name of column {}",
                i + 1
            );
        }
    }
    Ok(())
}

/// Returns the names of the columns that hold a list.
fn list_columns(schema: &Schema) -> Vec<&str> {
    let columns: &[&str] = match schema.format {
        Format::Messages => &["messages"],
        Format::ShareGpt => &["conversations"],
        Format::Alpaca => &["history"],
        Format::PubMedQa => &["CONTEXTS"],
        Format::Qa => &[],
    };
    columns.iter().map(|column| schema.columns.name(column)).collect()
}

fn row(header: &StringRecord, record: &StringRecord, lists: &[&str]) -> Result<Value> {
    if record.len() != header.len() {
        bail!("expected {} fields, as in the header, found {}", header.len(), record.len());
    }
    let mut row = Map::new();
    for (column, field) in header.iter().zip(record) {
        let value = match lists.contains(&column) {
            true if field.trim().is_empty() => Value::Null,
            true => serde_json::from_str(field).map_err(|e| anyhow!("`{column}`: expected a list in JSON: {e}"))?,
            false => Value::String(field.to_owned()),
        };
        row.insert(column.to_owned(), value);
    }
    Ok(Value::Object(row))
}
