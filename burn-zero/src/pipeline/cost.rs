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

/// The times of the passes of one micro-batch through one stage.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StageTimes {
    /// The time of the forward pass.
    pub forward: f64,
    /// The time of the backward pass up to the gradient of the input.
    pub backward_input: f64,
    /// The time of the gradients of the weights. A full backward pass takes `backward_input + backward_weight`.
    pub backward_weight: f64,
}

/// The times of a program's passes and messages, all in the same unit.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// The times of each stage (not of each rank).
    pub stages: Vec<StageTimes>,
    /// The time of one message.
    pub message: f64,
    /// The send mode, which decides which ranks wait for a message.
    pub send_mode: SendMode,
}

impl Costs {
    /// Returns costs with equal times for all stages and with blocking messages that take no time.
    pub fn uniform(shape: PipelineShape, times: StageTimes) -> Self {
        Self { stages: vec![times; shape.stages()], message: 0.0, send_mode: SendMode::Blocking }
    }

    /// Returns the time of one pass through `stage`.
    pub(super) fn time(&self, computation: ComputationType, stage: usize) -> f64 {
        let StageTimes { forward, backward_input, backward_weight } = self.stages[stage];
        match computation {
            ComputationType::Forward => forward,
            ComputationType::Backward => backward_input + backward_weight,
            ComputationType::BackwardInput => backward_input,
            ComputationType::BackwardWeight => backward_weight,
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

    /// Returns the time that each rank is idle between the start of its own first pass and the end of its own last. The
    /// papers on zero-bubble schedules mean this time; [`Timeline::bubble_fraction`] also counts the time before and
    /// after, which a rank loses too if the step ends with a sum over all ranks.
    pub fn idle_within(&self) -> Vec<f64> {
        let idle = |rank: &Vec<TimedAction>| {
            let busy: f64 = rank.iter().map(|span| span.end - span.start).sum();
            rank.first().zip(rank.last()).map_or(0.0, |(first, last)| last.end - first.start - busy)
        };
        self.ranks.iter().map(idle).collect()
    }
}
