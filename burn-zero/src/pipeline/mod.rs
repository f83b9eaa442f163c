//! Pipeline schedules as values: who computes what when, checked, costed, drawn, before a single tensor exists.
//!
//! ```text
//!  Kind + Layout ─► Schedule ─► Program ──► an executor, one instruction after the other
//!  CSV ───────────►  rank × slot  per rank: compute, send, receive, reduce, step
//!                      │            │
//!                      ├─► CSV, SVG ├─► validate: order, dependencies, messages, deadlock
//!                                   └─► simulate: makespan, bubble, live activations ─► SVG
//! ```
//!
//! The key decision: messages go over the wire in one global order, that of the slots in which they were made. Each rank's
//! sends and receives follow that order, so the oldest message not yet sent is the next communication of both its ends, and no
//! schedule can deadlock, even if every send waits for its receive and no rank can do two things at once. The cost: a rank
//! takes a message when it is made, not when it is needed. GPipe and 1F1B lose nothing by that. The interleaved schedule does if
//! backward passes take longer than forward passes (up to a quarter more time for twice as long, none with
//! [`Transport::Buffered`], where receives come as late as they can).
//!
//! A micro-batch passes `ranks · chunks` stages; stage `s` lives on rank `s mod ranks` as that rank's chunk `s / ranks`.
//!
//! ```
//! use burn_zero::pipeline::{Costs, Kind, Layout, Schedule, Transport};
//!
//! let layout = Layout::new(4, 1, 8)?; // 4 ranks, 1 chunk each, 8 micro-batches
//! let program = Schedule::new(Kind::OneFOneB, layout)?.program(Transport::Blocking);
//! program.validate(Transport::Blocking)?;
//! let timeline = program.simulate(&Costs::uniform(layout, 1.0, 2.0))?;
//! assert_eq!(timeline.makespan(), (8.0 + 3.0) * 3.0);
//! assert_eq!(program.peak_live(), [4, 3, 2, 1]);
//! # Ok::<(), burn_zero::pipeline::ScheduleError>(())
//! ```

mod cost;
mod csv;
mod draw;
mod error;
mod instruction;
mod kind;
mod layout;
mod partition;
mod program;
mod schedule;
mod simulate;
#[cfg(test)]
mod tests;
mod validate;

pub use cost::{Costs, Span, Timeline, Transport};
pub use error::ScheduleError;
pub use instruction::{Instruction, Pass, Work};
pub use kind::Kind;
pub use layout::Layout;
pub use partition::Partition;
pub use program::Program;
pub use schedule::Schedule;
