//! The schedules by name: the slot or the order that each gives to a rank's work.

use super::{Layout, Pass, ScheduleError, Work};

/// A schedule's name, as PyTorch and torchtitan write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `GPipe` (Huang et al., 2019, arXiv:1811.06965): all forward passes, then all backward passes.
    GPipe,
    /// `1F1B`: a backward pass as soon as there can be one. DeepSpeed's TrainSchedule, slot by slot.
    OneFOneB,
    /// `Interleaved1F1B` (Narayanan et al., 2021, arXiv:2104.04473, section 2.2): several chunks per rank divide the bubble by
    /// their number and multiply the messages by it.
    Interleaved1F1B,
}

impl std::str::FromStr for Kind {
    type Err = ScheduleError;

    fn from_str(name: &str) -> Result<Self, ScheduleError> {
        Ok(match name {
            "GPipe" => Self::GPipe,
            "1F1B" => Self::OneFOneB,
            "Interleaved1F1B" => Self::Interleaved1F1B,
            found => {
                return Err(ScheduleError::Setting {
                    field: "pipeline_parallel_schedule",
                    expected: "GPipe, 1F1B or Interleaved1F1B".to_owned(),
                    found: found.to_owned(),
                });
            }
        })
    }
}

impl Kind {
    /// Whether this schedule exists for `layout`.
    ///
    /// # Errors
    /// If GPipe or 1F1B is asked for several chunks, or the interleaved schedule for a number of micro-batches that is no
    /// multiple of the ranks.
    pub fn check(self, layout: Layout) -> Result<(), ScheduleError> {
        let refused =
            |field, expected, found: usize| ScheduleError::Setting { field, expected, found: found.to_string() };
        let (ranks, micro_batches) = (layout.ranks(), layout.micro_batches());
        if self != Self::Interleaved1F1B && layout.chunks() != 1 {
            return Err(refused("chunks", format!("1 for {self:?} (Interleaved1F1B takes more)"), layout.chunks()));
        }
        if self == Self::Interleaved1F1B && !micro_batches.is_multiple_of(ranks) {
            return Err(refused("micro_batches", format!("a multiple of the {ranks} ranks"), micro_batches));
        }
        Ok(())
    }

    /// The largest number of activations, counted in chunks of one micro-batch, that `rank` keeps at a time.
    pub fn live_bound(self, layout: Layout, rank: usize) -> usize {
        let all = layout.chunks() * layout.micro_batches();
        match self {
            Self::GPipe => all,
            Self::OneFOneB => all.min(layout.ranks() - rank),
            Self::Interleaved1F1B => all.min(warm_up(layout, rank) + 1),
        }
    }
}

/// GPipe's slot of a work: a wave of forward passes down the stages, then one of backward passes up.
pub(super) fn gpipe_slot(layout: Layout, rank: usize, work: Work) -> usize {
    let (ranks, micro_batches) = (layout.ranks(), layout.micro_batches());
    match work.pass {
        Pass::Forward => rank + work.micro_batch,
        Pass::Backward => micro_batches + 2 * (ranks - 1) - rank + work.micro_batch,
    }
}

/// 1F1B's slot of a work. DeepSpeed's four formulas, by parity of slot and stage, solved for the slot are these two. A message is
/// used in the slot after the one in which it was made, so nobody keeps it.
pub(super) fn one_f_one_b_slot(layout: Layout, rank: usize, work: Work) -> usize {
    match work.pass {
        Pass::Forward => 2 * work.micro_batch + rank,
        Pass::Backward => 2 * work.micro_batch + 2 * layout.ranks() - 1 - rank,
    }
}

/// The order of a rank's work in interleaved 1F1B: forward passes alone, forward and backward passes in turns, backward passes
/// alone.
pub(super) fn interleaved_order(layout: Layout, rank: usize) -> Vec<Work> {
    let all = layout.chunks() * layout.micro_batches();
    let warm_up = warm_up(layout, rank).min(all);
    let mut order: Vec<_> = (0..warm_up).map(|k| nth(layout, Pass::Forward, k)).collect();
    for k in warm_up..all {
        order.extend([nth(layout, Pass::Forward, k), nth(layout, Pass::Backward, k - warm_up)]);
    }
    order.extend((all - warm_up..all).map(|k| nth(layout, Pass::Backward, k)));
    order
}

/// How many forward passes come before the first backward pass follows one. With one chunk there is no way round the ranks to
/// wait for, and the schedule is 1F1B.
fn warm_up(layout: Layout, rank: usize) -> usize {
    let behind = layout.ranks() - 1 - rank;
    if layout.chunks() == 1 { behind } else { 2 * behind + (layout.chunks() - 1) * layout.ranks() }
}

/// A rank's `k`-th forward or backward pass: groups of as many micro-batches as ranks pass one chunk after the other.
fn nth(layout: Layout, pass: Pass, k: usize) -> Work {
    let (ranks, chunks) = (layout.ranks(), layout.chunks());
    let (group, within) = (k / (ranks * chunks), k % (ranks * chunks));
    let chunk = match pass {
        Pass::Forward => within / ranks,
        Pass::Backward => chunks - 1 - within / ranks,
    };
    Work { pass, chunk, micro_batch: group * ranks + within % ranks }
}
