//! DeepSpeed's `ds_config.json`, Accelerate's YAML and FSDP's names, read into one value.
//!
//! ```text
//!  ds_config.json ──────────────► Document ── resolve(world, the caller's values for "auto") ──► DsConfig
//!  accelerate.yaml ► Accelerate ────▲
//! ```
//!
//! Every key that DeepSpeed knows is known here, with its kind: a key that nobody knows is an error that names the nearest
//! one, a value of the wrong kind is an error, and a key that is not honoured stands in [`DsConfig::unhonoured`] with what is
//! done instead, so that the application can say so.
//!
//! ```
//! use burn_zero::ds_config::{AutoValues, Document, Stage};
//!
//! let text = r#"{
//!     "train_micro_batch_size_per_gpu": "auto",
//!     "gradient_accumulation_steps": 4,
//!     "zero_optimization": { "stage": 2, "round_robin_gradients": true }
//! }"#;
//! let auto = AutoValues { micro_batch: 8, ..Default::default() };
//! let config = Document::from_json(text)?.resolve(2, &auto)?;
//! assert_eq!(config.batch.train, 64);
//! assert_eq!(config.zero.stage, Stage::Gradients);
//! assert_eq!(config.unhonoured[0].key, "zero_optimization.round_robin_gradients");
//! # Ok::<(), burn_zero::Error>(())
//! ```

mod accelerate;
mod auto;
mod batch;
mod check;
mod document;
mod fsdp;
mod keys;
mod modernise;
mod optimizer;
mod precision;
mod scheduler;
mod strict;
#[cfg(test)]
mod tests;
mod zero;

pub use accelerate::{Accelerate, Source};
pub use auto::{AutoPrecision, AutoValues};
pub use batch::Batch;
pub use check::Unhonoured;
pub use document::Document;
pub use fsdp::fsdp_stage;
pub use optimizer::{Adam, Lamb, Lion, Optimizer, Sgd};
pub use precision::Precision;
pub use scheduler::{Cycle, RangeTest, Scheduler, WarmupCosineLr, WarmupDecayLr, WarmupLr};
pub use zero::{Device, Offload, Stage, Stage3, Zero};

use crate::schedule::DeepSpeed;
use serde_json::{Map, Value, json};

/// A ds_config, checked and complete.
#[derive(Debug, Clone, PartialEq)]
pub struct DsConfig {
    /// The batch sizes.
    pub batch: Batch,
    /// What is divided among the ranks, and where it is kept.
    pub zero: Zero,
    /// The numbers of the forward and the backward pass.
    pub precision: Precision,
    /// The largest global norm of the gradients; 0 does not clip. DeepSpeed's default is 1.
    pub gradient_clipping: f64,
    /// The optimizer, if the file says one.
    pub optimizer: Option<Optimizer>,
    /// The scheduler, if the file says one.
    pub scheduler: Option<Scheduler>,
    /// How many steps from one line of the log to the next, if the file says so.
    pub steps_per_print: Option<u64>,
    /// The keys of the file that are not honoured.
    pub unhonoured: Vec<Unhonoured>,
}

impl DsConfig {
    /// The learning rate as a function of the step, if the file has a scheduler; the optimizer's learning rate is 1e-3 if the
    /// file has no optimizer.
    pub fn schedule(&self) -> Option<DeepSpeed> {
        let learning_rate = self.optimizer.as_ref().map_or(Adam::default().lr, Optimizer::learning_rate);
        self.scheduler.as_ref().map(|scheduler| scheduler.schedule(learning_rate))
    }

    /// The ds_config with every value written out: what DeepSpeed would read as this configuration.
    pub fn to_json(&self) -> Value {
        let mut root = Map::new();
        let mut put = |key: &str, value: Value| root.insert(key.to_owned(), value);
        put("train_batch_size", self.batch.train.into());
        put("train_micro_batch_size_per_gpu", self.batch.micro.into());
        put("gradient_accumulation_steps", self.batch.accumulation.into());
        put("gradient_clipping", self.gradient_clipping.into());
        put("zero_optimization", json!(self.zero));
        if let Some(steps) = self.steps_per_print {
            put("steps_per_print", steps.into());
        }
        if let Some(optimizer) = &self.optimizer {
            let mut block = json!(optimizer);
            block.as_object_mut().into_iter().for_each(optimizer::unsettle);
            put("optimizer", block);
        }
        if let Some(scheduler) = &self.scheduler {
            put("scheduler", json!(scheduler));
        }
        root.extend(self.precision.blocks());
        root.into()
    }
}
