//! Estimates of the memory that a run needs, from parameter counts and settings alone.
//!
//! [`model_states`] estimates weights, gradients and optimizer states on one rank, [`LlamaShape::activations`] what the
//! layers of a LLaMA save for the backward pass, and [`RunFootprint::peak_memory`] both together,
//! and [`RunFootprint::peak_memory_of_stages`] on one rank of a pipeline.
//! [`LlamaShape::segment_flops`] counts the operations by which a pipeline divides the layers. [`zero2`] and
//! [`zero3`] are DeepSpeed's own estimates, which leave out activations.
//!
//! ```
//! use burn_zero::{
//!     ZeroStage,
//!     estimate::{ModelSize, StatePlacement, TrainingPrecision, model_states},
//! };
//!
//! let size = ModelSize { trained: 7_500_000_000, ..Default::default() };
//! let placement = StatePlacement { stage: ZeroStage::Gradients, world_size: 64, ..Default::default() };
//! let memory = model_states(size, TrainingPrecision::Mixed, placement);
//! assert_eq!(memory.device() / 100_000_000, 166, "16.6 GB: 2 + 14 / 64 bytes for each weight");
//! ```

mod activations;
mod deepspeed;
mod flops;
mod footprint;
mod rank_stages;
mod states;

pub use activations::{ActivationMemory, LlamaShape, MAX_LOGITS, MicroBatch};
pub use deepspeed::{Cluster, CpuOffload, DeepSpeedEstimate, zero2, zero3};
pub use footprint::{BaseModel, RunFootprint, TrainedWeights, WeightStorage};
pub use rank_stages::RankStages;
pub use states::{MemoryEstimate, ModelSize, StatePlacement, TrainingPrecision, model_states};
