//! Writing of rows, into a file whose kind its name tells.

use super::columns::FileColumns;
use crate::write;
use anyhow::{Context, Result, bail};
use arrow_json::ReaderBuilder;
use arrow_schema::Schema as ArrowSchema;
use parquet::{arrow::ArrowWriter, basic::Compression, file::properties::WriterProperties};
use serde_json::{Map, Value};
use std::{
    fs::{self, File},
    io::{BufRead, BufReader, BufWriter, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

type Output = Box<dyn Write + Send>;

/// The number of rows that are converted to columns at a time.
const BATCH: usize = 1024;

/// The kind of a file of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FileKind {
    JsonLines,
    JsonArray,
    Csv(u8),
    Parquet,
}

impl FileKind {
    fn of(path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        let plain = name.trim_end_matches(".gz").trim_end_matches(".zst");
        Ok(match plain.rsplit_once('.').map_or("", |(_, ending)| ending) {
            "jsonl" => Self::JsonLines,
            "json" => Self::JsonArray,
            "csv" => Self::Csv(b','),
            "tsv" => Self::Csv(b'\t'),
            "parquet" if plain == name => Self::Parquet,
            _ => bail!(
                "{}: expected a name that ends in .jsonl, .json, .csv, .tsv (each also with .gz or .zst) or .parquet",
                path.display()
            ),
        })
    }
}

/// Writes rows beside a path, and renames the file to it when all are written.
pub(super) struct RowWriter {
    path: PathBuf,
    partial: PathBuf,
    kind: FileKind,
    /// Rows in the order of writing: the file itself, or lines of JSON from which the file is made at the end.
    output: Option<Output>,
    columns: FileColumns,
    lists: Vec<String>,
    rows: usize,
}

impl RowWriter {
    /// Creates a file. In CSV, the columns `lists` hold lists in JSON, as the format of the rows has them.
    ///
    /// # Errors
    /// If the ending of the name is not known, or the file cannot be made.
    pub(super) fn create(path: &Path, lists: &[&str]) -> Result<Self> {
        let kind = FileKind::of(path)?;
        write::create_parent_dir(path)?;
        let partial = write::partial_path(path);
        let spooled = matches!(kind, FileKind::Csv(_) | FileKind::Parquet);
        let first = if spooled { spool_path(&partial) } else { partial.clone() };
        let output = if spooled { plain(&first) } else { compressed(&first, path) }?;
        let lists = lists.iter().map(|list| (*list).to_owned()).collect();
        let columns = FileColumns::default();
        Ok(Self { path: path.to_owned(), partial, kind, output: Some(output), columns, lists, rows: 0 })
    }

    /// Writes a row.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn write(&mut self, row: &Map<String, Value>) -> Result<()> {
        let at = || format!("{}: cannot be written", self.path.display());
        let output = self.output.as_mut().with_context(at)?;
        let (open, close) = match self.kind {
            FileKind::JsonArray if self.rows == 0 => ("[\n", ""),
            FileKind::JsonArray => (",\n", ""),
            _ => ("", "\n"),
        };
        let line = format!("{open}{}{close}", serde_json::to_string(row)?);
        output.write_all(line.as_bytes()).with_context(at)?;
        if matches!(self.kind, FileKind::Csv(_) | FileKind::Parquet) {
            self.columns.add(row);
        }
        self.rows += 1;
        Ok(())
    }

    /// Completes the file and gives it its name.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn finish(mut self) -> Result<()> {
        let at = format!("{}: cannot be written", self.path.display());
        let mut output = self.output.take().with_context(|| at.clone())?;
        if self.kind == FileKind::JsonArray {
            let end: &[u8] = if self.rows == 0 { b"[]\n" } else { b"\n]\n" };
            output.write_all(end).with_context(|| at.clone())?;
        }
        output.flush().with_context(|| at.clone())?;
        drop(output);
        match self.kind {
            FileKind::JsonLines | FileKind::JsonArray => {}
            FileKind::Csv(delimiter) => self.write_csv(delimiter).with_context(|| at.clone())?,
            FileKind::Parquet => self.write_parquet().with_context(|| at.clone())?,
        }
        fs::rename(&self.partial, &self.path).with_context(|| at)
    }

    fn spooled(&self) -> Result<impl Iterator<Item = Result<Map<String, Value>>>> {
        let lines = BufReader::new(File::open(spool_path(&self.partial))?).lines();
        Ok(lines.map(|line| Ok(serde_json::from_str(&line?)?)))
    }

    fn write_csv(&self, delimiter: u8) -> Result<()> {
        let mut writer =
            csv::WriterBuilder::new().delimiter(delimiter).from_writer(compressed(&self.partial, &self.path)?);
        let lists: Vec<&str> = self.lists.iter().map(String::as_str).collect();
        writer.write_record(self.columns.header(&lists))?;
        for row in self.spooled()? {
            writer.write_record(self.columns.record(&row?))?;
        }
        writer.flush()?;
        Ok(())
    }

    fn write_parquet(&self) -> Result<()> {
        let schema = Arc::new(ArrowSchema::new(self.columns.fields()));
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        let mut writer = ArrowWriter::try_new(File::create(&self.partial)?, Arc::clone(&schema), Some(properties))?;
        let mut decoder = ReaderBuilder::new(schema).with_batch_size(BATCH).build_decoder()?;
        for row in self.spooled()? {
            decoder.serialize(&[self.columns.typed_row(&row?)])?;
            if decoder.len() == BATCH
                && let Some(batch) = decoder.flush()?
            {
                writer.write(&batch)?;
            }
        }
        if let Some(batch) = decoder.flush()? {
            writer.write(&batch)?;
        }
        writer.close()?;
        Ok(())
    }
}

impl Drop for RowWriter {
    fn drop(&mut self) {
        // Nothing half-written stays; what is renamed is gone from here.
        self.output = None;
        let _ = fs::remove_file(&self.partial);
        let _ = fs::remove_file(spool_path(&self.partial));
    }
}

fn spool_path(partial: &Path) -> PathBuf {
    partial.with_extension("rows.part")
}

fn plain(path: &Path) -> Result<Output> {
    let file = File::create(path).with_context(|| format!("{}: cannot be made", path.display()))?;
    Ok(Box::new(BufWriter::with_capacity(256 << 10, file)))
}

/// Creates a file that is compressed as the name of `path` says.
fn compressed(partial: &Path, path: &Path) -> Result<Output> {
    let output = plain(partial)?;
    Ok(match path.extension().and_then(|ending| ending.to_str()) {
        Some("gz") => Box::new(flate2::write::GzEncoder::new(output, flate2::Compression::default())),
        Some("zst") => Box::new(zstd::Encoder::new(output, 0)?.auto_finish()),
        _ => output,
    })
}
