//! The training engine: a model as a list of segments, gradients handed over segment by segment, an optimizer, schedules and
//! communicators. It knows no model.
//!
//! ```text
//!  batch ─► segment 0 ─► segment 1 ─► … ─► head + loss        each on autodiff leaves cut from its inputs
//!              ▲             ▲                  │
//!              └── dy ◄──────┴───── dy ◄────────┘              backward, one segment at a time
//!                  │             │              │
//!                  └─ gradients ─┴─ gradients ──┴──► sink ─► clip by global norm ─► AdamW ─► model
//! ```
//!
//! The key decision: the driver, not the autodiff engine, walks the layers. So a layer's gradients exist, are handed over and
//! are freed before the next layer's are made; a segment's graph is kept or made again as asked (activation checkpointing);
//! and whatever has to happen between two layers, a collective for instance, happens outside autodiff, which in Burn 0.21
//! cannot hold it. The cost is one product of the size of a segment's output per segment.
//!
//! A world of one process is a communicator like any other ([`comm::Solo`]), not a branch.
//!
//! ```
//! use burn_zero::schedule::{Kind, Schedule};
//!
//! let schedule = Schedule { kind: Kind::Cosine, peak: 2e-4, warmup: 10, total: 110 };
//! assert_eq!(schedule.at(0), 0.0);
//! assert_eq!(schedule.at(10), 2e-4);
//! assert!(schedule.at(110) < 1e-12);
//! ```
#![deny(missing_docs)]

mod bucket;
pub mod comm;
pub mod ds_config;
mod engine;
mod error;
pub mod estimate;
mod gather;
mod norm;
mod offload;
pub mod optimizer;
mod partition;
pub mod pipeline;
pub mod precision;
mod reduce;
pub mod schedule;
pub mod segment;
mod sharded;

pub use engine::{Engine, StepReport, consolidate};
pub use error::Error;
pub use offload::Tier;
pub use partition::{ALIGN, Sharding};
pub use reduce::Peak;
pub use sharded::{ElementWise, Sharded};
