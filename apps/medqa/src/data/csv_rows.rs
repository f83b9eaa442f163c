//! Rows of CSV or TSV: a header, then one record per row, as RFC 4180 has it.

use super::{
    location::{RawRow, RawRows, RowPlace},
    recognize,
    text::{TextFile, utf8},
};
use crate::schema::{Schema, SchemaRequest};
use anyhow::{Result, anyhow, bail};
use csv::{ByteRecord, ReaderBuilder};
use serde_json::{Map, Value};
use std::{
    collections::VecDeque,
    io::{self, Cursor, Read},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

/// The character between two fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Delimiter {
    Comma,
    Tab,
}

/// The ending of the name of a column whose fields are JSON: lists, numbers, or values of several kinds.
pub const JSON_COLUMN: &str = ":json";

/// A last record that no file has. A quote that is never closed swallows it.
const END: &str = "\u{0}end of file";

/// The rows of a file, and their schema.
pub(super) struct CsvFile {
    pub schema: Schema,
    pub rows: RawRows,
}

/// Opens the rows of a text whose first record names the columns. Values are strings; where the format wants a list,
/// and in columns whose name ends in `:json`, a field holds JSON.
///
/// # Errors
/// If the header is malformed. A quote that is never closed, and a record with another number of fields than the
/// header, is an error of that row alone.
pub(super) fn open(path: &Path, text: TextFile, delimiter: Delimiter, request: &SchemaRequest) -> Result<CsvFile> {
    let at = path.display();
    let lines = Arc::new(Mutex::new(LineEnds::default()));
    let end = Cursor::new(format!("\n{END}\n").into_bytes());
    let counted = CountedRead { inner: Box::new(text.into_read().chain(end)), lines: Arc::clone(&lines) };
    let byte = if delimiter == Delimiter::Tab { b'\t' } else { b',' };
    let mut reader = ReaderBuilder::new().delimiter(byte).flexible(true).has_headers(false).from_reader(counted);
    let mut record = ByteRecord::new();
    reader.read_byte_record(&mut record).map_err(|error| anyhow!("{at}: {error}"))?;
    let header: Vec<String> = record.iter().map(|name| utf8(name).map(str::to_owned)).collect::<Result<_>>()?;
    if header.len() == 1 && header[0] == END {
        return Ok(CsvFile { schema: request.certain().unwrap_or_default(), rows: Box::new(std::iter::empty()) });
    }
    check_header(path, &header, delimiter)?;
    let names = header.iter().map(|name| (name.trim_end_matches(JSON_COLUMN).to_owned(), Value::Null)).collect();
    let schema = recognize::schema(path, request, &names);
    let columns = CsvColumns::new(header, &schema);
    let mut ended = false;
    let rows = std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let read = reader.read_byte_record(&mut record);
        let line = line_of(&lines, &record);
        match read {
            Err(error) => {
                ended = true;
                let value = Err(anyhow!("the file cannot be read to its end: {error}"));
                return Some(RawRow { place: RowPlace::Line(line), value });
            }
            Ok(false) => return None,
            Ok(true) => {}
        }
        if record.get(0) == Some(END.as_bytes()) {
            ended = true;
            return None;
        }
        let open = record.iter().any(|field| field.ends_with(format!("\n{END}\n").as_bytes()));
        ended = open;
        let value = match open {
            true => Err(anyhow!("a quote (\") opens a field of this row and is never closed")),
            false => columns.row(&record),
        };
        Some(RawRow { place: RowPlace::Line(line), value })
    });
    Ok(CsvFile { schema, rows: Box::new(rows) })
}

fn check_header(path: &Path, header: &[String], delimiter: Delimiter) -> Result<()> {
    let at = path.display();
    let (name, other) = match delimiter {
        Delimiter::Comma => ("commas", [';', '\t', '|']),
        Delimiter::Tab => ("tabs", [',', ';', '|']),
    };
    if let Some(only) = header.first().filter(|only| header.len() == 1 && only.contains(other)) {
        bail!(
            "{at}:1: expected column names separated by {name}, found {only:?}; .csv files have commas, .tsv files tabs"
        );
    }
    for (i, column) in header.iter().enumerate() {
        if column.contains(END) {
            bail!("{at}:1: a quote (\") opens a field of this row and is never closed");
        }
        if column.trim().is_empty() || header.iter().take(i).any(|before| before == column) {
            bail!(
                "{at}:1: expected a header with different column names, found {column:?} as the name of column {}",
                i + 1
            );
        }
    }
    Ok(())
}

/// A column of the header.
struct Column {
    name: String,
    kind: ColumnKind,
}

/// The contents of a column's fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ColumnKind {
    Text,
    /// A list as JSON, or nothing.
    List,
    /// Any value as JSON; an empty field is absent.
    Json,
}

struct CsvColumns(Vec<Column>);

impl CsvColumns {
    fn new(header: Vec<String>, schema: &Schema) -> Self {
        let lists: Vec<&str> = schema.format.list_columns().iter().map(|name| schema.columns.name(name)).collect();
        let column = |name: String| match name.strip_suffix(JSON_COLUMN) {
            Some(plain) => Column { name: plain.to_owned(), kind: ColumnKind::Json },
            None if lists.contains(&name.as_str()) => Column { name, kind: ColumnKind::List },
            None => Column { name, kind: ColumnKind::Text },
        };
        Self(header.into_iter().map(column).collect())
    }

    fn row(&self, record: &ByteRecord) -> Result<Value> {
        if record.len() != self.0.len() {
            bail!("expected {} fields, as in the header, found {}", self.0.len(), record.len());
        }
        let mut row = Map::new();
        for (Column { name, kind }, field) in self.0.iter().zip(record) {
            let field = utf8(field)?;
            let value = match kind {
                ColumnKind::Text => Value::String(field.to_owned()),
                ColumnKind::Json if field.is_empty() => continue,
                ColumnKind::List if field.trim().is_empty() => Value::Null,
                ColumnKind::List => {
                    serde_json::from_str(field).map_err(|e| anyhow!("`{name}`: expected a list in JSON: {e}"))?
                }
                ColumnKind::Json => serde_json::from_str(field).map_err(|e| anyhow!("`{name}`: expected JSON: {e}"))?,
            };
            row.insert(name.clone(), value);
        }
        Ok(Value::Object(row))
    }
}

/// A run of line ends in the text: `\r` and `\n` in a row.
#[derive(Debug, Clone, Copy)]
struct LineEnd {
    /// Offset of the first of them.
    start: u64,
    /// Number of `\n` among them.
    lines: usize,
}

/// The line ends that were read and not yet passed.
#[derive(Debug, Default)]
struct LineEnds {
    ahead: VecDeque<LineEnd>,
    passed: usize,
    offset: u64,
    in_run: bool,
}

impl LineEnds {
    fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            let end = byte == b'\n' || byte == b'\r';
            if end && !self.in_run {
                self.ahead.push_back(LineEnd { start: self.offset, lines: 0 });
            }
            if let Some(run) = self.ahead.back_mut().filter(|_| byte == b'\n') {
                run.lines += 1;
            }
            self.in_run = end;
            self.offset += 1;
        }
    }

    /// Returns the line of the record that begins at `offset`, or after the line ends there.
    fn line_at(&mut self, offset: u64) -> usize {
        while let Some(run) = self.ahead.front().copied().filter(|run| run.start <= offset) {
            self.passed += run.lines;
            self.ahead.pop_front();
        }
        self.passed + 1
    }
}

fn line_of(lines: &Mutex<LineEnds>, record: &ByteRecord) -> usize {
    let offset = record.position().map_or(0, csv::Position::byte);
    lines.lock().unwrap_or_else(PoisonError::into_inner).line_at(offset)
}

/// Notes the line ends of what it reads, because the reader's own positions are before the line ends that it skips.
struct CountedRead {
    inner: Box<dyn Read + Send>,
    lines: Arc<Mutex<LineEnds>>,
}

impl Read for CountedRead {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(into)?;
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).add(&into[..read]);
        Ok(read)
    }
}
