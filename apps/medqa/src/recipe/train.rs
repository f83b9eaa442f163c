//! The table `[train]`: one flat table in the file, four small structs in the program.

use serde::{Deserialize, Serialize};

use super::value::{Warmup, checkpointing};
use crate::backend::Device;
use burn_zero::{lr_schedule::LrKind, optimizer::OptimizerKind, segment::Checkpointing};

/// The table `[train]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainConfig {
    /// Batch size and number of steps.
    #[serde(flatten)]
    pub steps: StepsConfig,
    /// The optimizer.
    #[serde(flatten)]
    pub optimizer: OptimizerConfig,
    /// The learning rate schedule, and loss scaling.
    #[serde(flatten)]
    pub schedule: LrScheduleConfig,
    /// Evaluation, checkpoints, early stopping and logging.
    #[serde(flatten)]
    pub eval_save: EvalSaveConfig,
}

/// Batch size, number of steps, seed, and activation checkpointing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StepsConfig {
    /// Rows per micro-batch.
    pub batch_size: usize,
    /// Micro-batches per optimizer step, of each rank.
    pub gradient_accumulation: usize,
    /// Passes over the data; 1 if `max_steps` is absent too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    /// Optimizer steps, instead of `epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<usize>,
    /// The seed of everything random: order of rows, initialization of adapters, dropout.
    pub seed: u64,
    /// The segments whose activations are recomputed in the backward pass: `"none"`, `"full"` or every k-th.
    #[serde(with = "checkpointing")]
    pub activation_checkpointing: Checkpointing,
}

impl Default for StepsConfig {
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

impl StepsConfig {
    /// Returns the optimizer steps of the whole run, given those of one epoch.
    pub fn total_steps(&self, per_epoch: usize) -> usize {
        self.max_steps.unwrap_or_else(|| (per_epoch as f64 * self.epochs.unwrap_or(1.0)).ceil() as usize)
    }
}

/// The optimizer and its hyperparameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OptimizerConfig {
    /// The kind of optimizer.
    pub optimizer: OptimizerKind,
    /// LoRA+: the learning rate of the matrices `B` and of vectors, divided by that of the matrices `A`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loraplus_lr_ratio: Option<f64>,
    /// LoRA+: the peak learning rate of the token embedding, if `method.modules_to_save` trains it; by default that of
    /// the matrices `A`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loraplus_lr_embedding: Option<f64>,
    /// The peak learning rate; always set once a recipe is loaded. The default depends on the method, such as 2e-4 for
    /// lora and 2e-5 for full.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Weight decay, decoupled from the gradient except with `adam`.
    pub weight_decay: f64,
    /// Decay rates of the running means of gradients and of their squares.
    pub betas: [f64; 2],
    /// Added to the denominator of the update.
    pub epsilon: f64,
    /// The global norm that gradients are clipped to; 0 turns clipping off.
    pub max_grad_norm: f64,
}

impl Default for OptimizerConfig {
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

/// The learning rate schedule, and loss scaling.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LrScheduleConfig {
    /// The shape of the schedule after the warmup.
    pub scheduler: LrKind,
    /// The length of the warmup: a number of steps, or a fraction of all steps; always set once a recipe is loaded, by
    /// default to 0 steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup: Option<Warmup>,
    /// DeepSpeed's `scheduler` block, `{ type, params }`, instead of both: its `"auto"` values are `learning_rate`,
    /// `warmup` and the steps of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deepspeed_scheduler: Option<toml::Table>,
    /// DeepSpeed's `fp16` block, which sets the loss scaling of `model.compute = "f16"`; by default dynamic from 2¹⁶
    /// on, as in DeepSpeed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fp16: Option<toml::Table>,
}

/// Evaluation, checkpoints, early stopping and logging.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EvalSaveConfig {
    /// Steps between two validations; there is also one before the first step and one after the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_every: Option<usize>,
    /// The device of the validation, if it is not the training device: a name as for `--device`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_device: Option<Device>,
    /// Steps between two checkpoints; after the last step there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_every: Option<usize>,
    /// The number of checkpoints to keep, the newest ones.
    pub keep: usize,
    /// The patience of early stopping: the run ends after this many evaluations without a lower validation loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopping: Option<usize>,
    /// The measure of the best evaluation, whose weights are the result of the run instead of those of the last step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_best: Option<KeepBest>,
    /// The memory of a machine that a run may use, in GiB: a run that needs more is refused. By default the memory that
    /// the machine has available; 0 turns the check off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_gib: Option<f64>,
    /// The dashboards that metrics are written for, besides `metrics.jsonl`.
    pub report_to: Vec<ReportTo>,
}

/// The measure by which the best evaluation of a run is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeepBest {
    /// The lowest validation loss after a step.
    ValidLoss,
}

/// A dashboard for the metrics of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReportTo {
    /// Event files in `tensorboard/`.
    TensorBoard,
    /// Weights & Biases: an offline run in `wandb/`, to be uploaded by `wandb sync`.
    Wandb,
}

impl Default for EvalSaveConfig {
    fn default() -> Self {
        Self {
            eval_every: None,
            eval_device: None,
            save_every: None,
            keep: 2,
            early_stopping: None,
            keep_best: None,
            memory_gib: None,
            report_to: vec![ReportTo::TensorBoard],
        }
    }
}
