//! Which rank holds which stage, and who hands its output to whom.

use super::{Pass, ScheduleError, Work};

/// The sizes of a pipeline: `ranks · chunks` stages, `micro_batches` per batch; stage `s` is chunk `s / ranks` of rank
/// `s mod ranks` (the loop placement of Narayanan et al., 2021, arXiv:2104.04473, section 2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    ranks: usize,
    chunks: usize,
    micro_batches: usize,
}

impl Layout {
    /// A layout of `ranks` ranks with `chunks` chunks each.
    ///
    /// # Errors
    /// If one of them is 0.
    pub fn new(ranks: usize, chunks: usize, micro_batches: usize) -> Result<Self, ScheduleError> {
        for (field, value) in [("ranks", ranks), ("chunks", chunks), ("micro_batches", micro_batches)] {
            if value == 0 {
                return Err(ScheduleError::Setting { field, expected: "at least 1".to_owned(), found: "0".to_owned() });
            }
        }
        Ok(Self { ranks, chunks, micro_batches })
    }

    /// The number of ranks.
    pub fn ranks(self) -> usize {
        self.ranks
    }

    /// The number of chunks of each rank.
    pub fn chunks(self) -> usize {
        self.chunks
    }

    /// The number of micro-batches of a batch.
    pub fn micro_batches(self) -> usize {
        self.micro_batches
    }

    /// The number of stages.
    pub fn stages(self) -> usize {
        self.ranks * self.chunks
    }

    /// The stage that is `chunk` of `rank`.
    pub fn stage(self, rank: usize, chunk: usize) -> usize {
        chunk * self.ranks + rank
    }

    /// The work whose output is the input of `rank`'s `work`, with the rank that does it; none for the first stage's forward
    /// pass and the last stage's backward pass.
    pub fn before(self, rank: usize, work: Work) -> Option<(usize, Work)> {
        self.neighbour(rank, work, work.pass == Pass::Backward)
    }

    /// The work whose input is the output of `rank`'s `work`, with the rank that does it; none for the last stage's forward
    /// pass and the first stage's backward pass.
    pub fn after(self, rank: usize, work: Work) -> Option<(usize, Work)> {
        self.neighbour(rank, work, work.pass == Pass::Forward)
    }

    /// All work of a rank: every micro-batch forward and backward through every chunk.
    pub fn work(self) -> impl Iterator<Item = Work> {
        (0..self.chunks).flat_map(move |chunk| {
            (0..self.micro_batches).flat_map(move |m| [Work::forward(chunk, m), Work::backward(chunk, m)])
        })
    }

    /// The part of all ranks' time that is idle if every stage takes the same time and messages take none:
    /// `(ranks - 1) / (chunks · micro_batches + ranks - 1)` for each schedule of this module. (The paper's section 2.2 divides by
    /// the busy time instead: `(ranks - 1) / (chunks · micro_batches)`.)
    pub fn bubble_fraction(self) -> f64 {
        let idle = (self.ranks - 1) as f64;
        idle / ((self.chunks * self.micro_batches) as f64 + idle)
    }

    fn neighbour(self, rank: usize, work: Work, up: bool) -> Option<(usize, Work)> {
        let stage = self.stage(rank, work.chunk);
        let stage = if up { stage + 1 } else { stage.checked_sub(1)? };
        (stage < self.stages()).then(|| (stage % self.ranks, Work { chunk: stage / self.ranks, ..work }))
    }
}
