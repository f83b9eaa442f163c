//! What a rank can be told to do.

use std::fmt;

/// The direction in which a micro-batch passes a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Pass {
    /// Activations in, activations out.
    Forward,
    /// The gradient of the output in, the gradient of the input out.
    Backward,
}

/// One pass of one micro-batch through one of a rank's chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Work {
    /// The direction.
    pub pass: Pass,
    /// The chunk of the model, counted within its rank.
    pub chunk: usize,
    /// The micro-batch, counted within the batch.
    pub micro_batch: usize,
}

impl Work {
    /// The forward pass of `micro_batch` through the rank's `chunk`.
    pub fn forward(chunk: usize, micro_batch: usize) -> Self {
        Self { pass: Pass::Forward, chunk, micro_batch }
    }

    /// The backward pass of `micro_batch` through the rank's `chunk`.
    pub fn backward(chunk: usize, micro_batch: usize) -> Self {
        Self { pass: Pass::Backward, chunk, micro_batch }
    }
}

/// One instruction of a rank. DeepSpeed (`runtime/pipe/schedule.py`) has a name for each direction, here a value:
///
/// | here | `Pass::Forward` | `Pass::Backward` |
/// |---|---|---|
/// | `Compute` | ForwardPass | BackwardPass |
/// | `Send` | SendActivation | SendGrad |
/// | `Recv` | RecvActivation | RecvGrad |
///
/// DeepSpeed's LoadMicroBatch is part of computing: the first stage's forward pass has no input but the micro-batch, and the last
/// stage's holds the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Instruction {
    /// Do this work.
    Compute(Work),
    /// Send the output of this rank's `work`, activations or gradients, to rank `to`.
    Send {
        /// The work whose output goes out.
        work: Work,
        /// The rank with the next stage (forward) or the one before (backward).
        to: usize,
    },
    /// Receive the input of this rank's `work`, activations or gradients, from rank `from`.
    Recv {
        /// The work whose input comes in.
        work: Work,
        /// The rank with the stage before (forward) or the next one (backward).
        from: usize,
    },
    /// Before: each rank with a copy of a tied parameter (the embedding that is also the head) holds its part of the gradient.
    /// After: each of them holds the sum.
    ReduceTiedGradients,
    /// Sum gradients over the data-parallel replicas of this rank.
    ReduceGradients,
    /// Let the optimizer change this rank's parameters.
    OptimizerStep,
}

impl Instruction {
    /// What ends every rank's list, in this order.
    pub const CLOSING: [Self; 3] = [Self::ReduceTiedGradients, Self::ReduceGradients, Self::OptimizerStep];

    /// The work that it does, sends or receives for.
    pub fn work(self) -> Option<Work> {
        match self {
            Self::Compute(work) | Self::Send { work, .. } | Self::Recv { work, .. } => Some(work),
            _ => None,
        }
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}(chunk {}, micro-batch {})", self.pass, self.chunk, self.micro_batch)
    }
}

impl fmt::Display for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compute(work) => write!(f, "{work}"),
            Self::Send { work, to } => write!(f, "the send to rank {to} of the output of {work}"),
            Self::Recv { work, from } => write!(f, "the receive from rank {from} of the input of {work}"),
            closing => write!(f, "{closing:?}"),
        }
    }
}
