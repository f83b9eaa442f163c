//! What a run tells, on the terminal and in files. Of several ranks the first speaks, the others are silent.

use super::{dashboards::Dashboards, record::Metrics};
use crate::recipe::Recipe;
use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use std::{path::Path, time::Instant};

/// Open while a run is under way.
pub struct Journal {
    files: Option<(Metrics, Dashboards)>,
    bar: ProgressBar,
    /// Whether burn-train's display has the terminal.
    display: bool,
    start: Instant,
}

impl Journal {
    /// Begins in the run folder, or goes on behind `step` and the first `bytes` of its metrics; for a rank that is not the
    /// first, a silent one.
    pub fn open(directory: &Path, recipe: &Recipe, (step, bytes): (usize, u64), speaks: (bool, bool)) -> Result<Self> {
        let (first, display) = speaks;
        let mut files = None;
        if first {
            let metrics = Metrics::open(&directory.join("metrics.jsonl"), bytes)?;
            let dashboards = Dashboards::open(directory, recipe, step, &metrics.lines()?)?;
            files = Some((metrics, dashboards));
        }
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}, {eta} left")?;
        Ok(Self { files, bar: ProgressBar::new(0).with_style(style), display, start: Instant::now() })
    }

    /// The lines written so far.
    pub fn lines(&self) -> Result<Vec<Value>> {
        self.files.as_ref().map_or(Ok(Vec::new()), |(metrics, _)| metrics.lines())
    }

    /// The length of `metrics.jsonl`.
    pub fn bytes(&self) -> u64 {
        self.files.as_ref().map_or(0, |(metrics, _)| metrics.bytes())
    }

    /// Writes a line wherever lines go; whether there is one who writes.
    pub fn write(&mut self, line: &Value) -> Result<bool> {
        let Some((metrics, dashboards)) = &mut self.files else { return Ok(false) };
        metrics.write(line)?;
        dashboards.write(line)?;
        Ok(true)
    }

    /// A progress bar on a terminal, a line every tenth of the way otherwise; nothing beside burn-train's display.
    pub fn show(&self, step: usize, steps: usize, message: String) {
        if self.display || self.files.is_none() {
            return;
        }
        if self.bar.is_hidden() {
            if step == 1 || step.is_multiple_of((steps / 10).max(1)) || step == steps {
                let left = self.start.elapsed().as_secs_f64() / step as f64 * (steps - step) as f64;
                eprintln!("step {step}/{steps}: {message}, {left:.0} s left");
            }
        } else {
            self.bar.set_length(steps as u64);
            self.bar.set_message(message);
            self.bar.set_position(step as u64);
        }
    }

    /// A line between those of progress.
    pub fn say(&self, message: &str) {
        match (self.display || self.files.is_none(), self.bar.is_hidden()) {
            (true, _) => {}
            (false, true) => eprintln!("{message}"),
            (false, false) => self.bar.println(message),
        }
    }

    /// Ends with 0, or with the code of an interruption.
    pub fn finish(&mut self, code: u8) -> Result<()> {
        self.bar.finish_and_clear();
        self.files.as_mut().map_or(Ok(()), |(_, dashboards)| dashboards.finish(code))
    }
}
