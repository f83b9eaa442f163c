//! What a run writes about itself.

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;
use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// `metrics.jsonl`: one line per step or evaluation, written at once.
pub struct Metrics {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Metrics {
    /// Opens the file to write behind its first `bytes`; the rest is cut off.
    pub fn open(path: &Path, bytes: u64) -> Result<Self> {
        let place = || format!("{}: cannot be written", path.display());
        let mut file = File::options().write(true).create(true).truncate(false).open(path).with_context(place)?;
        let found = file.metadata().with_context(place)?.len();
        if found < bytes {
            bail!("{}: expected at least {bytes} bytes from before, found {found}", path.display());
        }
        file.set_len(bytes).and_then(|()| file.seek(SeekFrom::End(0))).with_context(place)?;
        Ok(Self { path: path.to_owned(), file, bytes })
    }

    pub fn write(&mut self, line: &Value) -> Result<()> {
        let line = format!("{line}\n");
        self.file.write_all(line.as_bytes()).context("metrics.jsonl: cannot be written")?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// The lines written so far.
    pub fn lines(&self) -> Result<Vec<Value>> {
        let place = || self.path.display().to_string();
        let text = std::fs::read_to_string(&self.path).with_context(place)?;
        text.lines().map(|line| serde_json::from_str(line).with_context(place)).collect()
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// What a run came to: `summary.json`.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// The mean loss over the target tokens of the validation rows; none without such rows.
    pub valid_loss_before: Option<f64>,
    /// The same after the last step.
    pub valid_loss_after: Option<f64>,
    /// Optimizer steps.
    pub steps: usize,
    /// From the end of loading to the end of saving.
    pub seconds: f64,
    /// From the start of the process to the first step; none if there was none to take.
    pub seconds_to_first_step: Option<f64>,
    /// Tokens trained on, those of prompts included.
    pub tokens: usize,
    /// Over the time spent in steps.
    pub tokens_per_second: f64,
    /// The most memory that the process has held.
    pub peak_rss_bytes: u64,
    /// Weights that learned.
    pub trainable_parameters: usize,
}

/// The most memory that this process has held so far, in bytes; 0 where the system does not say.
pub fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
