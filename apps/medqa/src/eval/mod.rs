//! The verb `eval`: evaluates a model and its adapters.

mod metrics;
mod neutral;
mod pubmedqa;
mod qa_loss;

pub(crate) use qa_loss::{EvalBatching, TotalLoss, eval_batches, total_loss};

use crate::{
    args::{DeviceArgs, ModelArgs, RowsArgs, WeightsArgs, parse_positive},
    backend::with_backend,
    data::{Row, read_rows},
    model::{self, LoadedModel},
    schema::{Format, SchemaRequest},
    write,
};
use anyhow::{Context, Result};
use burn_llama::kernel::Kernels;
use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};
use std::{num::NonZeroUsize, path::PathBuf};

/// Evaluation task.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum EvalTask {
    /// Mean loss over the answer tokens
    QaLoss,
    /// PubMedQA accuracy; the answer is the most likely of yes, no and maybe
    Pubmedqa,
}

/// Arguments of `eval`.
#[derive(Args)]
pub(crate) struct EvalArgs {
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
    #[command(flatten)]
    pub limits: EvalLimits,
    /// Write the result as JSON to this file, for pubmedqa with every item
    #[arg(long)]
    pub out: Option<PathBuf>,
}

/// Number and length of the rows of an evaluation, and of its batches.
#[derive(Args)]
pub(crate) struct EvalLimits {
    /// Evaluate only this many rows, from the start of the file
    #[arg(long, value_parser = parse_positive::<NonZeroUsize>)]
    pub limit: Option<NonZeroUsize>,
    /// Truncate rows to this many tokens; default: the model's maximum length
    #[arg(long)]
    pub max_length: Option<usize>,
    /// Rows per forward pass, for qa-loss
    #[arg(long, default_value = "4", value_parser = parse_positive::<NonZeroUsize>)]
    pub batch_size: NonZeroUsize,
}

/// Runs the verb `eval`: prints the metrics on stdout and writes the full result to `--out`.
pub(crate) fn eval(args: &EvalArgs) -> Result<()> {
    let schema = match args.task {
        EvalTask::QaLoss => args.rows.schema()?,
        EvalTask::Pubmedqa => SchemaRequest { format: Some(Format::PubMedQa), ..SchemaRequest::default() },
    };
    let mut rows = read_rows(&args.data, &schema)?;
    rows.truncate(args.limits.limit.map_or(usize::MAX, usize::from));
    let mut result = with_backend!(args.device.device.ensure_ready()?, |B, device| evaluate::<B>(args, device, &rows))?;
    if let Some(path) = &args.out {
        write::write_atomically(path, format!("{result:#}\n").as_bytes())?;
    }
    remove_items(&mut result);
    println!("{result}");
    Ok(())
}

/// Removes the items, of which there may be many.
fn remove_items(result: &mut Value) {
    if let Some(fields) = result.as_object_mut() {
        fields.remove("items");
        fields.values_mut().for_each(remove_items);
    }
}

/// Evaluates the adapter, or the base model if there is none; with several adapters, evaluates the base model and each
/// of them, and prints a table. Every result includes the loss on a neutral text, without and with the adapter.
fn evaluate<B: Kernels>(args: &EvalArgs, device: &B::Device, rows: &[Row]) -> Result<Value> {
    let mut loaded = model::load_without_adapters::<B>(&args.model, args.weights.weights, device)?;
    loaded.tokenizer = args.rows.template.options().apply(loaded.tokenizer)?;
    loaded.model = model::with_compute(loaded.model, args.weights.compute)?;
    let total = neutral::neutral_loss(&loaded)?;
    let (before, tokens) = (total.mean(), total.target_tokens);
    let several = args.model.adapter.len() > 1;
    let base = (several || args.model.adapter.is_empty()).then(|| run_task(&loaded, rows, args)).transpose()?;
    model::add_adapters(&mut loaded, &args.model)?;
    let mut found = Vec::new();
    for source in &args.model.adapter {
        burn_peft::adapter::activate(&mut loaded.model, &[&source.name])?;
        let after = neutral::neutral_loss(&loaded)?.mean();
        let neutral = json!({ "tokens": tokens, "base": before, "adapter": after, "rise": after - before });
        found.push((source.name.clone(), with_neutral_loss(run_task(&loaded, rows, args)?, neutral)));
    }
    let neutral = json!({ "tokens": tokens, "base": before });
    match (base.map(|base| with_neutral_loss(base, neutral)), found.pop()) {
        (Some(base), None) => Ok(base),
        (None, Some((_, only))) => Ok(only),
        (base, last) => {
            let base = base.unwrap_or_default();
            found.extend(last);
            print_table(&base, &found);
            let adapters: Map<String, Value> = found.into_iter().collect();
            Ok(json!({ "task": base["task"], "base": base, "adapters": adapters }))
        }
    }
}

/// Returns the default maximum length of a row: the model's, less the virtual tokens before the row.
fn room<B: Kernels>(loaded: &LoadedModel<B>) -> usize {
    loaded.model.config().max_position_embeddings.saturating_sub(loaded.model.num_virtual_tokens()).max(1)
}

fn with_neutral_loss(mut result: Value, neutral: Value) -> Value {
    result["neutral_loss"] = neutral;
    result
}

fn run_task<B: Kernels>(loaded: &LoadedModel<B>, rows: &[Row], args: &EvalArgs) -> Result<Value> {
    let result = match args.task {
        // A mistake in a row names its own file.
        EvalTask::QaLoss => qa_loss::evaluate(loaded, &qa_loss::encode(loaded, rows, args)?, args),
        EvalTask::Pubmedqa => pubmedqa::evaluate(loaded, rows, args),
    };
    result.with_context(|| args.data.display().to_string())
}

/// Prints one line for the model without adapters and one for each adapter.
fn print_table(base: &Value, adapters: &[(String, Value)]) {
    let columns: &[&str] = if base["task"] == "qa-loss" { &["loss", "perplexity"] } else { &["accuracy", "macro_f1"] };
    let line = |name: &str, result: &Value, neutral: &str| {
        let figures = columns.iter().map(|column| result[column].as_f64());
        let figures = figures.chain([result["neutral_loss"][neutral].as_f64()]);
        let figures: Vec<String> = figures.map(|figure| format!("{:>12.4}", figure.unwrap_or(f64::NAN))).collect();
        println!("{name:<24}{}", figures.concat());
    };
    let heads: Vec<String> = columns.iter().chain(&["neutral loss"]).map(|head| format!("{head:>12}")).collect();
    println!("{:<24}{}", "", heads.concat());
    line("base", base, "base");
    adapters.iter().for_each(|(name, result)| line(name, result, "adapter"));
}
