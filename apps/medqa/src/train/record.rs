//! The files with the results of a run: `metrics.jsonl` and `summary.json`.

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;
use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// The file `metrics.jsonl`: one line per step or evaluation, written without delay.
pub struct MetricsFile {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl MetricsFile {
    /// Opens the file to append after its first `bytes`; the rest is truncated.
    pub fn open(path: &Path, bytes: u64) -> Result<Self> {
        let context = || format!("{}: cannot be written", path.display());
        let mut file = File::options().write(true).create(true).truncate(false).open(path).with_context(context)?;
        let found = file.metadata().with_context(context)?.len();
        if found < bytes {
            bail!("{}: expected at least {bytes} bytes from before, found {found}", path.display());
        }
        file.set_len(bytes).and_then(|()| file.seek(SeekFrom::End(0))).with_context(context)?;
        Ok(Self { path: path.to_owned(), file, bytes })
    }

    pub fn write(&mut self, line: &Value) -> Result<()> {
        let line = format!("{line}\n");
        self.file.write_all(line.as_bytes()).context("metrics.jsonl: cannot be written")?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// Returns the lines written so far.
    pub fn lines(&self) -> Result<Vec<Value>> {
        let context = || self.path.display().to_string();
        let text = std::fs::read_to_string(&self.path).with_context(context)?;
        text.lines().map(|line| serde_json::from_str(line).with_context(context)).collect()
    }

    /// Returns the bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// The results of a run: `summary.json`.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// The mean loss over the target tokens of the validation rows before the first step; none without such rows.
    pub valid_loss_before: Option<f64>,
    /// The same after the last step.
    pub valid_loss_after: Option<f64>,
    /// Optimizer steps.
    pub steps: usize,
    /// Seconds from the end of loading to the end of saving.
    pub seconds: f64,
    /// Seconds from the start of the process to the first step; none if no step was left to take.
    pub seconds_to_first_step: Option<f64>,
    /// Tokens trained on, those of prompts included.
    pub tokens: usize,
    /// Training throughput over the time spent in steps.
    pub tokens_per_second: f64,
    /// The peak resident memory of the process.
    pub peak_rss_bytes: u64,
    /// The number of trainable parameters.
    pub trainable_parameters: usize,
}
