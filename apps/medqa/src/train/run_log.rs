//! The log of a run, on the terminal and in files. Rank 0 writes it; the other ranks are silent.

use super::{dashboards::Dashboards, record::MetricsFile};
use crate::recipe::Recipe;
use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use std::{path::Path, time::Instant};

/// The log of a run.
pub struct RunLog {
    files: Option<(MetricsFile, Dashboards)>,
    progress_bar: ProgressBar,
    /// True if burn-train's display uses the terminal.
    display: bool,
    start: Instant,
}

impl RunLog {
    /// Opens the log in the run directory, or continues it after `step` and the first `bytes` of its metrics; on other
    /// ranks than 0, the log is silent.
    pub fn open(directory: &Path, recipe: &Recipe, (step, bytes): (usize, u64), speaks: (bool, bool)) -> Result<Self> {
        let (first, display) = speaks;
        let mut files = None;
        if first {
            let metrics = MetricsFile::open(&directory.join("metrics.jsonl"), bytes)?;
            let dashboards = Dashboards::open(directory, recipe, step, &metrics.lines()?)?;
            files = Some((metrics, dashboards));
        }
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}, {eta} left")?;
        Ok(Self { files, progress_bar: ProgressBar::new(0).with_style(style), display, start: Instant::now() })
    }

    /// Returns the lines written so far.
    pub fn lines(&self) -> Result<Vec<Value>> {
        self.files.as_ref().map_or(Ok(Vec::new()), |(metrics, _)| metrics.lines())
    }

    /// Returns the length of `metrics.jsonl`.
    pub fn metrics_bytes(&self) -> u64 {
        self.files.as_ref().map_or(0, |(metrics, _)| metrics.bytes())
    }

    /// Writes a line of metrics to all files; returns false on a rank that writes nothing.
    pub fn write(&mut self, line: &Value) -> Result<bool> {
        let Some((metrics, dashboards)) = &mut self.files else { return Ok(false) };
        metrics.write(line)?;
        dashboards.write(line)?;
        Ok(true)
    }

    /// Shows the progress: a bar on a terminal, else a line after every tenth of the steps; nothing if burn-train's
    /// display is on.
    pub fn show_progress(&self, step: usize, steps: usize, message: String) {
        if self.display || self.files.is_none() {
            return;
        }
        if self.progress_bar.is_hidden() {
            if step == 1 || step.is_multiple_of((steps / 10).max(1)) || step == steps {
                let left = self.start.elapsed().as_secs_f64() / step as f64 * (steps - step) as f64;
                eprintln!("step {step}/{steps}: {message}, {left:.0} s left");
            }
        } else {
            self.progress_bar.set_length(steps as u64);
            self.progress_bar.set_message(message);
            self.progress_bar.set_position(step as u64);
        }
    }

    /// Prints a message between the lines of progress.
    pub fn print_line(&self, message: &str) {
        match (self.display || self.files.is_none(), self.progress_bar.is_hidden()) {
            (true, _) => {}
            (false, true) => eprintln!("{message}"),
            (false, false) => self.progress_bar.println(message),
        }
    }

    /// Closes the log with exit code 0, or with that of an interruption.
    pub fn finish(&mut self, code: u8) -> Result<()> {
        self.progress_bar.finish_and_clear();
        self.files.as_mut().map_or(Ok(()), |(_, dashboards)| dashboards.finish(code))
    }
}
