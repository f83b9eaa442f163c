//! The values that replace `"auto"`.

use super::optimizer::AdamParams;
use serde_json::{Value, json};

/// The precision of the forward pass where the file leaves it to the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AutoPrecision {
    /// f32: neither block is enabled.
    #[default]
    F32,
    /// f16.
    F16,
    /// bf16.
    Bf16,
}

/// The caller's values for keys that are `"auto"` in the file: the keys that the Trainer of Hugging Face fills.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AutoValues {
    /// `train_micro_batch_size_per_gpu`; together with the next field it gives `train_batch_size`.
    pub micro_batch: u64,
    /// `gradient_accumulation_steps`.
    pub accumulation: u64,
    /// `gradient_clipping`.
    pub gradient_clipping: f64,
    /// `pipeline.stages`, the number of ranks of a pipeline, also if the key is absent.
    pub pipeline_stages: u64,
    /// `optimizer.params`, and `warmup_max_lr` of a scheduler.
    pub adam: AdamParams,
    /// `warmup_num_steps` of a scheduler.
    pub warmup_steps: u64,
    /// `total_num_steps` of a scheduler.
    pub total_steps: u64,
    /// `fp16.enabled` and `bf16.enabled`.
    pub precision: AutoPrecision,
    /// The `hidden_size` of the model, which determines three bucket sizes; without it they cannot be `"auto"`.
    pub hidden_size: Option<u64>,
}

impl Default for AutoValues {
    fn default() -> Self {
        Self {
            micro_batch: 1,
            accumulation: 1,
            gradient_clipping: 1.0,
            pipeline_stages: 1,
            adam: AdamParams::default(),
            warmup_steps: 1,
            total_steps: 1,
            precision: AutoPrecision::F32,
            hidden_size: None,
        }
    }
}

impl AutoValues {
    /// Returns the value of a key; null if the key is to be treated as absent, and `None` if the key cannot be
    /// `"auto"`.
    pub(super) fn value(&self, path: &str) -> Option<Value> {
        Some(match path {
            // It follows from the other two, which are set afterwards.
            "train_batch_size" => Value::Null,
            "train_micro_batch_size_per_gpu" => self.micro_batch.into(),
            "gradient_accumulation_steps" => self.accumulation.into(),
            "gradient_clipping" => self.gradient_clipping.into(),
            "pipeline.stages" => self.pipeline_stages.into(),
            "optimizer.params.lr" | "scheduler.params.warmup_max_lr" => self.adam.lr.into(),
            "optimizer.params.betas" => json!(self.adam.betas),
            "optimizer.params.eps" => self.adam.eps.into(),
            "optimizer.params.weight_decay" => self.adam.weight_decay.into(),
            "scheduler.params.warmup_min_lr" => 0.0.into(),
            "scheduler.params.warmup_num_steps" => self.warmup_steps.max(1).into(),
            "scheduler.params.total_num_steps" => self.total_steps.max(1).into(),
            "fp16.enabled" => (self.precision == AutoPrecision::F16).into(),
            "bf16.enabled" => (self.precision == AutoPrecision::Bf16).into(),
            "zero_optimization.reduce_bucket_size" => self.hidden_size.map(|size| size * size)?.into(),
            "zero_optimization.stage3_prefetch_bucket_size" => {
                self.hidden_size.map(|size| size * size * 9 / 10)?.into()
            }
            "zero_optimization.stage3_param_persistence_threshold" => self.hidden_size.map(|size| size * 10)?.into(),
            "zero_optimization.stage3_gather_16bit_weights_on_model_save" => false.into(),
            _ => return None,
        })
    }
}
