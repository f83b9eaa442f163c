//! The schedules by name, and the pipelines for which each exists.

use super::{PipelineError, PipelineShape, Placement};

/// The name of a schedule. `Display` writes PyTorch's and torchtitan's names; they are read regardless of case, and so
/// are the names of the papers on zero-bubble schedules.
///
/// Every schedule runs the backward passes of a chunk in ascending micro-batches, so gradients are summed in the order
/// of one process that accumulates the same micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PipelineKind {
    /// `GPipe` (Huang et al., 2019, arXiv:1811.06965): all forward passes, then all backward passes.
    GPipe,
    /// `1F1B`: every backward pass as early as possible. Equal to DeepSpeed's TrainSchedule, slot by slot.
    OneFOneB,
    /// `Interleaved1F1B` (Narayanan et al., 2021, arXiv:2104.04473, section 2.2): with `v` chunks per rank the bubble
    /// is `v` times smaller and there are `v` times as many messages.
    Interleaved1F1B,
    /// `LoopedBFS` (Lamy-Poirier, 2022, arXiv:2211.05953): GPipe with `v` chunks per rank, one chunk after the other.
    /// PyTorch runs the backward passes of a chunk in descending micro-batches.
    LoopedBFS,
    /// `ZB-H1` (Qi et al., 2023, arXiv:2401.10241): 1F1B whose backward passes run in two halves, so that the gradients
    /// of weights fill the end of the bubble. Equal to PyTorch's `InterleavedZeroBubble` with one stage per rank; that
    /// name stands for this schedule, which takes one chunk per rank only.
    ZBH1,
    /// `ZBV` (Qi et al., 2023, section 6; PyTorch's `ZBVZeroBubble`): two chunks per rank in [`Placement::V`], backward
    /// passes in two halves.
    ZBV,
}

/// The names of the schedules; the first of each is the one that is written.
const NAMES: [(&str, PipelineKind); 8] = [
    ("GPipe", PipelineKind::GPipe),
    ("1F1B", PipelineKind::OneFOneB),
    ("Interleaved1F1B", PipelineKind::Interleaved1F1B),
    ("LoopedBFS", PipelineKind::LoopedBFS),
    ("InterleavedZeroBubble", PipelineKind::ZBH1),
    ("ZBVZeroBubble", PipelineKind::ZBV),
    ("ZB-H1", PipelineKind::ZBH1),
    ("ZBV", PipelineKind::ZBV),
];

impl std::fmt::Display for PipelineKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(NAMES.iter().find(|(_, kind)| kind == self).map_or("", |(name, _)| name))
    }
}

impl std::str::FromStr for PipelineKind {
    type Err = PipelineError;

    fn from_str(name: &str) -> Result<Self, PipelineError> {
        let known = NAMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        known.map(|(_, kind)| *kind).ok_or_else(|| PipelineError::Setting {
            field: "pipeline_parallel_schedule",
            expected: format!("one of {}", NAMES.map(|(name, _)| name).join(", ")),
            found: name.to_owned(),
        })
    }
}

impl PipelineKind {
    /// Returns the placement of the stages that this schedule needs.
    pub fn placement(self) -> Placement {
        if self == Self::ZBV { Placement::V } else { Placement::Loop }
    }

    /// Returns the only number of chunks per rank that this schedule takes; `None` if it takes any.
    pub fn fixed_chunks(self) -> Option<usize> {
        match self {
            Self::GPipe | Self::OneFOneB | Self::ZBH1 => Some(1),
            Self::ZBV => Some(2),
            Self::Interleaved1F1B | Self::LoopedBFS => None,
        }
    }

    /// Checks that this schedule exists for a pipeline of this shape.
    ///
    /// # Errors
    /// If the number of chunks is not [`PipelineKind::fixed_chunks`], the placement is not that of
    /// [`PipelineKind::placement`], or the number of micro-batches of interleaved 1F1B is not a multiple of the number
    /// of ranks.
    pub fn check(self, shape: PipelineShape) -> Result<(), PipelineError> {
        let refused = |field, expected, found: String| Err(PipelineError::Setting { field, expected, found });
        let (ranks, chunks, micro_batches) = (shape.ranks(), shape.chunks(), shape.micro_batches());
        if let Some(fixed) = self.fixed_chunks().filter(|&fixed| fixed != chunks) {
            let others = if fixed == 1 { " (Interleaved1F1B and LoopedBFS take more)" } else { "" };
            return refused("chunks", format!("{fixed} for {self}{others}"), chunks.to_string());
        }
        if shape != shape.with_placement(self.placement()) {
            let (expected, found) = (self.placement(), shape.placement());
            return refused("placement", format!("{expected:?} for {self}"), format!("{found:?}"));
        }
        if self == Self::Interleaved1F1B && !micro_batches.is_multiple_of(ranks) {
            let expected = format!("a multiple of the {ranks} ranks for {self}");
            return refused("micro_batches", expected, micro_batches.to_string());
        }
        Ok(())
    }
}
