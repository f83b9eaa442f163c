//! The instructions of a rank.

use std::fmt;

/// The computation of an action, as in `torch.distributed.pipelining`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ComputationType {
    /// The forward pass (torch: `F`): takes and returns activations.
    Forward,
    /// The full backward pass (torch: `B`): takes the gradient of the output, returns the gradient of the input.
    Backward,
    /// The first half of a backward pass (torch: `I`): takes the gradient of the output, returns the gradient of the
    /// input, and puts off the gradients of the weights.
    BackwardInput,
    /// The second half of a backward pass (torch: `W`): computes the gradients of the weights that `BackwardInput` has
    /// put off. It exchanges nothing with other stages.
    BackwardWeight,
}

impl ComputationType {
    /// Returns torch's letter, by which schedules in CSV and traces name the pass.
    pub fn letter(self) -> char {
        match self {
            Self::Forward => 'F',
            Self::Backward => 'B',
            Self::BackwardInput => 'I',
            Self::BackwardWeight => 'W',
        }
    }

    /// Returns the computation with torch's `letter`.
    pub(super) fn from_letter(letter: char) -> Option<Self> {
        [Self::Forward, Self::Backward, Self::BackwardInput, Self::BackwardWeight]
            .into_iter()
            .find(|computation| computation.letter() == letter)
    }
}

/// One pass of one micro-batch through one of the chunks of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Action {
    /// The computation.
    pub computation: ComputationType,
    /// The index of the chunk, counted within its rank.
    pub chunk: usize,
    /// The index of the micro-batch within the batch.
    pub micro_batch: usize,
}

impl Action {
    /// Returns the forward pass of `micro_batch` through `chunk`.
    pub fn forward(chunk: usize, micro_batch: usize) -> Self {
        Self { computation: ComputationType::Forward, chunk, micro_batch }
    }

    /// Returns the backward pass of `micro_batch` through `chunk`.
    pub fn backward(chunk: usize, micro_batch: usize) -> Self {
        Self { computation: ComputationType::Backward, chunk, micro_batch }
    }

    /// Returns the input half of the backward pass of `micro_batch` through `chunk`.
    pub fn backward_input(chunk: usize, micro_batch: usize) -> Self {
        Self { computation: ComputationType::BackwardInput, chunk, micro_batch }
    }

    /// Returns the weight half of the backward pass of `micro_batch` through `chunk`.
    pub fn backward_weight(chunk: usize, micro_batch: usize) -> Self {
        Self { computation: ComputationType::BackwardWeight, chunk, micro_batch }
    }

    /// Returns the action of the same rank that must come before this one.
    pub(super) fn prerequisite(self) -> Option<Self> {
        let computation = match self.computation {
            ComputationType::Forward => return None,
            ComputationType::Backward | ComputationType::BackwardInput => ComputationType::Forward,
            ComputationType::BackwardWeight => ComputationType::BackwardInput,
        };
        Some(Self { computation, ..self })
    }

    /// Returns the action with `BackwardInput` as `Backward`. Both exchange the same gradients, so one stage may run a
    /// backward pass in one and its neighbour in two.
    pub(super) fn message_key(self) -> Self {
        match self.computation {
            ComputationType::BackwardInput => Self { computation: ComputationType::Backward, ..self },
            _ => self,
        }
    }
}

/// An action with the rank that runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct RankAction {
    /// The rank.
    pub(super) rank: usize,
    /// The action.
    pub(super) action: Action,
}

impl RankAction {
    /// Returns the pair with [`Action::message_key`].
    pub(super) fn message_key(self) -> Self {
        Self { action: self.action.message_key(), ..self }
    }
}

/// One instruction of a rank. DeepSpeed (`runtime/pipe/schedule.py`) has one class per computation, where this type has
/// a field:
///
/// | here | `ComputationType::Forward` | `ComputationType::Backward`, `BackwardInput` |
/// |---|---|---|
/// | `Compute` | ForwardPass | BackwardPass |
/// | `Send` | SendActivation | SendGrad |
/// | `Recv` | RecvActivation | RecvGrad |
///
/// DeepSpeed's LoadMicroBatch is part of `Compute`: the forward pass of the first stage has no input but the
/// micro-batch, and that of the last stage includes the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Instruction {
    /// Runs this action.
    Compute(Action),
    /// Sends the output of `action`, activations or gradients, to rank `to`.
    Send {
        /// The action of this rank whose output is sent.
        action: Action,
        /// The rank of the next stage (activations) or the previous stage (gradients).
        to: usize,
    },
    /// Receives the input of `action`, activations or gradients, from rank `from`.
    Recv {
        /// The action of this rank whose input is received.
        action: Action,
        /// The rank of the previous stage (activations) or the next stage (gradients).
        from: usize,
    },
    /// Sums the gradients of tied parameters, such as an embedding that is also the head. Before: each rank with a copy
    /// of the parameter holds its part of the gradient. After: each of them holds the sum.
    ReduceTiedGradients,
    /// Sums the gradients over the data-parallel replicas of this rank.
    ReduceGradients,
    /// Runs the optimizer step on the parameters of this rank.
    OptimizerStep,
}

impl Instruction {
    /// The instructions at the end of every rank's list, in this order.
    pub(super) const CLOSING: [Self; 3] = [Self::ReduceTiedGradients, Self::ReduceGradients, Self::OptimizerStep];

    /// Returns the action that the instruction runs, or whose input or output it transfers.
    pub(super) fn action(self) -> Option<Action> {
        match self {
            Self::Compute(action) | Self::Send { action, .. } | Self::Recv { action, .. } => Some(action),
            _ => None,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}(chunk {}, micro-batch {})", self.computation, self.chunk, self.micro_batch)
    }
}

impl fmt::Display for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compute(action) => write!(f, "{action}"),
            Self::Send { action, to } => write!(f, "the send to rank {to} of the output of {action}"),
            Self::Recv { action, from } => write!(f, "the receive from rank {from} of the input of {action}"),
            closing => write!(f, "{closing:?}"),
        }
    }
}
