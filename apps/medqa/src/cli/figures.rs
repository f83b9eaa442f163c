//! Verbs that tell figures and train nothing: `estimate`, `bench`, `schedule`.

use super::{DeviceArgs, ModelArgs, WeightsArgs};
use crate::{fetch, recipe::MethodKind};
use burn_zero::pipeline::Kind;
use clap::{Args, ValueEnum};
use std::{
    num::{NonZeroU64, NonZeroUsize},
    path::PathBuf,
};

#[derive(Args)]
pub struct EstimateArgs {
    /// As for `chat`
    #[arg(long, default_value = fetch::SMOLLM2)]
    pub model: String,
    /// A config.json instead
    #[arg(long, conflicts_with = "model")]
    pub config: Option<PathBuf>,
    /// full or lora
    #[arg(long, default_value = "lora", value_parser = method)]
    pub method: MethodKind,
    /// The rank of lora
    #[arg(long, default_value_t = 8)]
    pub r: u64,
    /// The layers that it goes on: names, separated by commas
    #[arg(long, default_value = "all-linear", value_delimiter = ',', value_name = "NAMES")]
    pub target_modules: Vec<String>,
    /// Ranks that share the work
    #[arg(long, default_value = "1")]
    pub world: NonZeroU64,
    /// Tokens in a micro-batch, of all its rows
    #[arg(long, default_value_t = 2048)]
    pub tokens: u64,
    /// With activation_checkpointing = "full"
    #[arg(long)]
    pub recompute: bool,
    /// With 0, as in a recipe, gradients are not clipped; those of the whole model never exist then
    #[arg(long, default_value_t = 1.0)]
    pub max_grad_norm: f64,
    /// Take two steps on tokens of no meaning, in f32, and print what the estimate says beside what was counted and measured;
    /// under mpirun by all its ranks
    #[arg(long, conflicts_with = "config")]
    pub measure: bool,
    /// What --measure divides among ranks: 0 to 3
    #[arg(long, default_value_t = 0, requires = "measure")]
    pub zero_stage: u8,
    /// Where --measure has optimizer states: none, cpu or nvme (in a file beside)
    #[arg(long, default_value = "none", requires = "measure")]
    pub offload_optimizer: String,
}

fn method(name: &str) -> Result<MethodKind, String> {
    match name {
        "full" => Ok(MethodKind::Full),
        "lora" => Ok(MethodKind::Lora),
        other => Err(format!("expected full or lora, found {other:?}")),
    }
}

/// What learns.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Learned {
    /// Nothing: no training
    None,
    /// LoRA of rank 8 on q_proj and v_proj
    Lora,
    /// Every weight
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
    /// Tokens of a sequence that is read, and of a row that is learned from
    #[arg(long, default_value_t = 512)]
    pub length: usize,
    /// Tokens before the first that is written
    #[arg(long, default_value = "32")]
    pub prompt: NonZeroUsize,
    /// Tokens that are written
    #[arg(long, default_value = "64")]
    pub new_tokens: NonZeroUsize,
    /// What a step trains
    #[arg(long, default_value = "lora")]
    pub train: Learned,
    /// Rows of a step
    #[arg(long, default_value = "2")]
    pub batch_size: NonZeroUsize,
    /// With activation_checkpointing = "full"
    #[arg(long)]
    pub recompute: bool,
    /// The fastest of so many rounds counts
    #[arg(long, default_value = "3")]
    pub rounds: NonZeroUsize,
}

#[derive(Args)]
pub struct ScheduleArgs {
    /// Ranks, each with one stage or, interleaved, several
    #[arg(long)]
    pub stages: usize,
    /// Micro-batches of a step
    #[arg(long)]
    pub micro_batches: usize,
    /// gpipe, 1f1b or interleaved1f1b
    #[arg(long, value_parser = kind, default_value = "1f1b")]
    pub kind: Kind,
    /// Stages per rank, for interleaved1f1b
    #[arg(long, default_value_t = 1)]
    pub chunks: usize,
    /// The time of a backward pass, where a forward pass takes 1
    #[arg(long, default_value_t = 2.0)]
    pub backward: f64,
    /// Draw it
    #[arg(long)]
    pub svg: Option<PathBuf>,
    /// Write torchtitan's table
    #[arg(long)]
    pub csv: Option<PathBuf>,
}

fn kind(name: &str) -> Result<Kind, String> {
    let known = ["GPipe", "1F1B", "Interleaved1F1B"].into_iter().find(|known| known.eq_ignore_ascii_case(name));
    known.unwrap_or(name).parse().map_err(|error: burn_zero::pipeline::ScheduleError| error.to_string())
}
