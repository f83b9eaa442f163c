//! The times of passes and messages, and the timeline of a program.

use super::{Action, ComputationType, PipelineShape};

/// The send mode of the messages between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendMode {
    /// A send blocks until its receive and a receive until its send; both ranks do nothing else meanwhile.
    Blocking,
    /// Like `Blocking`, but where two ranks both have a send to and a receive from each other as adjacent instructions,
    /// in any order, the two messages are one exchange (`MPI_Sendrecv`) that takes the time of one message.
    SendRecv,
    /// A send returns immediately; its receive blocks until the message has arrived.
    Buffered,
}

/// The times of a program's passes and messages, all in the same unit.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// The time of the forward pass of one micro-batch, per stage (not per rank).
    pub forward: Vec<f64>,
    /// The time of the backward pass of one micro-batch, per stage (not per rank).
    pub backward: Vec<f64>,
    /// The time of one message.
    pub message: f64,
    /// The send mode, which decides which ranks wait for a message.
    pub send_mode: SendMode,
}

impl Costs {
    /// Returns costs with equal times for all stages and with blocking messages that take no time.
    pub fn uniform(shape: PipelineShape, forward: f64, backward: f64) -> Self {
        let stages = shape.stages();
        let (forward, backward) = (vec![forward; stages], vec![backward; stages]);
        Self { forward, backward, message: 0.0, send_mode: SendMode::Blocking }
    }

    /// Returns the time of one pass through `stage`.
    pub(super) fn time(&self, computation: ComputationType, stage: usize) -> f64 {
        match computation {
            ComputationType::Forward => self.forward[stage],
            ComputationType::Backward => self.backward[stage],
        }
    }
}

/// An action with its start and end time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TimedAction {
    /// The action.
    pub action: Action,
    /// The start time, in the unit of [`Costs`].
    pub start: f64,
    /// The end time.
    pub end: f64,
}

/// The timeline of a program. It leaves out gradient reductions and the optimizer step, which follow the pipeline.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// The actions of each rank, in order.
    pub ranks: Vec<Vec<TimedAction>>,
}

impl Timeline {
    /// Returns the end time of the last pass.
    pub fn makespan(&self) -> f64 {
        self.ranks.iter().flatten().map(|span| span.end).fold(0.0, f64::max)
    }

    /// Returns the fraction of all ranks' time up to the makespan in which they are idle, between 0 and 1.
    pub fn bubble_fraction(&self) -> f64 {
        let busy: f64 = self.ranks.iter().flatten().map(|span| span.end - span.start).sum();
        1.0 - busy / (self.makespan() * self.ranks.len() as f64)
    }
}
