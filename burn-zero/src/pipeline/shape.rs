//! The shape of a pipeline: which rank holds which stage, and which stage gets whose output.

use super::{Action, ComputationType, PipelineError, RankAction};

/// The shape of a pipeline: `ranks · chunks` stages and `micro_batches` per batch. Stage `s` is chunk `s / ranks` of
/// rank `s mod ranks` (the looped placement of Narayanan et al., 2021, arXiv:2104.04473, section 2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PipelineShape {
    ranks: usize,
    chunks: usize,
    micro_batches: usize,
}

impl PipelineShape {
    /// Creates the shape of a pipeline of `ranks` ranks with `chunks` chunks each.
    ///
    /// # Errors
    /// If one of them is 0.
    pub fn new(ranks: usize, chunks: usize, micro_batches: usize) -> Result<Self, PipelineError> {
        for (field, value) in [("ranks", ranks), ("chunks", chunks), ("micro_batches", micro_batches)] {
            if value == 0 {
                return Err(PipelineError::Setting { field, expected: "at least 1".to_owned(), found: "0".to_owned() });
            }
        }
        Ok(Self { ranks, chunks, micro_batches })
    }

    /// Returns the number of ranks.
    pub fn ranks(self) -> usize {
        self.ranks
    }

    /// Returns the number of chunks per rank.
    pub fn chunks(self) -> usize {
        self.chunks
    }

    /// Returns the number of micro-batches per batch.
    pub fn micro_batches(self) -> usize {
        self.micro_batches
    }

    /// Returns the number of stages.
    pub fn stages(self) -> usize {
        self.ranks * self.chunks
    }

    /// Returns the index of the stage that is `chunk` of `rank`.
    pub(super) fn stage_index(self, rank: usize, chunk: usize) -> usize {
        chunk * self.ranks + rank
    }

    /// Returns the action that produces the input of `action` on `rank`; `None` for the forward pass of the first stage
    /// and the backward pass of the last stage.
    pub(super) fn producer(self, rank: usize, action: Action) -> Option<RankAction> {
        self.neighbour(rank, action, action.computation == ComputationType::Backward)
    }

    /// Returns the action that consumes the output of `action` on `rank`; `None` for the forward pass of the last stage
    /// and the backward pass of the first stage.
    pub(super) fn consumer(self, rank: usize, action: Action) -> Option<RankAction> {
        self.neighbour(rank, action, action.computation == ComputationType::Forward)
    }

    /// Returns all actions of a rank: the forward and the backward pass of every micro-batch through every chunk.
    pub(super) fn actions(self) -> impl Iterator<Item = Action> {
        (0..self.chunks).flat_map(move |chunk| {
            (0..self.micro_batches).flat_map(move |m| [Action::forward(chunk, m), Action::backward(chunk, m)])
        })
    }

    /// Returns the fraction of all ranks' time that is idle if all stages take the same time and messages take none:
    /// `(ranks - 1) / (chunks · micro_batches + ranks - 1)` for each schedule of this module. (Section 2.2 of the paper
    /// divides by the busy time instead: `(ranks - 1) / (chunks · micro_batches)`.)
    pub fn bubble_fraction(self) -> f64 {
        let idle = (self.ranks - 1) as f64;
        idle / ((self.chunks * self.micro_batches) as f64 + idle)
    }

    fn neighbour(self, rank: usize, action: Action, up: bool) -> Option<RankAction> {
        let stage = self.stage_index(rank, action.chunk);
        let stage = if up { stage + 1 } else { stage.checked_sub(1)? };
        let action = Action { chunk: stage / self.ranks, ..action };
        (stage < self.stages()).then_some(RankAction { rank: stage % self.ranks, action })
    }
}
