//! What a run writes about itself.

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;
use std::{fs::File, io::Write, path::Path};

/// `metrics.jsonl`: one line per step or evaluation, written at once.
pub struct Metrics(File);

impl Metrics {
    pub fn create(path: &Path) -> Result<Self> {
        Ok(Self(File::create(path).with_context(|| format!("{}: cannot be written", path.display()))?))
    }

    pub fn write(&mut self, line: &Value) -> Result<()> {
        writeln!(self.0, "{line}").context("metrics.jsonl cannot be written")
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
