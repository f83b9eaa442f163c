//! The files of a verb: the rows that it keeps, those that it takes out, and counts.

use super::writer::RowWriter;
use crate::{
    data::{DataRow, RowReader, content},
    schema::{Columns, Format, Schema, SchemaRequest},
    write,
};
use anyhow::{Result, anyhow, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// The rows that a verb of data reads.
#[derive(Args, Clone, Debug)]
pub(crate) struct InputArgs {
    /// Files to read: jsonl, json, csv, tsv, parquet, arrow or txt, also with .gz or .zst; a folder, a pattern, or
    /// dataset_info.json:NAME
    #[arg(required = true)]
    pub inputs: Vec<PathBuf>,
    /// Format of the rows; by default it is recognized by the keys of the rows
    #[arg(long)]
    pub format: Option<Format>,
    /// Columns that have other names in the file than in the format, for example question=prompt,answer=response
    #[arg(long, value_name = "COLUMN=NAME,...")]
    pub columns: Option<Columns>,
}

impl InputArgs {
    /// Returns the rows of all files, one at a time.
    ///
    /// # Errors
    /// If a file cannot be found or opened.
    pub(super) fn rows(&self) -> Result<impl Iterator<Item = Result<DataRow>> + use<>> {
        let request = SchemaRequest { format: self.format, columns: self.columns.clone().unwrap_or_default() };
        request.check().map_err(|problem| anyhow!("--columns: {problem}"))?;
        let readers: Result<Vec<RowReader>> = self.inputs.iter().map(|path| RowReader::open(path, &request)).collect();
        let bar = progress("rows read");
        Ok(readers?.into_iter().flatten().inspect(move |_| bar.inc(1)))
    }

    /// Returns the rows of all files that have no mistake.
    ///
    /// # Errors
    /// If a file cannot be found or opened.
    pub(super) fn valid_rows(&self) -> Result<impl Iterator<Item = Result<InputRow>> + use<>> {
        Ok(self.rows()?.map(|row| InputRow::new(row?)))
    }
}

/// A row without a mistake.
#[derive(Debug, Clone)]
pub(super) struct InputRow {
    pub location: String,
    pub schema: Arc<Schema>,
    pub row: Map<String, Value>,
}

impl InputRow {
    /// Takes a row that was read and has the columns of its format.
    ///
    /// # Errors
    /// If the row has a mistake.
    pub(super) fn new(row: DataRow) -> Result<Self> {
        let row = Self::in_any_form(row)?;
        let parsed = content::parse_row(&row.row, &row.schema).map(drop);
        parsed.map_err(|problem| mistake(&row.location, &problem))?;
        Ok(row)
    }

    /// Takes a row that was read, whatever its columns are.
    ///
    /// # Errors
    /// If the row could not be read.
    pub(super) fn in_any_form(DataRow { location, schema, value }: DataRow) -> Result<Self> {
        let row = value.map_err(|problem| mistake(&location.to_string(), &problem))?;
        Ok(Self { location: location.to_string(), schema, row })
    }
}

fn mistake(location: &str, problem: &anyhow::Error) -> anyhow::Error {
    anyhow!("{location}: {problem:#}; `medqa data clean` leaves such rows out")
}

/// A progress bar on a terminal; nothing elsewhere.
pub(super) fn progress(what: &'static str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{human_pos} {msg}, {per_sec}, {elapsed}") {
        bar.set_style(style.clone());
    }
    bar.set_message(what);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// The rows that a verb keeps, the rows that it takes out, and its counts.
pub(super) struct RowOutput {
    path: PathBuf,
    kept: Option<RowWriter>,
    removed: Option<RowWriter>,
    schema: Option<Arc<Schema>>,
    reasons: Map<String, Value>,
    rows: usize,
}

impl RowOutput {
    /// Prepares the output at `path`. The rows that are taken out go to the file beside it that ends in
    /// `.removed.jsonl`, the counts to the one that ends in `.counts.json`.
    pub(super) fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), kept: None, removed: None, schema: None, reasons: Map::new(), rows: 0 }
    }

    /// Keeps a row. All rows of an output have one format.
    ///
    /// # Errors
    /// If the row has another format than the rows before it, or cannot be written.
    pub(super) fn keep(&mut self, row: &Map<String, Value>, schema: &Arc<Schema>) -> Result<()> {
        let first = self.schema.get_or_insert_with(|| Arc::clone(schema));
        if **first != **schema {
            bail!(
                "{}: expected rows of one format, found {} after {}; bring them into one first: medqa data convert FILE \
                 --to {}",
                self.path.display(),
                schema.format.name(),
                first.format.name(),
                first.format.name()
            );
        }
        if self.kept.is_none() {
            let lists: Vec<&str> = schema.format.list_columns().iter().map(|name| schema.columns.name(name)).collect();
            self.kept = Some(RowWriter::create(&self.path, &lists)?);
        }
        self.rows += 1;
        self.kept.as_mut().map_or(Ok(()), |kept| kept.write(row))
    }

    /// Takes a row out. `reason` is a word; `details` are kept with the row.
    ///
    /// # Errors
    /// If the row cannot be written.
    pub(super) fn remove(&mut self, row: Value, location: &str, reason: &str, details: Value) -> Result<()> {
        if self.removed.is_none() {
            self.removed = Some(RowWriter::create(&self.beside("removed.jsonl"), &[])?);
        }
        self.count(reason);
        let mut line = Map::new();
        line.insert("reason".to_owned(), reason.into());
        line.insert("at".to_owned(), location.into());
        if !details.is_null() {
            line.insert("details".to_owned(), details);
        }
        line.insert("row".to_owned(), row);
        self.removed.as_mut().map_or(Ok(()), |removed| removed.write(&line))
    }

    fn count(&mut self, reason: &str) {
        let count = self.reasons.get(reason).and_then(Value::as_u64).unwrap_or(0);
        self.reasons.insert(reason.to_owned(), (count + 1).into());
    }

    /// Returns the path of a file beside the output.
    pub(super) fn beside(&self, ending: &str) -> PathBuf {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let stem = [".jsonl", ".json", ".csv", ".tsv", ".parquet"]
            .iter()
            .find_map(|kind| name.find(kind))
            .map_or(name.as_str(), |at| &name[..at]);
        self.path.with_file_name(format!("{stem}.{ending}"))
    }

    /// Completes all files, and returns the counts, with those of the verb itself.
    ///
    /// # Errors
    /// If no row is left, or a file cannot be written.
    pub(super) fn finish(mut self, verb: &str, more: Value) -> Result<Value> {
        let removed: u64 = self.reasons.values().filter_map(Value::as_u64).sum();
        if let Some(writer) = self.removed.take() {
            writer.finish()?;
        }
        let Some(kept) = self.kept.take() else {
            bail!(
                "{}: expected at least one row to keep, found none; {removed} rows were taken out",
                self.path.display()
            );
        };
        kept.finish()?;
        let mut counts = json!({
            "verb": verb, "rows": self.rows as u64 + removed, "kept": self.rows, "removed": removed, "reasons": self.reasons,
        });
        if let (Some(counts), Some(more)) = (counts.as_object_mut(), more.as_object()) {
            counts.extend(more.clone());
        }
        write::write_atomically(&self.beside("counts.json"), format!("{counts:#}\n").as_bytes())?;
        Ok(counts)
    }
}
