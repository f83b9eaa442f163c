//! Arguments of the verbs that report figures and keep no trained weights: `estimate`, `bench`, `schedule`.

use super::{DeviceArgs, ModelArgs, WeightsArgs};
use crate::{fetch, recipe::MethodKind};
use burn_zero::pipeline::PipelineKind;
use clap::{Args, ValueEnum};
use std::{
    num::{NonZeroU64, NonZeroUsize},
    path::PathBuf,
};

#[derive(Args)]
pub struct EstimateArgs {
    /// Model as for `chat`
    #[arg(long, default_value = fetch::SMOLLM2)]
    pub model: String,
    /// Read the model's dimensions from this config.json instead
    #[arg(long, conflicts_with = "model")]
    pub config: Option<PathBuf>,
    /// Fine-tuning method: full or lora
    #[arg(long, default_value = "lora", value_parser = parse_method)]
    pub method: MethodKind,
    /// LoRA rank (for lora)
    #[arg(long, default_value_t = 8)]
    pub r: u64,
    /// Linear layers that get a LoRA adapter: names separated by commas, or all-linear
    #[arg(long, default_value = "all-linear", value_delimiter = ',', value_name = "NAMES")]
    pub target_modules: Vec<String>,
    /// Number of ranks that share the run
    #[arg(long, default_value = "1")]
    pub world: NonZeroU64,
    /// Tokens in a micro-batch, summed over its rows
    #[arg(long, default_value_t = 2048)]
    pub tokens: u64,
    /// Use full activation checkpointing, as with activation_checkpointing = "full" in a recipe
    #[arg(long)]
    pub recompute: bool,
    /// Gradient norm to clip to, as in a recipe; with 0, gradients are not clipped, and those of the whole model never
    /// exist at the same time
    #[arg(long, default_value_t = 1.0)]
    pub max_grad_norm: f64,
    /// Train two steps on meaningless tokens, in f32, and print the estimate next to the counted and the measured
    /// memory; under mpirun, every rank does so
    #[arg(long, conflicts_with = "config")]
    pub measure: bool,
    /// ZeRO stage of --measure: 0 to 3
    #[arg(long, default_value_t = 0, requires = "measure")]
    pub zero_stage: u8,
    /// Offload of the optimizer states in --measure: none, cpu (host memory) or nvme (files in the temporary directory)
    #[arg(long, default_value = "none", requires = "measure")]
    pub offload_optimizer: String,
}

fn parse_method(name: &str) -> Result<MethodKind, String> {
    match name {
        "full" => Ok(MethodKind::Full),
        "lora" => Ok(MethodKind::Lora),
        other => Err(format!("expected full or lora, found {other:?}")),
    }
}

/// Parameters that the training benchmark updates.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BenchMethod {
    /// No training
    None,
    /// LoRA of rank 8 on q_proj and v_proj
    Lora,
    /// All weights
    Full,
}

#[derive(Args)]
pub struct BenchArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// Tokens of the sequence in the forward benchmark, and of each row in the training benchmark
    #[arg(long, default_value_t = 512)]
    pub length: usize,
    /// Tokens of the prompt in the decoding benchmark
    #[arg(long, default_value = "32")]
    pub prompt: NonZeroUsize,
    /// Tokens to decode
    #[arg(long, default_value = "64")]
    pub new_tokens: NonZeroUsize,
    /// Parameters to train in the training benchmark
    #[arg(long, default_value = "lora")]
    pub train: BenchMethod,
    /// Rows per training step
    #[arg(long, default_value = "2")]
    pub batch_size: NonZeroUsize,
    /// Train with full activation checkpointing, as with activation_checkpointing = "full" in a recipe
    #[arg(long)]
    pub recompute: bool,
    /// Number of timed rounds; the fastest one counts
    #[arg(long, default_value = "3")]
    pub rounds: NonZeroUsize,
}

#[derive(Args)]
pub struct ScheduleArgs {
    /// Number of pipeline ranks; each has one stage or, if interleaved, several
    #[arg(long)]
    pub stages: usize,
    /// Micro-batches per optimizer step
    #[arg(long)]
    pub micro_batches: usize,
    /// Pipeline schedule: gpipe, 1f1b or interleaved1f1b
    #[arg(long, value_parser = parse_kind, default_value = "1f1b")]
    pub kind: PipelineKind,
    /// Stages per rank, for interleaved1f1b
    #[arg(long, default_value_t = 1)]
    pub chunks: usize,
    /// Time of a backward pass, where a forward pass takes 1
    #[arg(long, default_value_t = 2.0)]
    pub backward: f64,
    /// Draw the schedule to this SVG file
    #[arg(long)]
    pub svg: Option<PathBuf>,
    /// Write the schedule to this CSV file, in torchtitan's format
    #[arg(long)]
    pub csv: Option<PathBuf>,
}

fn parse_kind(name: &str) -> Result<PipelineKind, String> {
    let known = ["GPipe", "1F1B", "Interleaved1F1B"].into_iter().find(|known| known.eq_ignore_ascii_case(name));
    known.unwrap_or(name).parse().map_err(|error: burn_zero::pipeline::PipelineError| error.to_string())
}
