//! The schedules by name, with the slot or the order that each gives to the actions of a rank.

use super::{Action, ComputationType, PipelineError, PipelineShape};

/// The name of a schedule, as in PyTorch and torchtitan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PipelineKind {
    /// `GPipe` (Huang et al., 2019, arXiv:1811.06965): all forward passes, then all backward passes.
    GPipe,
    /// `1F1B`: every backward pass as early as possible. Equal to DeepSpeed's TrainSchedule, slot by slot.
    OneFOneB,
    /// `Interleaved1F1B` (Narayanan et al., 2021, arXiv:2104.04473, section 2.2): with `v` chunks per rank the bubble
    /// is `v` times smaller and there are `v` times as many messages.
    Interleaved1F1B,
}

impl std::str::FromStr for PipelineKind {
    type Err = PipelineError;

    fn from_str(name: &str) -> Result<Self, PipelineError> {
        Ok(match name {
            "GPipe" => Self::GPipe,
            "1F1B" => Self::OneFOneB,
            "Interleaved1F1B" => Self::Interleaved1F1B,
            found => {
                return Err(PipelineError::Setting {
                    field: "pipeline_parallel_schedule",
                    expected: "GPipe, 1F1B or Interleaved1F1B".to_owned(),
                    found: found.to_owned(),
                });
            }
        })
    }
}

impl PipelineKind {
    /// Checks that this schedule exists for a pipeline of this shape.
    ///
    /// # Errors
    /// If there are several chunks for GPipe or 1F1B, or the number of micro-batches of the interleaved schedule is not
    /// a multiple of the number of ranks.
    pub fn check(self, shape: PipelineShape) -> Result<(), PipelineError> {
        let refused =
            |field, expected, found: usize| PipelineError::Setting { field, expected, found: found.to_string() };
        let (ranks, micro_batches) = (shape.ranks(), shape.micro_batches());
        if self != Self::Interleaved1F1B && shape.chunks() != 1 {
            return Err(refused("chunks", format!("1 for {self:?} (Interleaved1F1B takes more)"), shape.chunks()));
        }
        if self == Self::Interleaved1F1B && !micro_batches.is_multiple_of(ranks) {
            return Err(refused("micro_batches", format!("a multiple of the {ranks} ranks"), micro_batches));
        }
        Ok(())
    }
}

/// Returns the slot of an action in GPipe: all forward passes from the first stage to the last, then all backward
/// passes.
pub(super) fn gpipe_slot(shape: PipelineShape, rank: usize, action: Action) -> usize {
    let (ranks, micro_batches) = (shape.ranks(), shape.micro_batches());
    match action.computation {
        ComputationType::Forward => rank + action.micro_batch,
        ComputationType::Backward => micro_batches + 2 * (ranks - 1) - rank + action.micro_batch,
    }
}

/// Returns the slot of an action in 1F1B. The two formulas are DeepSpeed's four, by parity of slot and stage, solved
/// for the slot. A message is used in the slot after the one that produced it, so none has to be stored.
pub(super) fn one_f_one_b_slot(shape: PipelineShape, rank: usize, action: Action) -> usize {
    match action.computation {
        ComputationType::Forward => 2 * action.micro_batch + rank,
        ComputationType::Backward => 2 * action.micro_batch + 2 * shape.ranks() - 1 - rank,
    }
}

/// Returns the order of a rank's actions in interleaved 1F1B: a warm-up of forward passes, then forward and backward
/// passes in alternation, then a cool-down of backward passes.
pub(super) fn interleaved_order(shape: PipelineShape, rank: usize) -> Vec<Action> {
    let all = shape.chunks() * shape.micro_batches();
    let warm_up = warmup_passes(shape, rank).min(all);
    let mut order: Vec<_> = (0..warm_up).map(|k| nth_action(shape, ComputationType::Forward, k)).collect();
    for k in warm_up..all {
        order.extend([
            nth_action(shape, ComputationType::Forward, k),
            nth_action(shape, ComputationType::Backward, k - warm_up),
        ]);
    }
    order.extend((all - warm_up..all).map(|k| nth_action(shape, ComputationType::Backward, k)));
    order
}

/// Returns the number of warm-up forward passes, those before the first pair of a forward and a backward pass. With one
/// chunk the schedule is 1F1B.
fn warmup_passes(shape: PipelineShape, rank: usize) -> usize {
    let behind = shape.ranks() - 1 - rank;
    if shape.chunks() == 1 { behind } else { 2 * behind + (shape.chunks() - 1) * shape.ranks() }
}

/// Returns the `k`-th forward or backward pass of a rank: as many micro-batches as there are ranks form a group, which
/// passes one chunk after the other.
fn nth_action(shape: PipelineShape, computation: ComputationType, k: usize) -> Action {
    let (ranks, chunks) = (shape.ranks(), shape.chunks());
    let (group, within) = (k / (ranks * chunks), k % (ranks * chunks));
    let chunk = match computation {
        ComputationType::Forward => within / ranks,
        ComputationType::Backward => chunks - 1 - within / ranks,
    };
    Action { computation, chunk, micro_batch: group * ranks + within % ranks }
}
