//! The command line.

mod adapters;
mod figures;

pub use adapters::{AdaptersVerb, How};
pub use figures::{BenchArgs, EstimateArgs, Learned, ScheduleArgs};

use crate::{
    adapter::Source,
    backend::Device,
    bench, chat,
    data::{self, Columns, Format, Schema},
    doctor, estimate, eval, export, fetch, launch, logits, quickstart,
    recipe::{Compute, Dtype, OnTooLong},
    schedule, train,
};
use anyhow::{Result, anyhow};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::{ffi::OsString, num::NonZeroUsize, path::PathBuf};

/// Fine-tune, evaluate and chat with a LLaMA on medical questions.
#[derive(Parser)]
#[command(version, about)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Start here: fine-tune a model on a few hundred embedded lessons and compare before with after; takes minutes
    Quickstart(QuickstartArgs),
    /// Get a model and print where it is
    FetchModel {
        /// The model: smollm2-135m-instruct, or a hub id such as owner/name
        #[arg(default_value = fetch::SMOLLM2)]
        name: String,
        /// A folder to put it in; default: the cache
        #[arg(long)]
        dest: Option<PathBuf>,
    },
    /// Fine-tune a model as a recipe says
    Train {
        /// The recipe, a TOML file
        recipe: PathBuf,
        /// Change a value of the recipe, for example --set train.max_steps=64
        #[arg(long = "set", value_name = "KEY=VALUE")]
        sets: Vec<String>,
        #[command(flatten)]
        files: FilesArgs,
        /// The folder for everything the run writes; default: runs/NAME-OF-RECIPE
        #[arg(long)]
        dir: Option<PathBuf>,
        /// Go on with the run in --dir after its last checkpoint
        #[arg(long)]
        resume: bool,
        #[command(flatten)]
        device: DeviceArgs,
    },
    /// Make one model, or one adapter, of a checkpoint that ranks have written in parts
    Consolidate(ConsolidateArgs),
    /// Measure a model: the loss of answers, or accuracy on PubMedQA
    Eval(EvalArgs),
    /// Talk to a model
    Chat(ChatArgs),
    /// Write a model, its adapter merged, as a Hugging Face directory or as a GGUF file for llama.cpp
    Export(ExportArgs),
    /// Look at adapters, merge them into a model, convert and combine them
    #[command(subcommand)]
    Adapters(AdaptersVerb),
    /// Look at rows before training on them
    #[command(subcommand)]
    Data(DataVerb),
    /// Check that a model, its tokenizer and your rows behave in training as in chat; code 1 where they do not
    Doctor(DoctorArgs),
    /// Start a verb as several ranks by mpirun: medqa launch -n 2 -- train RECIPE --set parallel.zero_stage=2
    Launch(LaunchArgs),
    /// How much memory a run would need, by ZeRO stage, place of the optimizer and precision; loads no weights
    Estimate(EstimateArgs),
    /// Draw a pipeline schedule and count its bubble and its live activations
    Schedule(ScheduleArgs),
    /// How fast a model reads, writes and learns here, and the memory that it takes, as one line of JSON
    Bench(BenchArgs),
    /// Write the logits of every token of a text
    Logits {
        #[command(flatten)]
        model: ModelArgs,
        #[command(flatten)]
        device: DeviceArgs,
        #[command(flatten)]
        weights: WeightsArgs,
        /// The text
        #[arg(long)]
        text: String,
        /// Compute one token after the other, as an answer is written, instead of all at once
        #[arg(long)]
        by_steps: bool,
        /// The file: safetensors with `ids` (i64) and `logits` [tokens, vocabulary] (f32)
        #[arg(long)]
        out: PathBuf,
    },
}

/// Files besides the recipe; each is short for a key of it.
#[derive(Args, Clone)]
pub struct FilesArgs {
    /// DeepSpeed's ds_config.json: what it says is put where the recipe says nothing (parallel.deepspeed)
    #[arg(long, value_name = "FILE")]
    deepspeed: Option<String>,
    /// The YAML of `accelerate config`, likewise (parallel.accelerate)
    #[arg(long, value_name = "FILE")]
    accelerate: Option<String>,
    /// Write the timeline of all ranks, to be opened in Perfetto (parallel.trace)
    #[arg(long, value_name = "FILE")]
    trace: Option<String>,
}

impl FilesArgs {
    /// The same as values of the recipe.
    fn sets(self) -> impl Iterator<Item = String> {
        let files = [("deepspeed", self.deepspeed), ("accelerate", self.accelerate), ("trace", self.trace)];
        let set = |(key, file): (&str, Option<String>)| Some(format!("parallel.{key}={}", toml::Value::String(file?)));
        files.into_iter().filter_map(set)
    }
}

/// Where the verb computes.
#[derive(Args, Clone)]
pub struct DeviceArgs {
    /// `cpu`, `tch`, `tch:cuda:N`, `cuda:N`, `vulkan` or `vulkan:N`, `wgpu` or `wgpu:N`; each needs a binary built with its
    /// feature
    #[arg(long, default_value_t)]
    pub device: Device,
}

/// Which model.
#[derive(Args, Clone)]
pub struct ModelArgs {
    /// smollm2-135m-instruct, a hub id, a Hugging Face directory or a GGUF file
    #[arg(long, default_value = fetch::SMOLLM2)]
    pub model: String,
    /// An adapter directory (PEFT's format), with a name if it shall have one; `chat`, `eval` and `export` take several
    #[arg(long, value_name = "[NAME=]DIR")]
    pub adapter: Vec<Source>,
    /// Take the tokenizer from this directory or GGUF file instead of the model's
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
}

/// How the model's weights are held and multiplied.
#[derive(Args, Clone, Copy)]
pub struct WeightsArgs {
    /// How weights are held in memory; packed needs a GGUF file
    #[arg(long, default_value = "f32")]
    pub weights: Dtype,
    /// In what products with them are computed
    #[arg(long, default_value = "f32")]
    pub compute: Compute,
}

#[derive(Args)]
pub struct QuickstartArgs {
    /// The folder for everything the run writes
    #[arg(long, default_value = "runs/quickstart")]
    pub dir: PathBuf,
    /// As for `chat`, or `tiny`: made on the spot, needs no network. Default: smollm2-135m-instruct, else `tiny`
    #[arg(long)]
    pub model: Option<String>,
    /// Optimizer steps; fewer are faster and teach less
    #[arg(long)]
    pub steps: Option<NonZeroUsize>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// How rows are read.
#[derive(Args, Clone)]
pub struct RowsArgs {
    /// The format of the rows
    #[arg(long, default_value = "qa")]
    pub format: Format,
    /// The file's own names of the format's columns, for example question=prompt,answer=response
    #[arg(long, value_name = "COLUMN=NAME,...")]
    pub columns: Option<Columns>,
}

impl RowsArgs {
    pub fn schema(&self) -> Result<Schema> {
        let columns = self.columns.clone().unwrap_or_default();
        columns.check(self.format).map_err(|problem| anyhow!("--columns: {problem}"))?;
        Ok(Schema { format: self.format, columns })
    }
}

#[derive(Subcommand)]
pub enum DataVerb {
    /// Count a file's rows, measure them, show one as it is learned, and list its mistakes; code 2 where there are any
    Check(CheckArgs),
}

#[derive(Args)]
pub struct CheckArgs {
    /// The file of rows
    pub file: PathBuf,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub rows: RowsArgs,
    /// Longest row, in tokens
    #[arg(long, default_value_t = 512)]
    pub max_length: usize,
    /// What happens to a longer one
    #[arg(long, default_value = "truncate")]
    pub on_too_long: OnTooLong,
}

#[derive(Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Rows to check with; without them, a short conversation
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Without the checks that train
    #[arg(long)]
    pub quick: bool,
    #[command(flatten)]
    pub rows: RowsArgs,
}

/// What is measured.
#[derive(Clone, Copy, ValueEnum)]
pub enum Task {
    /// The mean loss over the tokens of answers
    QaLoss,
    /// PubMedQA: yes, no or maybe, by log-likelihood
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
    /// What to measure
    #[arg(long)]
    pub task: Task,
    /// The rows
    #[arg(long)]
    pub data: PathBuf,
    #[command(flatten)]
    pub rows: RowsArgs,
    /// Only the first rows
    #[arg(long)]
    pub limit: Option<NonZeroUsize>,
    /// Cut rows to this many tokens
    #[arg(long)]
    pub max_length: Option<usize>,
    /// Rows computed together, for qa-loss
    #[arg(long, default_value = "4")]
    pub batch_size: NonZeroUsize,
    /// Write the result, with every item, as JSON
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
    /// Answer this one question and stop; without it, a conversation starts
    #[arg(long)]
    pub prompt: Option<String>,
    /// At most this many tokens per answer
    #[arg(long, default_value_t = 256)]
    pub max_new_tokens: usize,
    /// 0 always takes the likeliest token; higher is more varied
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f64,
    /// Draw from the likeliest tokens only; 0: from all
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f64,
    /// Above 1, tokens that occurred become less likely
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f64,
    /// The seed of the draws
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Stop when the answer contains this text; may be given several times
    #[arg(long)]
    pub stop: Vec<String>,
}

/// How matrices are stored.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    /// 32-bit floats
    F32,
    /// 16-bit floats
    F16,
    /// 8-bit integers with a scale for every 32 (GGUF only)
    #[value(name = "q8_0")]
    Q8_0,
}

#[derive(Args)]
pub struct ExportArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// FILE.gguf for a GGUF file; any other name is a new folder with config.json, model.safetensors and the tokenizer
    #[arg(long)]
    pub out: PathBuf,
    /// How matrices are stored; norms and biases are f32 in GGUF
    #[arg(long, default_value = "f32")]
    pub dtype: Precision,
    /// Round the projections to nf4 first: the weights that training with model.dtype = "nf4" has, as floats
    #[arg(long, conflicts_with = "adapter_only")]
    pub nf4: bool,
    /// Write the adapter alone, as a GGUF file that llama.cpp applies with --lora to the model exported as GGUF
    #[arg(long)]
    pub adapter_only: bool,
}

#[derive(Args)]
pub struct ConsolidateArgs {
    /// A run folder, for its last checkpoint, or one of its checkpoints
    pub checkpoint: PathBuf,
    /// A new folder: a Hugging Face model, or an adapter as PEFT writes it
    #[arg(long)]
    pub out: PathBuf,
}

#[derive(Args)]
pub struct LaunchArgs {
    /// How many
    #[arg(short = 'n', long)]
    pub ranks: NonZeroUsize,
    /// mpirun's file of machines and their slots; without it, all ranks are here
    #[arg(long)]
    pub hostfile: Option<PathBuf>,
    /// The verb and its arguments
    #[arg(last = true, required = true)]
    pub command: Vec<OsString>,
}

/// Does what the command line says.
pub fn run(cli: Cli) -> Result<()> {
    match cli.verb {
        Verb::Quickstart(args) => quickstart::quickstart(&args),
        Verb::FetchModel { name, dest } => {
            println!("{}", fetch::fetch(&name, dest.as_deref())?.display());
            Ok(())
        }
        Verb::Train { recipe, mut sets, files, dir, resume, device } => {
            sets.extend(files.sets());
            train::train(&recipe, &sets, dir, (resume, device.device))
        }
        Verb::Consolidate(args) => train::consolidate(&args),
        Verb::Eval(args) => eval::eval(&args),
        Verb::Chat(args) => chat::chat(&args),
        Verb::Export(args) => export::export(&args),
        Verb::Adapters(verb) => crate::adapters::adapters(&verb),
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
