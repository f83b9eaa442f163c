//! The shape of a pipeline: which rank holds which stage, and which stage gets whose output.

use super::{Action, ComputationType, PipelineError, RankAction};
use std::collections::HashSet;

/// The placement of stages on ranks (torch: the style of `generate_stage_to_rank_mapping`). In both, stage `s` is chunk
/// `s / ranks` of its rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Placement {
    /// Every chunk goes from the first rank to the last: stage `s` is on rank `s mod ranks` (Narayanan et al., 2021,
    /// arXiv:2104.04473, section 2.2).
    #[default]
    Loop,
    /// Every second chunk goes back from the last rank to the first: with two chunks, rank `r` has the stages `r` and
    /// `2 · ranks - 1 - r` (Qi et al., 2023, arXiv:2401.10241, section 6). The turn needs no message.
    V,
}

/// The shape of a pipeline: `ranks · chunks` stages in a [`Placement`], and `micro_batches` per batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PipelineShape {
    ranks: usize,
    chunks: usize,
    micro_batches: usize,
    placement: Placement,
}

impl PipelineShape {
    /// Creates the shape of a pipeline of `ranks` ranks with `chunks` chunks each, placed as [`Placement::Loop`].
    ///
    /// # Errors
    /// If one of them is 0.
    pub fn new(ranks: usize, chunks: usize, micro_batches: usize) -> Result<Self, PipelineError> {
        for (field, value) in [("ranks", ranks), ("chunks", chunks), ("micro_batches", micro_batches)] {
            if value == 0 {
                return Err(PipelineError::Setting { field, expected: "at least 1".to_owned(), found: "0".to_owned() });
            }
        }
        Ok(Self { ranks, chunks, micro_batches, placement: Placement::Loop })
    }

    /// Returns the shape with its stages placed as `placement`. With one rank or one chunk both placements are the same,
    /// and the shape keeps [`Placement::Loop`].
    pub fn with_placement(self, placement: Placement) -> Self {
        let alike = self.ranks == 1 || self.chunks == 1;
        Self { placement: if alike { Placement::Loop } else { placement }, ..self }
    }

    /// Returns the placement of the stages on the ranks.
    pub fn placement(self) -> Placement {
        self.placement
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
    pub fn stage_index(self, rank: usize, chunk: usize) -> usize {
        chunk * self.ranks + self.mirrored(rank, chunk)
    }

    /// Returns the rank of a stage.
    pub fn stage_rank(self, stage: usize) -> usize {
        self.mirrored(stage % self.ranks, stage / self.ranks)
    }

    /// Returns the chunk of its rank that a stage is.
    pub fn stage_chunk(self, stage: usize) -> usize {
        stage / self.ranks
    }

    /// Returns the rank at a place within `chunk`, or the place of a rank.
    fn mirrored(self, rank: usize, chunk: usize) -> usize {
        let back = self.placement == Placement::V && !chunk.is_multiple_of(2);
        if back { self.ranks - 1 - rank } else { rank }
    }

    /// Returns the action that produces the input of `action` on `rank`; `None` for the forward pass of the first stage,
    /// the backward pass of the last stage, and passes that only compute gradients of weights. The producer of a
    /// gradient has the computation of `action`; the neighbour may run the other of `Backward` and `BackwardInput`.
    pub(super) fn producer(self, rank: usize, action: Action) -> Option<RankAction> {
        let stage = self.stage_index(rank, action.chunk);
        self.at_stage(
            action,
            if action.computation == ComputationType::Forward { stage.checked_sub(1)? } else { stage + 1 },
        )
    }

    /// Returns the action that consumes the output of `action` on `rank`; `None` for the forward pass of the last stage,
    /// the backward pass of the first stage, and passes that only compute gradients of weights. See
    /// [`PipelineShape::producer`] for its computation.
    pub(super) fn consumer(self, rank: usize, action: Action) -> Option<RankAction> {
        let stage = self.stage_index(rank, action.chunk);
        self.at_stage(
            action,
            if action.computation == ComputationType::Forward { stage + 1 } else { stage.checked_sub(1)? },
        )
    }

    /// Returns all actions of a rank of which `found` are known: for every micro-batch and chunk a forward pass, and a
    /// backward pass in one, or in two if `found` has one of its halves.
    pub(super) fn actions(self, found: impl IntoIterator<Item = Action>) -> impl Iterator<Item = Action> {
        let half = |action: &Action| {
            matches!(action.computation, ComputationType::BackwardInput | ComputationType::BackwardWeight)
        };
        let halved: HashSet<_> =
            found.into_iter().filter(half).map(|action| (action.chunk, action.micro_batch)).collect();
        let places = (0..self.chunks).flat_map(move |chunk| (0..self.micro_batches).map(move |m| (chunk, m)));
        places.flat_map(move |(chunk, m)| {
            let backward = if halved.contains(&(chunk, m)) {
                [Some(Action::backward_input(chunk, m)), Some(Action::backward_weight(chunk, m))]
            } else {
                [Some(Action::backward(chunk, m)), None]
            };
            std::iter::once(Action::forward(chunk, m)).chain(backward.into_iter().flatten())
        })
    }

    /// Returns `action` at another stage, if there is one and the action exchanges something with it.
    fn at_stage(self, action: Action, stage: usize) -> Option<RankAction> {
        let exists = stage < self.stages() && action.computation != ComputationType::BackwardWeight;
        let (rank, chunk) = (self.stage_rank(stage), self.stage_chunk(stage));
        exists.then_some(RankAction { rank, action: Action { chunk, ..action } })
    }
}
