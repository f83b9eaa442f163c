//! Reading of data files of every kind, one row at a time.

use super::{
    columnar_rows::{self, ColumnarKind},
    content::{self, RowContent},
    csv_rows::{self, CsvFile, Delimiter},
    dataset_info::DataSource,
    json_rows,
    location::{RawRow, RawRows, RowLocation},
    mapped_object::excerpt,
    recognize, sources,
    text::DataFile,
    text_rows,
};
use crate::{
    identify::{self, Purpose},
    schema::{Format, Schema, SchemaRequest},
};
use anyhow::{Result, anyhow, bail};
use serde_json::{Map, Value};
use std::{path::Path, sync::Arc, vec::IntoIter};

/// One row of a data file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub location: RowLocation,
    pub content: RowContent,
}

/// A row as it stands in its file.
#[derive(Debug)]
pub struct DataRow {
    pub location: RowLocation,
    /// Format and column names of the row's file.
    pub schema: Arc<Schema>,
    /// The row, or what is wrong with it.
    pub value: Result<Map<String, Value>>,
}

/// Reads all rows at a path, at least one.
pub fn read_rows(path: &Path, request: &SchemaRequest) -> Result<Vec<Row>> {
    let rows = read_each_row(path, request)?.into_iter();
    rows.map(|(location, content)| {
        let content = content.map_err(|problem| anyhow!("{location}: {problem:#}"))?;
        Ok(Row { location, content })
    })
    .collect()
}

/// Reads the rows at a path, at least one. Each row has a result of its own, so that a mistake in one row does not hide
/// those in others.
pub fn read_each_row(path: &Path, request: &SchemaRequest) -> Result<Vec<(RowLocation, Result<RowContent>)>> {
    let mut rows = Vec::new();
    for row in RowReader::open(path, request)? {
        let DataRow { location, schema, value } = row?;
        rows.push((location, value.and_then(|value| content::parse_row(&value, &schema))));
    }
    if rows.is_empty() {
        bail!("{}: expected at least one row, found none", path.display());
    }
    Ok(rows)
}

/// Reads the rows of all files that a path stands for: a file, a folder, a pattern, or `dataset_info.json:NAME`. One
/// row at a time is in memory; of Parquet and Arrow files a batch, of an object around all rows the whole file.
pub struct RowReader {
    sources: IntoIter<DataSource>,
    open: Option<OpenFile>,
}

impl RowReader {
    /// Finds the files and opens the first one.
    ///
    /// # Errors
    /// If no file is found, or the first one cannot be read.
    pub fn open(path: &Path, request: &SchemaRequest) -> Result<Self> {
        let mut sources = sources::expand(path, request)?.into_iter();
        let open = sources.next().map(|source| OpenFile::open(&source)).transpose()?;
        Ok(Self { sources, open })
    }
}

impl Iterator for RowReader {
    type Item = Result<DataRow>;

    /// Returns the next row. An error is that of a file that cannot be opened; it ends the rows.
    fn next(&mut self) -> Option<Result<DataRow>> {
        loop {
            let file = self.open.as_mut()?;
            if let Some(row) = file.next_row() {
                return Some(Ok(row));
            }
            match self.sources.next().map(|source| OpenFile::open(&source)).transpose() {
                Ok(next) => self.open = next,
                Err(error) => {
                    self.open = None;
                    return Some(Err(error));
                }
            }
        }
    }
}

/// The rows of a file, and their schema.
struct OpenFile {
    file: Arc<Path>,
    schema: Arc<Schema>,
    rows: RawRows,
}

impl OpenFile {
    fn open(DataSource { path, request }: &DataSource) -> Result<Self> {
        let (file, schema) = (Arc::from(path.as_path()), request.certain());
        let rows = match open_raw(path, request, schema.as_ref())? {
            Opened::Csv(CsvFile { schema, rows }) => return Ok(Self { file, schema: Arc::new(schema), rows }),
            Opened::Rows(rows) => rows,
        };
        let (schema, rows) = match schema {
            Some(schema) => (schema, rows),
            None => recognized(path, request, rows),
        };
        Ok(Self { file, schema: Arc::new(schema), rows })
    }

    fn next_row(&mut self) -> Option<DataRow> {
        let RawRow { place, value } = self.rows.next()?;
        let value = value.and_then(|value| match value {
            Value::Object(row) => Ok(row),
            other => bail!("expected an object, found {}", excerpt(&other)),
        });
        Some(DataRow {
            location: RowLocation { file: Arc::clone(&self.file), place },
            schema: Arc::clone(&self.schema),
            value,
        })
    }
}

/// Recognizes the format by the first row that is an object, and returns all rows.
fn recognized(path: &Path, request: &SchemaRequest, mut rows: RawRows) -> (Schema, RawRows) {
    let mut before = Vec::new();
    for row in rows.by_ref() {
        let found = row.value.as_ref().ok().and_then(Value::as_object);
        let schema = found.map(|row| recognize::schema(path, request, row));
        before.push(row);
        if let Some(schema) = schema {
            return (schema, Box::new(before.into_iter().chain(rows)));
        }
    }
    (Schema::default(), Box::new(before.into_iter()))
}

/// A file that was opened, as far as its kind allows.
enum Opened {
    /// The header of a CSV file has told the schema.
    Csv(CsvFile),
    Rows(RawRows),
}

/// Opens a file by its kind. Columns, compression and JSON are recognized by their first bytes, CSV by its name or its
/// header; another text is rows of text if that is its format or its name says so.
fn open_raw(path: &Path, request: &SchemaRequest, certain: Option<&Schema>) -> Result<Opened> {
    let file = DataFile::open(path)?;
    if let Some(kind) = ColumnarKind::of(&file.head) {
        if file.compressed {
            let name = kind.name();
            bail!("{}: expected {name} as it is, found it compressed by gzip or zstd; unpack it first", path.display());
        }
        return columnar_rows::open(path, kind).map(Opened::Rows);
    }
    let delimiter = match (file.has_extension("csv"), file.has_extension("tsv")) {
        (true, _) => Some(Delimiter::Comma),
        (_, true) => Some(Delimiter::Tab),
        _ => None,
    };
    let named_text = file.has_extension("txt");
    let text = file.text(path)?;
    let start = text.start();
    if start.is_empty() {
        return Ok(Opened::Rows(Box::new(std::iter::empty())));
    }
    let json = start.starts_with(['{', '[']);
    let delimiter = delimiter.or_else(|| if json { None } else { header_delimiter(&start, request) });
    if let Some(delimiter) = delimiter {
        return csv_rows::open(path, text, delimiter, request).map(Opened::Csv);
    }
    let asks_for_text = certain.is_some_and(|schema| schema.format == Format::Text);
    if !json && (asks_for_text || named_text && certain.is_none()) {
        return Ok(Opened::Rows(text_rows::open(text)));
    }
    if let Some(found) = (!json).then(|| identify::advice(path, Purpose::Rows)).flatten() {
        bail!("{}: expected rows in JSON; {found}", path.display());
    }
    json_rows::open(path, text, certain).map(Opened::Rows)
}

/// Returns the character between the columns of a header that names the columns of a format.
fn header_delimiter(start: &str, request: &SchemaRequest) -> Option<Delimiter> {
    let header = start.lines().next()?;
    [(Delimiter::Comma, ','), (Delimiter::Tab, '\t')].into_iter().find_map(|(delimiter, mark)| {
        let names = header.split(mark).map(|name| (name.trim().trim_matches('"').to_owned(), Value::Null));
        let names: Map<String, Value> = names.collect();
        recognize::is_header(&names, request).then_some(delimiter)
    })
}

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;
