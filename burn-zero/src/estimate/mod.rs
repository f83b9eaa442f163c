//! How much memory a run will need, before it starts: pure arithmetic over counts.
//!
//! [`states`] is what weights, gradients and optimizer need on one rank, [`Shape::activations`] what a LLaMA's layers keep for
//! the backward pass; [`zero2`] and [`zero3`] are DeepSpeed's own estimates, which leave activations out.
//!
//! ```
//! use burn_zero::ds_config::Stage;
//! use burn_zero::estimate::{Numbers, Placement, Weights, states};
//!
//! let weights = Weights { trained: 7_500_000_000, ..Default::default() };
//! let placement = Placement { stage: Stage::Gradients, world: 64, ..Default::default() };
//! let memory = states(weights, Numbers::Mixed, placement);
//! assert_eq!(memory.device() / 100_000_000, 166, "16.6 GB: 2 + 14 / 64 bytes for each weight");
//! ```

mod activations;
mod deepspeed;
mod states;

pub use activations::{Activations, LOGITS, Recompute, Shape};
pub use deepspeed::{Estimate, Nodes, Offload, zero2, zero3};
pub use states::{Memory, Numbers, Placement, Weights, states};
