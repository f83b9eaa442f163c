//! The stages of one rank of a pipeline.

use crate::pipeline::Program;
use std::ops::Range;

/// The stages that one rank of a pipeline runs, and how much its schedule keeps of them.
///
/// ```
/// use burn_zero::{estimate::RankStages, pipeline::*};
///
/// let shape = PipelineShape::new(2, 1, 4)?;
/// let program = PipelineSchedule::new(PipelineKind::OneFOneB, shape)?.program(SendMode::Buffered);
/// let ranks = RankStages::of_program(&program, &[0..3, 3..6]);
/// assert_eq!(ranks[0].segments, [0..3]);
/// assert_eq!((ranks[0].live, ranks[1].live), (2, 1));
/// # Ok::<(), PipelineError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankStages {
    /// The segments of each stage.
    pub segments: Vec<Range<usize>>,
    /// The largest number of stages and micro-batches that are between their two passes,
    /// [`Program::peak_live_activations`](crate::pipeline::Program::peak_live_activations).
    pub live: u64,
    /// The same up to the pass that computes the gradients of weights,
    /// [`Program::peak_kept_activations`](crate::pipeline::Program::peak_kept_activations).
    pub kept: u64,
}

impl RankStages {
    /// Returns the only rank of a pipeline of one, for a model of `segments` segments.
    pub fn whole(segments: usize) -> Self {
        Self { segments: std::iter::once(0..segments).collect(), live: 1, kept: 1 }
    }

    /// Returns every rank of a pipeline; `segments` are those of each stage.
    pub fn of_program(program: &Program, segments: &[Range<usize>]) -> Vec<Self> {
        let shape = program.shape;
        let (live, kept) = (program.peak_live_activations(), program.peak_kept_activations());
        let own = |rank| {
            let stages = (0..shape.chunks()).map(|chunk| segments[shape.stage_index(rank, chunk)].clone());
            Self { segments: stages.collect(), live: live[rank] as u64, kept: kept[rank] as u64 }
        };
        (0..shape.ranks()).map(own).collect()
    }

    /// Returns true if the rank runs a segment.
    pub(super) fn holds(&self, segment: usize) -> bool {
        self.segments.iter().any(|stage| stage.contains(&segment))
    }

    /// Returns the bytes of `count` stages and micro-batches, where `bytes` are those of one micro-batch in all stages.
    pub(super) fn of_live(&self, bytes: u64, count: u64) -> u64 {
        (bytes * count).div_ceil(self.segments.len().max(1) as u64)
    }
}
