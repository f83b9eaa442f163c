//! The training engine: a model as a list of segments that hand over their gradients one segment at a time, optimizers,
//! learning-rate schedules and communicators, and on top of them ZeRO and ZeRO-Offload. The crate knows no particular
//! model.
//!
//! ```text
//!  batch ─► segment 0 ─► segment 1 ─► … ─► head + loss      each on autodiff leaves cut from its inputs
//!              ▲             ▲                  │
//!              └── dy ◄──────┴───── dy ◄────────┘            backward, one segment at a time
//!                  │             │              │
//!                  └─ gradients ─┴─ gradients ──┴─► buckets ─► reduce_scatter ─► clip by global norm ─► optimizer
//!                                                   from stage 2 on: while the next         │ on the shards of
//!                                                   segment computes                        │ this rank
//!  weights ◄─ all_gather ◄─ shards ◄────────────────────────────────────────────────────────┘
//!  after the step (stages 1, 2) or around each segment (stage 3)
//! ```
//! Without clipping no update has to wait for the norm: a bucket is updated while the earlier segments run their
//! backward pass.
//!
//! The first key decision: the driver, not the autodiff engine, walks the layers. So the gradients of a layer are
//! computed, handed over and freed before those of the next layer are computed; the graph of a segment is kept or
//! recomputed as configured (activation checkpointing); and whatever has to happen between two layers, such as a
//! collective, happens outside autodiff, which in Burn 0.21 cannot contain it. The cost is one product of the size of a
//! segment's output per segment.
//!
//! The second: what is sharded among the ranks is a value ([`ZeroStage`]), and a world of one process runs
//! the same code as any other; its collectives are the identity. Sums are added in rank order and the global norm is
//! exact, so that the result does not depend on the number of ranks, bit for bit. The cost is that sums wait for the
//! slowest rank, as they would anyway, and pass through host memory, also on CUDA.
//!
//! | what | where |
//! |---|---|
//! | training on one rank, ZeRO stages 0 to 3, checkpoints that a world of any size resumes | [`EngineConfig`], [`Engine`] |
//! | optimizer states on the host or in a file | [`EngineConfig::with_optimizer_states_in`] |
//! | ZeRO stages 0 to 2 for a plain Burn loop | [`ShardedOptimizer`] |
//! | ranks as threads, as processes under `mpirun` (feature `mpi`) | [`comm`] |
//! | the settings of DeepSpeed and FSDP | [`ds_config`] |
//! | memory estimates before anything is allocated | [`estimate`] |
//! | pipeline schedules as values | [`pipeline`] |
//! | training in a pipeline, beside ZeRO stages 0 to 2 | [`EngineConfig::with_pipeline`] |
//!
//! ```
//! use burn_zero::lr_schedule::{LrKind, LrSchedule};
//!
//! let schedule = LrSchedule { kind: LrKind::Cosine, peak: 2e-4, warmup: 10, total: 110 };
//! assert_eq!(schedule.at(0), 0.0);
//! assert_eq!(schedule.at(10), 2e-4);
//! assert!(schedule.at(110) < 1e-12);
//! ```
#![deny(missing_docs)]

mod backend;
mod bucket;
pub mod comm;
mod compute_lock;
pub mod ds_config;
mod engine;
mod error;
pub mod estimate;
mod gather;
mod host_or_device;
pub mod lr_schedule;
mod mesh;
mod norm;
mod offload;
pub mod optimizer;
pub mod pipeline;
pub mod precision;
mod reduce;
pub mod segment;
mod sharded_optimizer;
mod sharding;
mod stage;
mod trace;
mod worker;

pub use engine::{Engine, EngineConfig, PipelineConfig, StepReport, TrainStepOutput, consolidate, restore_weights};
pub use error::{CheckpointError, CommError, ConfigError, Error, NumericError};
pub use mesh::MeshTraffic;
pub use offload::{MemoryTier, OffloadDevice};
pub use reduce::PeakMemory;
pub use sharded_optimizer::{ElementWise, ShardedOptimizer};
pub use sharding::{ALIGN, Sharding};
pub use stage::ZeroStage;
