//! The training engine: a model as a list of segments, gradients handed over segment by segment, optimizers, schedules,
//! communicators and what they allow: ZeRO and ZeRO-Offload. It knows no model.
//!
//! ```text
//!  batch ─► segment 0 ─► segment 1 ─► … ─► head + loss        each on autodiff leaves cut from its inputs
//!              ▲             ▲                  │
//!              └── dy ◄──────┴───── dy ◄────────┘              backward, one segment at a time
//!                  │             │              │
//!                  └─ gradients ─┴─ gradients ──┴──► buckets ─► reduce_scatter ─► clip by global norm ─► optimizer
//!                                                    stage 2 on: while the next segment computes          │ on this rank's
//!  weights ◄─ all_gather ◄─ pieces ◄──────────────────────────────────────────────────────────────────────┘ pieces
//!  after the step (stages 1, 2) or around each segment (3)
//! ```
//! Without clipping nothing has to wait for the norm: a bucket is updated while the segments before it walk backward.
//!
//! The key decision: the driver, not the autodiff engine, walks the layers. So a layer's gradients exist, are handed over and
//! are freed before the next layer's are made; a segment's graph is kept or made again as asked (activation checkpointing);
//! and whatever has to happen between two layers, a collective for instance, happens outside autodiff, which in Burn 0.21
//! cannot hold it. The cost is one product of the size of a segment's output per segment.
//!
//! The second: what is divided among ranks is a value ([`ds_config::Stage`]), and a world of one process passes the same way as
//! any other, where a collective of one rank is the identity. Sums are taken in the order of ranks and the global norm exactly,
//! so that the result does not depend on the number of ranks, bit for bit. The cost is that sums wait for the slowest rank,
//! as they would anyway, and travel through the host's memory, on CUDA too.
//!
//! | what | where |
//! |---|---|
//! | one rank's training, ZeRO stages 0 to 3, checkpoints that any world resumes | [`Engine`] |
//! | optimizer states on the host or in a file | [`Engine::with_states_in`] |
//! | ZeRO stages 0 to 2 for a plain Burn loop | [`Sharded`] |
//! | ranks as threads, as processes under `mpirun` (feature `mpi`) | [`comm`] |
//! | DeepSpeed's and FSDP's settings | [`ds_config`] |
//! | memory before anything is allocated | [`estimate`] |
//! | pipeline schedules as values | [`pipeline`] |
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
mod held;
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
mod worker;

pub use engine::{Engine, StepReport, consolidate, restore_weights};
pub use error::Error;
pub use offload::Tier;
pub use partition::{ALIGN, Sharding};
pub use reduce::Peak;
pub use sharded::{ElementWise, Sharded};
