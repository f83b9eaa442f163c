//! What passes and messages cost, and what a program costs with them.

use super::{Layout, Pass, Work};

/// How ranks talk to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A send waits for its receive and a receive for its send; both ranks do nothing else meanwhile.
    Blocking,
    /// As `Blocking`, but a send and a receive that stand side by side on both of two ranks, in whatever order, are one exchange
    /// (MPI's Sendrecv), in the time of one message.
    Exchange,
    /// A send returns at once; its receive waits until the message is there.
    Buffered,
}

/// Times, all in one unit, as a program takes them.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// The time of a forward pass of one micro-batch, per stage (not rank).
    pub forward: Vec<f64>,
    /// The time of a backward pass of one micro-batch, per stage (not rank).
    pub backward: Vec<f64>,
    /// The time of a message.
    pub message: f64,
    /// Who waits for messages.
    pub transport: Transport,
}

impl Costs {
    /// Equal times for every stage, and blocking messages that take none.
    pub fn uniform(layout: Layout, forward: f64, backward: f64) -> Self {
        let stages = layout.stages();
        let (forward, backward) = (vec![forward; stages], vec![backward; stages]);
        Self { forward, backward, message: 0.0, transport: Transport::Blocking }
    }

    /// The time of one pass through `stage`.
    pub fn pass(&self, pass: Pass, stage: usize) -> f64 {
        match pass {
            Pass::Forward => self.forward[stage],
            Pass::Backward => self.backward[stage],
        }
    }
}

/// When a rank does a work.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    /// The work.
    pub work: Work,
    /// When it begins, in the unit of [`Costs`].
    pub start: f64,
    /// When it ends.
    pub end: f64,
}

/// A program in time. Reductions and the optimizer step are left out: they follow the pipeline.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// For each rank its work, in order.
    pub ranks: Vec<Vec<Span>>,
}

impl Timeline {
    /// When the last pass ends.
    pub fn makespan(&self) -> f64 {
        self.ranks.iter().flatten().map(|span| span.end).fold(0.0, f64::max)
    }

    /// The part of all ranks' time up to the makespan in which they compute nothing, between 0 and 1.
    pub fn bubble_fraction(&self) -> f64 {
        let busy: f64 = self.ranks.iter().flatten().map(|span| span.end - span.start).sum();
        1.0 - busy / (self.makespan() * self.ranks.len() as f64)
    }
}
