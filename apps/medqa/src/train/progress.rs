//! The progress of a run on the terminal.

use super::{
    event::{Reporter, RunEvent},
    record::{MetricsRecord, StepRecord},
};
use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use std::time::Instant;

/// Reporter of the progress: a bar on a terminal, else a line after every tenth of the steps.
pub(super) struct ProgressLine {
    bar: ProgressBar,
    start: Instant,
    total_steps: usize,
}

impl ProgressLine {
    /// Creates the reporter; it shows nothing before the first step.
    ///
    /// # Errors
    /// If the template of the bar is not valid.
    pub(super) fn new() -> Result<Self> {
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}, {eta} left")?;
        Ok(Self { bar: ProgressBar::new(0).with_style(style), start: Instant::now(), total_steps: 0 })
    }

    fn show_step(&self, record: &StepRecord) {
        let (step, steps) = (record.step, self.total_steps);
        let message = format!("loss {:.4}, {:.0} tokens/s", record.loss, record.tokens.tokens_per_second);
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

    /// Prints a message above the bar.
    fn print_line(&self, message: &str) {
        if self.bar.is_hidden() { eprintln!("{message}") } else { self.bar.println(message) }
    }
}

impl Reporter for ProgressLine {
    fn report(&mut self, event: &RunEvent) -> Result<()> {
        match event {
            RunEvent::Started(start) => self.total_steps = start.total_steps,
            RunEvent::Record(MetricsRecord::Step(record)) => self.show_step(record),
            RunEvent::Record(MetricsRecord::Eval(record)) => {
                self.print_line(&format!("step {}: validation loss {:.4}", record.step, record.valid_loss));
            }
            // It was printed with the step that the run goes on after.
            RunEvent::Record(MetricsRecord::Note(_)) => {}
            RunEvent::TraceWritten(trace) => self.print_line(&format!(
                "{}: {:.0} % of the time in collectives overlaps computation",
                trace.path,
                100.0 * trace.overlap_fraction
            )),
            RunEvent::Finished(_) => self.bar.finish_and_clear(),
        }
        Ok(())
    }
}
