//! The table `[train]`: one flat table in the file, four small structs in the program.

use serde::{Deserialize, Serialize};

use super::value::{Checkpointing, Warmup};
use crate::backend::Device;

/// `[train]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Train {
    /// How much is computed.
    #[serde(flatten)]
    pub steps: Steps,
    /// The optimizer.
    #[serde(flatten)]
    pub optimizer: Optimizer,
    /// The learning rate's course.
    #[serde(flatten)]
    pub schedule: Schedule,
    /// What happens beside the steps.
    #[serde(flatten)]
    pub saving: Saving,
}

/// How much is computed, per step and in all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Steps {
    /// Rows per micro-step.
    pub batch_size: usize,
    /// Micro-steps per optimizer step.
    pub gradient_accumulation: usize,
    /// Passes over the data; 1 if `max_steps` is absent too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    /// Optimizer steps, instead of `epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<usize>,
    /// Of everything random: order of rows, adapters' first values, dropout.
    pub seed: u64,
    /// Which segments' activations are computed again in the backward pass: `"none"`, `"full"` or every k-th.
    pub activation_checkpointing: Checkpointing,
}

impl Default for Steps {
    fn default() -> Self {
        Self {
            batch_size: 4,
            gradient_accumulation: 1,
            epochs: None,
            max_steps: None,
            seed: 42,
            activation_checkpointing: Checkpointing::None,
        }
    }
}

impl Steps {
    /// Optimizer steps of the whole run, given those of one epoch.
    pub fn total(&self, per_epoch: usize) -> usize {
        self.max_steps.unwrap_or_else(|| (per_epoch as f64 * self.epochs.unwrap_or(1.0)).ceil() as usize)
    }
}

/// Rules by which weights are updated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay.
    #[default]
    AdamW,
    /// Adam with weight decay in the gradient.
    Adam,
    /// AdamW with moments of 8 bits.
    AdamW8bit,
    /// LAMB.
    Lamb,
    /// Lion.
    Lion,
    /// Gradient descent, with the first of `betas` as momentum.
    Sgd,
}

/// The optimizer and its constants.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Optimizer {
    /// The rule.
    pub optimizer: OptimizerKind,
    /// LoRA+: the matrices `B` and vectors learn so many times as fast as the matrices `A`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loraplus_lr_ratio: Option<f64>,
    /// LoRA+: the highest learning rate of the token table, where `method.modules_to_save` lets it learn; by default that of the
    /// matrices `A`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loraplus_lr_embedding: Option<f64>,
    /// The highest of the run; always there once a recipe is loaded: by default 2e-4 for lora, else 2e-5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of the running mean of gradients and of their squares.
    pub betas: [f64; 2],
    /// Added to the denominator.
    pub epsilon: f64,
    /// Gradients are scaled down to this global norm; 0 leaves them alone.
    pub max_grad_norm: f64,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self {
            optimizer: OptimizerKind::AdamW,
            loraplus_lr_ratio: None,
            loraplus_lr_embedding: None,
            learning_rate: None,
            weight_decay: 0.0,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            max_grad_norm: 1.0,
        }
    }
}

/// The learning rate's course.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Schedule {
    /// Its shape.
    pub scheduler: Scheduler,
    /// Steps until it is at its highest: a count, or a fraction of all steps.
    pub warmup: Warmup,
    /// DeepSpeed's `scheduler` block, `{ type, params }`, instead of both: `"auto"` stands for `learning_rate`, `warmup` and the
    /// steps of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deepspeed_scheduler: Option<toml::Table>,
    /// DeepSpeed's `fp16` block, which says how the loss is scaled with `model.compute = "f16"`; by default as there: dynamically,
    /// from 2¹⁶ on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fp16: Option<toml::Table>,
}

/// Shapes of the learning rate's course after the warmup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scheduler {
    /// Level.
    #[serde(rename = "constant")]
    Constant,
    /// In a line to 0.
    #[serde(rename = "linear")]
    Linear,
    /// Half a cosine to 0.
    #[default]
    #[serde(rename = "cosine")]
    Cosine,
    /// DeepSpeed's: level.
    WarmupLR,
    /// DeepSpeed's: in a line to 0.
    WarmupDecayLR,
    /// DeepSpeed's: half a cosine to its least ratio.
    WarmupCosineLR,
}

/// What happens beside the steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Saving {
    /// Validation after every so many steps, besides the first and the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_every: Option<usize>,
    /// Where validation is computed, if not where training is: a name as for `--device`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_device: Option<Device>,
    /// A checkpoint after every so many steps, besides the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_every: Option<usize>,
    /// So many checkpoints stay, the newest.
    pub keep: usize,
    /// The run ends after so many evaluations without a lower validation loss than before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopping: Option<usize>,
    /// The memory of a machine that a run may take, in GiB: what needs more is refused. By default what the machine has left; 0
    /// does not ask.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_gib: Option<f64>,
    /// For whom losses and speeds are written besides `metrics.jsonl`.
    pub report_to: Vec<ReportTo>,
}

/// A program that draws what a run writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReportTo {
    /// Event files in `tensorboard/`.
    TensorBoard,
    /// Weights & Biases: an offline run in `wandb/`, to be uploaded by `wandb sync`.
    Wandb,
}

impl Default for Saving {
    fn default() -> Self {
        Self {
            eval_every: None,
            eval_device: None,
            save_every: None,
            keep: 2,
            early_stopping: None,
            memory_gib: None,
            report_to: vec![ReportTo::TensorBoard],
        }
    }
}
