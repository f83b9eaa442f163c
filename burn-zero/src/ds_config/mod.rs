//! DeepSpeed's `ds_config.json`, Accelerate's YAML and FSDP's sharding strategies, all read into a [`DsConfig`].
//!
//! ```text
//!  ds_config.json ────────────────────► RawDsConfig ── resolve(world size, values for "auto") ──► DsConfig
//!  accelerate.yaml ► AccelerateConfig ────▲
//! ```
//!
//! A ds_config is Hjson, as for DeepSpeed: comments, trailing commas and keys without quotes are read.
//!
//! The crate knows every key of DeepSpeed with its kind of value. An unknown key is an error that names the most
//! similar key, a value of the wrong kind is an error, and a key that is not honoured is listed in
//! [`DsConfig::unhonoured`] with what is done instead, so that the application can report it.
//!
//! The blocks convert into the types of the engine, which does not depend on this module: [`ZeroConfig`] into
//! [`Sharding`](crate::Sharding), [`OffloadConfig`] into [`MemoryTier`](crate::MemoryTier), [`OptimizerConfig`] into
//! [`Optimizer`](crate::optimizer::Optimizer).
//!
//! ```
//! use burn_zero::{
//!     ZeroStage,
//!     ds_config::{AutoValues, RawDsConfig},
//! };
//!
//! let text = r#"{
//!     "train_micro_batch_size_per_gpu": "auto",
//!     "gradient_accumulation_steps": 4,
//!     "zero_optimization": { "stage": 2, "round_robin_gradients": true }
//! }"#;
//! let auto = AutoValues { micro_batch: 8, ..Default::default() };
//! let config = RawDsConfig::from_hjson(text)?.resolve(2, &auto)?;
//! assert_eq!(config.batch.train, 64);
//! assert_eq!(config.zero.stage, ZeroStage::Gradients);
//! assert_eq!(config.unhonoured[0].key, "zero_optimization.round_robin_gradients");
//! # Ok::<(), burn_zero::Error>(())
//! ```

mod accelerate;
mod auto;
mod batch;
mod check;
mod deprecated;
mod fsdp;
mod hjson;
mod keys;
mod optimizer;
mod precision;
mod raw;
mod scheduler;
mod strict_yaml;
#[cfg(test)]
mod tests;
mod zero;

pub use accelerate::{AccelerateConfig, DsConfigSource};
pub use auto::{AutoPrecision, AutoValues};
pub use batch::BatchSizes;
pub use check::UnhonouredKey;
pub use fsdp::fsdp_stage;
pub use optimizer::{AdamParams, LambParams, LionParams, OptimizerConfig, SgdParams};
pub use precision::Precision;
pub use raw::RawDsConfig;
pub use scheduler::{
    LrRangeTestParams, OneCycleParams, SchedulerConfig, WarmupCosineLrParams, WarmupDecayLrParams, WarmupLrParams,
};
#[cfg(test)]
use zero::ZeroStage3Config;
pub use zero::{OffloadConfig, ZeroConfig};

use crate::lr_schedule::DeepSpeedLrSchedule;
use serde_json::{Map, Value, json};

/// A validated and complete ds_config.
#[derive(Debug, Clone, PartialEq)]
pub struct DsConfig {
    /// The batch sizes.
    pub batch: BatchSizes,
    /// The ZeRO settings: what is sharded among the ranks and what is offloaded.
    pub zero: ZeroConfig,
    /// The precision of the forward and the backward pass.
    pub precision: Precision,
    /// The global norm to which gradients are clipped; 0 does not clip. DeepSpeed's default is 1.
    pub gradient_clipping: f64,
    /// The optimizer, if the file has one.
    pub optimizer: Option<OptimizerConfig>,
    /// The scheduler, if the file has one.
    pub scheduler: Option<SchedulerConfig>,
    /// The number of steps between two lines of the log, if the file sets it.
    pub steps_per_print: Option<u64>,
    /// The keys of the file that are not honoured.
    pub unhonoured: Vec<UnhonouredKey>,
}

impl DsConfig {
    /// Returns the learning-rate schedule if the file has a scheduler. Without an optimizer in the file, its learning
    /// rate is 1e-3.
    pub fn lr_schedule(&self) -> Option<DeepSpeedLrSchedule> {
        let learning_rate = self.optimizer.as_ref().map_or(AdamParams::default().lr, OptimizerConfig::learning_rate);
        self.scheduler.as_ref().map(|scheduler| scheduler.lr_schedule(learning_rate))
    }

    /// Returns the ds_config as JSON with all values, such that DeepSpeed would read this configuration from it.
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
            block.as_object_mut().into_iter().for_each(optimizer::restore_adam_w_mode);
            put("optimizer", block);
        }
        if let Some(scheduler) = &self.scheduler {
            put("scheduler", json!(scheduler));
        }
        root.extend(self.precision.to_blocks());
        root.into()
    }
}
