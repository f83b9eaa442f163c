//! The rows of a generation: finished items are filtered in their order, counted and collected.

use super::{
    counts::GenerationCounts,
    draft::{Draft, ItemResult, RejectedText},
    filters::{FilterRules, RowFilters},
    progress::Progress,
};
use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, fs::File, io::Write, path::Path};

/// Items without a row after which a method without an end is stopped.
const MOST_BARREN_ITEMS: u64 = 200;

/// Facts that stand in the provenance of every row.
#[derive(Debug, Clone)]
pub(super) struct RowSource {
    pub method: &'static str,
    pub prompt_version: u32,
    pub recipe: String,
    pub model: String,
}

/// The rows so far.
pub(super) struct RowsOutput {
    filters: RowFilters,
    source: RowSource,
    wanted: Option<u64>,
    /// Finished items that wait for an earlier one.
    waiting: BTreeMap<u64, ItemResult>,
    next: u64,
    /// Items since the last row.
    barren: u64,
    files: OutputTexts,
    pub counts: GenerationCounts,
    progress: Progress,
}

/// The contents of the files of a generation.
#[derive(Default)]
pub(super) struct OutputTexts {
    pub rows: Vec<u8>,
    pub pairs: Vec<u8>,
    pub rejected: Vec<u8>,
}

impl RowsOutput {
    /// Creates an output that is complete with `wanted` rows.
    pub(super) fn new(rules: FilterRules, source: RowSource, wanted: Option<u64>) -> Self {
        Self {
            filters: RowFilters::new(rules),
            source,
            wanted,
            waiting: BTreeMap::new(),
            next: 0,
            barren: 0,
            files: OutputTexts::default(),
            counts: GenerationCounts::default(),
            progress: Progress::new(),
        }
    }

    /// Returns whether all wanted rows are there.
    pub(super) fn is_complete(&self) -> bool {
        self.wanted.is_some_and(|wanted| self.counts.rows >= wanted)
    }

    /// Returns the first item that is not finished.
    pub(super) fn next_item(&self) -> u64 {
        self.next
    }

    /// Returns the reason to stop a method without an end: its last items gave no row, so it would spend for ever.
    pub(super) fn is_barren(&self) -> Option<String> {
        (self.barren >= MOST_BARREN_ITEMS).then(|| {
            let commonest = self.counts.removed.iter().max_by_key(|(_, count)| **count);
            let reason = commonest.map(|(reason, _)| format!("; most were removed for: {reason}")).unwrap_or_default();
            format!("the last {MOST_BARREN_ITEMS} items gave no row{reason}")
        })
    }

    /// Takes a finished item, in any order.
    ///
    /// # Errors
    /// If a row cannot be written as JSON.
    pub(super) fn push(&mut self, item: u64, result: ItemResult) -> Result<()> {
        self.waiting.insert(item, result);
        while let Some(result) = self.waiting.remove(&self.next) {
            if !self.is_complete() {
                let rows = self.counts.rows;
                self.consume(self.next, result)?;
                self.barren = if self.counts.rows > rows { 0 } else { self.barren + 1 };
            }
            self.next += 1;
        }
        Ok(())
    }

    fn consume(&mut self, item: u64, result: ItemResult) -> Result<()> {
        result.repairs.iter().for_each(|repair| *self.counts.repaired.entry(repair).or_default() += 1);
        result.asked_again.iter().for_each(|reason| *self.counts.asked_again.entry(reason).or_default() += 1);
        for RejectedText { reason, text } in result.rejected {
            self.reject(item, reason, text.into())?;
        }
        for (index, mut draft) in result.drafts.into_iter().enumerate() {
            if self.is_complete() {
                break;
            }
            match self.filters.refuses(&mut draft) {
                Some(reason) => self.reject(item, reason.to_owned(), Value::Object(draft.columns))?,
                None => self.keep(item, index, draft)?,
            }
        }
        Ok(())
    }

    fn reject(&mut self, item: u64, reason: String, text: Value) -> Result<()> {
        let line = json!({"item": item, "reason": reason, "text": text});
        *self.counts.removed.entry(reason).or_default() += 1;
        write_line(&mut self.files.rejected, &line)
    }

    fn keep(&mut self, item: u64, index: usize, draft: Draft) -> Result<()> {
        let RowSource { method, prompt_version, recipe, model } = &self.source;
        let id = format!("{method}-{item}-{index}");
        let mut source = Map::new();
        source.insert("method".to_owned(), json!(method));
        source.insert("prompt_version".to_owned(), json!(prompt_version));
        source.insert("recipe_sha".to_owned(), json!(recipe));
        source.extend(draft.origin);
        source.insert("model".to_owned(), json!(model));
        source.insert("request_key".to_owned(), json!(draft.request.key));
        if let Some(created) = draft.request.created {
            source.insert("created".to_owned(), json!(created));
        }
        if let Some(mut pair) = draft.pair {
            pair["id"] = json!(id);
            write_line(&mut self.files.pairs, &pair)?;
        }
        let mut row = draft.columns;
        row.insert("id".to_owned(), json!(id));
        row.insert("source".to_owned(), Value::Object(source));
        row.insert("checks".to_owned(), Value::Object(draft.checks));
        self.counts.rows += 1;
        write_line(&mut self.files.rows, &Value::Object(row))
    }

    /// Returns an output of the same method without rows and without a limit.
    pub(super) fn emptied(&self) -> Self {
        Self::new(self.filters.rules().clone(), self.source.clone(), None)
    }

    /// Shows the progress, at most a few times per second.
    pub(super) fn show_progress(&mut self, spent: &str) {
        self.progress.show(&self.counts, self.wanted, spent);
    }

    /// Ends the line of progress.
    pub(super) fn end_progress(&mut self) {
        self.progress.end();
    }

    /// Returns the contents of the files.
    pub(super) fn texts(&self) -> &OutputTexts {
        &self.files
    }
}

fn write_line(into: &mut Vec<u8>, value: &Value) -> Result<()> {
    serde_json::to_writer(&mut *into, value).context("a row cannot be written as JSON")?;
    into.push(b'\n');
    Ok(())
}

/// Writes a file that stands in the folder of the run.
pub(super) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || File::create(path)?.write_all(bytes);
    write().with_context(|| format!("{}: cannot be written", path.display()))
}
