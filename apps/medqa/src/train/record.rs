//! What a run writes about itself.

use anyhow::{Context, Result};
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

/// The most memory that this process has held so far, in bytes; 0 where the system does not say.
pub fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
