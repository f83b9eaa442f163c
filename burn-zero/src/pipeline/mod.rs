//! Pipeline schedules as values: which rank computes what and when. They are validated, simulated and drawn before any
//! tensor exists.
//!
//! ```text
//!  PipelineKind + PipelineShape ─► PipelineSchedule ─► Program ──► an executor, one instruction after the other
//!  CSV ─────────────────────────►     rank × slot      per rank: compute, send, receive, reduce, step
//!                                          │              │
//!                                          ├─► CSV, SVG   ├─► validate: order, dependencies, messages, deadlock
//!                                                         └─► simulate: makespan, bubble, live activations ─► SVG
//! ```
//!
//! The key decision: all messages have one global order, that of the slots that produce them. The sends and receives of
//! each rank follow that order, so the oldest message that has not been sent is the next communication of both its
//! ranks, and no schedule can deadlock, even if every send blocks until its receive and no rank can do two things at
//! once. The cost: a rank receives a message when it is produced, not when it is needed. GPipe and 1F1B lose nothing by
//! that. The interleaved schedule does if backward passes take longer than forward passes: up to a quarter more time if
//! they take twice as long, and none with [`SendMode::Buffered`], where receives come as late as possible. The formulas
//! of ZB-H1 and ZBV hold with [`SendMode::Buffered`].
//!
//! A micro-batch passes `ranks · chunks` stages, which lie on the ranks as [`Placement`] says. A backward pass runs in
//! one, or in two halves: `BackwardInput`, for which the previous stage waits, and `BackwardWeight`, which can run
//! later, when its rank would be idle.
//!
//! ```
//! use burn_zero::pipeline::{Costs, PipelineKind, PipelineSchedule, PipelineShape, SendMode, StageTimes};
//!
//! let shape = PipelineShape::new(4, 1, 8)?; // 4 ranks, 1 chunk each, 8 micro-batches
//! let program = PipelineSchedule::new(PipelineKind::OneFOneB, shape)?.program(SendMode::Blocking);
//! program.validate(SendMode::Blocking)?;
//! let times = StageTimes { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };
//! let timeline = program.simulate(&Costs::uniform(shape, times))?;
//! assert_eq!(timeline.makespan(), (8.0 + 3.0) * 3.0);
//! assert_eq!(program.peak_live_activations(), [4, 3, 2, 1]);
//! # Ok::<(), burn_zero::pipeline::PipelineError>(())
//! ```

mod cost;
mod csv;
mod draw;
mod execute;
mod instruction;
mod kind;
mod order;
mod p2p;
mod partition;
mod program;
mod schedule;
mod shape;
mod simulate;
#[cfg(test)]
mod tests;
mod trace_file;
mod validate;

pub use crate::error::PipelineError;
pub use cost::{Costs, SendMode, StageTimes, TimedAction, Timeline};
pub(crate) use execute::{Executed, Executor, StageView};
use instruction::RankAction;
pub use instruction::{Action, ComputationType, Instruction};
pub use kind::PipelineKind;
pub(crate) use p2p::{P2p, P2pValue};
pub use partition::PartitionMethod;
pub use program::Program;
pub use schedule::PipelineSchedule;
pub use shape::{PipelineShape, Placement};
pub use trace_file::TraceFile;
