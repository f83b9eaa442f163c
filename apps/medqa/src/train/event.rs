//! The events of a run, and the trait of their reporters.

use super::{interrupt::INTERRUPTED_EXIT_CODE, record::MetricsRecord};
use anyhow::Result;

/// An event of a run.
#[derive(Debug, Clone, Copy)]
pub(super) enum RunEvent<'a> {
    /// The run starts, or resumes.
    Started(RunStart<'a>),
    /// A step was taken, or the validation loss was computed.
    Record(&'a MetricsRecord),
    /// The trace of the collectives was written.
    TraceWritten(TraceReport<'a>),
    /// The run ends; its result or a checkpoint is written.
    Finished(RunEnd),
}

/// The start of a run.
#[derive(Debug, Clone, Copy)]
pub(super) struct RunStart<'a> {
    /// Steps of the whole run.
    pub total_steps: usize,
    /// Steps between two evaluations.
    pub eval_every: usize,
    /// The records before a resume.
    pub earlier: &'a [MetricsRecord],
}

/// A trace of the collectives.
#[derive(Debug, Clone, Copy)]
pub(super) struct TraceReport<'a> {
    /// The file.
    pub path: &'a str,
    /// The share of the time in collectives that overlaps computation, between 0 and 1.
    pub overlap_fraction: f64,
}

/// The end of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RunEnd {
    /// Everything is written.
    Complete,
    /// The user interrupted the run, and there is a checkpoint.
    Interrupted,
}

impl RunEnd {
    /// Returns the exit code of the program.
    pub(super) fn exit_code(self) -> u8 {
        match self {
            Self::Complete => 0,
            Self::Interrupted => INTERRUPTED_EXIT_CODE,
        }
    }
}

/// A reporter of a run: it writes the events that it is made for into a file or shows them, and ignores the others.
pub(super) trait Reporter {
    /// Reports an event.
    ///
    /// # Errors
    /// If the reporter's file cannot be written.
    fn report(&mut self, event: &RunEvent) -> Result<()>;
}
