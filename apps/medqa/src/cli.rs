//! Command-line interface: the verbs, their arguments, and the function that runs the chosen verb.

mod adapters;
mod analysis;

pub use adapters::{AdaptersVerb, CombinationArg};
pub use analysis::{BenchArgs, BenchMethod, EstimateArgs, ScheduleArgs};

use crate::{
    backend::Device,
    bench, chat,
    data::{self, Columns, Format, Schema},
    doctor, estimate, eval, export, fetch, launch, logits,
    method_adapter::AdapterPath,
    quickstart,
    recipe::{ComputeDtype, OnTooLong, WeightDtype},
    schedule, train,
};
use anyhow::{Result, anyhow};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::{ffi::OsString, num::NonZeroUsize, path::PathBuf};

/// Fine-tune, evaluate and chat with a LLaMA model on medical questions.
#[derive(Parser)]
#[command(version, about)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Start here: fine-tune a model on a few hundred built-in lessons and compare before and after; takes minutes
    Quickstart(QuickstartArgs),
    /// Download a model, unless it is already in the cache, and print its path
    FetchModel {
        /// Model to fetch: smollm2-135m-instruct, or a Hugging Face Hub id such as owner/name
        #[arg(default_value = fetch::SMOLLM2)]
        name: String,
        /// Directory to copy the model into; by default it stays in the cache
        #[arg(long)]
        dest: Option<PathBuf>,
    },
    /// Fine-tune a model as described by a recipe file
    Train {
        /// Recipe: a TOML file with the model, the data, the fine-tuning method and the training settings
        recipe: PathBuf,
        /// Override one value of the recipe, for example --set train.max_steps=64; may be given several times
        #[arg(long = "set", value_name = "KEY=VALUE")]
        sets: Vec<String>,
        #[command(flatten)]
        files: FilesArgs,
        /// Run directory, for everything that the run writes; default: runs/NAME-OF-RECIPE
        #[arg(long)]
        dir: Option<PathBuf>,
        /// Resume the run in --dir from its last checkpoint
        #[arg(long)]
        resume: bool,
        #[command(flatten)]
        device: DeviceArgs,
    },
    /// Merge a checkpoint that several ranks have written in shards into one model or one adapter
    Consolidate(ConsolidateArgs),
    /// Evaluate a model: the loss on the answers of a dataset, or the accuracy on PubMedQA
    Eval(EvalArgs),
    /// Chat with a model
    Chat(ChatArgs),
    /// Export a model, with its adapters merged, as a Hugging Face directory or as a GGUF file for llama.cpp
    Export(ExportArgs),
    /// List adapters, merge them into a model, convert and combine them
    #[command(subcommand)]
    Adapters(AdaptersVerb),
    /// Inspect a dataset before training on it
    #[command(subcommand)]
    Data(DataVerb),
    /// Check that a model, its tokenizer and your data behave in training as in chat; exit code 1 if a check fails
    Doctor(DoctorArgs),
    /// Run a command on several ranks with mpirun: medqa launch -n 2 -- train RECIPE --set parallel.zero_stage=2
    Launch(LaunchArgs),
    /// Estimate the memory of a run for every ZeRO stage, optimizer offload and precision, without loading the weights
    Estimate(EstimateArgs),
    /// Show a pipeline-parallel schedule, its bubble and the largest number of live activations per rank
    Schedule(ScheduleArgs),
    /// Measure the speed of the forward pass, decoding and training, and the peak memory; prints one line of JSON
    Bench(BenchArgs),
    /// Compute the logits of every token of a text and write them to a file
    Logits {
        #[command(flatten)]
        model: ModelArgs,
        #[command(flatten)]
        device: DeviceArgs,
        #[command(flatten)]
        weights: WeightsArgs,
        /// Text to run through the model
        #[arg(long)]
        text: String,
        /// Decode token by token with the KV cache, as in generation, instead of one forward pass over the whole text
        #[arg(long)]
        by_steps: bool,
        /// Output file in safetensors format, with `ids` (i64) and `logits` [tokens, vocabulary] (f32)
        #[arg(long)]
        out: PathBuf,
    },
}

/// Files besides the recipe; each option is shorthand for a recipe key in `[parallel]`.
#[derive(Args, Clone)]
pub struct FilesArgs {
    /// DeepSpeed configuration (ds_config.json): sets what the recipe leaves unset (recipe key parallel.deepspeed)
    #[arg(long, value_name = "FILE")]
    deepspeed: Option<String>,
    /// YAML file of `accelerate config`: sets what the recipe leaves unset (recipe key parallel.accelerate)
    #[arg(long, value_name = "FILE")]
    accelerate: Option<String>,
    /// Write a timeline of all ranks to this file, to be opened in Perfetto (recipe key parallel.trace)
    #[arg(long, value_name = "FILE")]
    trace: Option<String>,
}

impl FilesArgs {
    /// Returns the same settings as `KEY=VALUE` overrides of the recipe.
    fn into_overrides(self) -> impl Iterator<Item = String> {
        let files = [("deepspeed", self.deepspeed), ("accelerate", self.accelerate), ("trace", self.trace)];
        let set = |(key, file): (&str, Option<String>)| Some(format!("parallel.{key}={}", toml::Value::String(file?)));
        files.into_iter().filter_map(set)
    }
}

/// Device that the verb computes on.
#[derive(Args, Clone)]
pub struct DeviceArgs {
    /// Device to compute on: `cpu`, `tch`, `tch:cuda:N`, `cuda:N`, `vulkan`, `vulkan:N`, `wgpu` or `wgpu:N`; each needs
    /// a binary that was built with the cargo feature of its backend
    #[arg(long, default_value_t)]
    pub device: Device,
}

/// The model, its adapters and its tokenizer.
#[derive(Args, Clone)]
pub struct ModelArgs {
    /// Model: smollm2-135m-instruct, a Hugging Face Hub id, a Hugging Face directory or a GGUF file
    #[arg(long, default_value = fetch::SMOLLM2)]
    pub model: String,
    /// Adapter directory in PEFT's format, optionally with a name; `chat`, `eval`, `export` and `adapters merge` accept
    /// several
    #[arg(long, value_name = "[NAME=]DIR")]
    pub adapter: Vec<AdapterPath>,
    /// Directory or GGUF file to read the tokenizer from, instead of the model's own tokenizer
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
}

/// Numeric formats of the model's weights and of the products with them.
#[derive(Args, Clone, Copy)]
pub struct WeightsArgs {
    /// Numeric format of the weights in memory; packed needs a GGUF file
    #[arg(long, default_value = "f32")]
    pub weights: WeightDtype,
    /// Numeric format of the matrix products with the weights
    #[arg(long, default_value = "f32")]
    pub compute: ComputeDtype,
}

#[derive(Args)]
pub struct QuickstartArgs {
    /// Run directory, for everything that the run writes
    #[arg(long, default_value = "runs/quickstart")]
    pub dir: PathBuf,
    /// Model as for `chat`, or `tiny`, a small model that is trained on the spot and needs no network; default:
    /// smollm2-135m-instruct, or `tiny` if that cannot be fetched
    #[arg(long)]
    pub model: Option<String>,
    /// Number of optimizer steps; fewer steps take less time and teach less
    #[arg(long)]
    pub steps: Option<NonZeroUsize>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Format and column names of a data file.
#[derive(Args, Clone)]
pub struct RowsArgs {
    /// Format of the rows in the data file
    #[arg(long, default_value = "qa")]
    pub format: Format,
    /// Columns that have other names in the file than in the format, for example question=prompt,answer=response
    #[arg(long, value_name = "COLUMN=NAME,...")]
    pub columns: Option<Columns>,
}

impl RowsArgs {
    /// Returns the format and the column names, after checking that they fit together.
    pub fn schema(&self) -> Result<Schema> {
        let columns = self.columns.clone().unwrap_or_default();
        columns.check(self.format).map_err(|problem| anyhow!("--columns: {problem}"))?;
        Ok(Schema { format: self.format, columns })
    }
}

#[derive(Subcommand)]
pub enum DataVerb {
    /// Count the rows of a data file and their tokens, show how the first row is learned, and list invalid rows; exit
    /// code 2 if there are any
    Check(CheckArgs),
}

#[derive(Args)]
pub struct CheckArgs {
    /// Data file to check
    pub file: PathBuf,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub rows: RowsArgs,
    /// Maximum length of a row, in tokens
    #[arg(long, default_value_t = 512)]
    pub max_length: usize,
    /// Treatment of longer rows
    #[arg(long, default_value = "truncate")]
    pub on_too_long: OnTooLong,
}

#[derive(Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Data file to check with; by default two short built-in rows
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Skip the checks that train an adapter
    #[arg(long)]
    pub quick: bool,
    #[command(flatten)]
    pub rows: RowsArgs,
}

/// Evaluation task.
#[derive(Clone, Copy, ValueEnum)]
pub enum EvalTask {
    /// Mean loss over the answer tokens
    QaLoss,
    /// PubMedQA accuracy; the answer is the most likely of yes, no and maybe
    Pubmedqa,
}

#[derive(Args)]
pub struct EvalArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// Evaluation task
    #[arg(long)]
    pub task: EvalTask,
    /// Data file to evaluate on
    #[arg(long)]
    pub data: PathBuf,
    #[command(flatten)]
    pub rows: RowsArgs,
    /// Evaluate only this many rows, from the start of the file
    #[arg(long)]
    pub limit: Option<NonZeroUsize>,
    /// Truncate rows to this many tokens; default: the model's maximum length
    #[arg(long)]
    pub max_length: Option<usize>,
    /// Rows per forward pass, for qa-loss
    #[arg(long, default_value = "4")]
    pub batch_size: NonZeroUsize,
    /// Write the result as JSON to this file, for pubmedqa with every item
    #[arg(long)]
    pub out: Option<PathBuf>,
}

#[derive(Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// Answer this one question and exit; without it, an interactive conversation starts
    #[arg(long)]
    pub prompt: Option<String>,
    /// Maximum number of tokens per answer
    #[arg(long, default_value_t = 256)]
    pub max_new_tokens: usize,
    /// Sampling temperature; 0 always takes the most likely token (greedy decoding), higher values vary more
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f64,
    /// Sample only from this many most likely tokens; 0 means all tokens
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Sample only from the most likely tokens that together have this probability (nucleus sampling)
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f64,
    /// Penalty for repetition: values above 1 make tokens that have already occurred less likely
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f64,
    /// Random seed of the sampling
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// End the answer where this text occurs; may be given several times
    #[arg(long)]
    pub stop: Vec<String>,
}

/// Numeric format of the matrices in an exported file.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportDtype {
    /// 32-bit floating point
    F32,
    /// 16-bit floating point
    F16,
    /// 8-bit integers with one scale per block of 32 values (GGUF only)
    #[value(name = "q8_0")]
    Q8_0,
}

#[derive(Args)]
pub struct ExportArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Output: FILE.gguf for a GGUF file; any other name for a new directory with config.json, model.safetensors and
    /// the tokenizer
    #[arg(long)]
    pub out: PathBuf,
    /// Numeric format of the matrices; in a GGUF file, norms and biases are always f32
    #[arg(long, default_value = "f32")]
    pub dtype: ExportDtype,
    /// Round the weights of the linear layers to nf4 and export the rounded values as floats; these are the weights
    /// that training with model.dtype = "nf4" computes with
    #[arg(long, conflicts_with = "adapter_only")]
    pub nf4: bool,
    /// Export only the adapter, as a GGUF file that llama.cpp applies with --lora to the model exported as GGUF
    #[arg(long)]
    pub adapter_only: bool,
}

#[derive(Args)]
pub struct ConsolidateArgs {
    /// Run directory, whose last checkpoint is used, or one of its checkpoint directories
    pub checkpoint: PathBuf,
    /// New directory for the result: a Hugging Face model, or an adapter in PEFT's format
    #[arg(long)]
    pub out: PathBuf,
}

#[derive(Args)]
pub struct LaunchArgs {
    /// Number of ranks (processes)
    #[arg(short = 'n', long)]
    pub ranks: NonZeroUsize,
    /// mpirun's host file, which lists machines and their slots; without it, all ranks run on this machine
    #[arg(long)]
    pub hostfile: Option<PathBuf>,
    /// Command to run on every rank, with its arguments, for example train RECIPE
    #[arg(last = true, required = true)]
    pub command: Vec<OsString>,
}

/// Runs the verb that the command line names.
pub fn run(cli: Cli) -> Result<()> {
    match cli.verb {
        Verb::Quickstart(args) => quickstart::quickstart(&args),
        Verb::FetchModel { name, dest } => {
            println!("{}", fetch::fetch(&name, dest.as_deref())?.display());
            Ok(())
        }
        Verb::Train { recipe, mut sets, files, dir, resume, device } => {
            sets.extend(files.into_overrides());
            train::train(&recipe, &sets, dir, resume, device.device)
        }
        Verb::Consolidate(args) => train::consolidate(&args),
        Verb::Eval(args) => eval::eval(&args),
        Verb::Chat(args) => chat::chat(&args),
        Verb::Export(args) => export::export(&args),
        Verb::Adapters(verb) => crate::verb_adapters::adapters(&verb),
        Verb::Data(DataVerb::Check(args)) => data::check::check(&args),
        Verb::Doctor(args) => doctor::doctor(&args),
        Verb::Launch(args) => launch::launch(&args),
        Verb::Estimate(args) => estimate::estimate(&args),
        Verb::Schedule(args) => schedule::schedule(&args),
        Verb::Bench(args) => bench::bench(&args),
        Verb::Logits { model, device, weights, text, by_steps, out } => {
            logits::logits((&model, weights), &device.device, (&text, by_steps), &out)
        }
    }
}
