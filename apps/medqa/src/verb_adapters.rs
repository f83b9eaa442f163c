//! The verb `adapters`: listing, merging, converting and combining adapters.

use crate::{
    args::parse_positive,
    backend::{Device, with_backend},
    export::{self, ExportArgs, ExportDtype},
    fetch::{self, is_gguf},
    identify::{self, Purpose, adapter_directories},
};
use anyhow::{Context, Result, anyhow, bail};
use burn_llama::checkpoint::gguf::adapter_to_peft;
use burn_peft::{
    adapter::{CombinationType, Weighted, combine_directories, convert_mutated_to_lora},
    format,
};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::Value;
use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    str::FromStr,
};

/// The verbs of `adapters`.
#[derive(Subcommand)]
pub(crate) enum AdaptersVerb {
    /// List adapters with their PEFT type, number of values, settings and base model
    List(ListArgs),
    /// Write a model with one or several adapters merged, as `export` does; refuses adapters with infinite or NaN
    /// values
    Merge(ExportArgs),
    /// Convert an adapter to llama.cpp's GGUF format or back (with --model), or from PiSSA to plain LoRA (with
    /// --initial)
    Convert(ConvertArgs),
    /// Combine several LoRA adapters into one, each with a weight; needs no model
    Combine(CombineArgs),
}

/// Arguments of `adapters list`.
#[derive(Args)]
pub(crate) struct ListArgs {
    /// Adapter directories, or directories to search for adapters
    #[arg(required = true)]
    pub folders: Vec<PathBuf>,
}

/// Arguments of `adapters convert`.
#[derive(Args)]
pub(crate) struct ConvertArgs {
    /// Adapter directory or GGUF adapter to convert
    pub from: PathBuf,
    /// Output: FILE.gguf, or a new adapter directory
    pub to: PathBuf,
    /// Base model, needed for its dimensions; its weights are not loaded
    #[arg(long, default_value = fetch::SMOLLM2)]
    pub model: String,
    /// The same PiSSA adapter as saved before training
    #[arg(long)]
    pub initial: Option<PathBuf>,
    /// Numeric format of the matrices in a GGUF file
    #[arg(long, default_value = "f32")]
    pub dtype: ExportDtype,
}

/// Arguments of `adapters combine`.
#[derive(Args)]
pub(crate) struct CombineArgs {
    /// Adapters and their weights; a negative weight subtracts the adapter
    #[arg(required = true, value_name = "DIR=WEIGHT")]
    pub adapters: Vec<WeightedAdapter>,
    /// New adapter directory for the result
    #[arg(long)]
    pub out: PathBuf,
    /// PEFT's combination type: cat (concatenation: exact, the ranks add up), svd (the best approximation of a
    /// given rank), linear (sums the A and the B matrices: inexact, needs equal ranks)
    #[arg(long, default_value = "cat")]
    pub how: CombinationArg,
    /// LoRA rank of the result, for svd; default: the largest rank of the adapters
    #[arg(long, value_parser = parse_positive::<NonZeroUsize>)]
    pub rank: Option<NonZeroUsize>,
}

/// Combination type, as in PEFT's `add_weighted_adapter`.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CombinationArg {
    /// Concatenate the A and the B matrices: exact
    Cat,
    /// Best approximation of a given rank, by singular value decomposition
    Svd,
    /// Sum the A and the B matrices: inexact
    Linear,
}

/// An adapter directory and its weight in a combination, given as `DIR=WEIGHT`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct WeightedAdapter {
    /// Path of PEFT's adapter directory.
    pub directory: PathBuf,
    /// Factor of the adapter in the sum.
    pub weight: f64,
}

impl FromStr for WeightedAdapter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.rsplit_once('=').and_then(|(directory, weight)| Some((directory, weight.parse().ok()?)));
        match parts.filter(|(_, weight): &(_, f64)| weight.is_finite()) {
            Some((directory, weight)) => Ok(Self { directory: directory.into(), weight }),
            None => Err("expected DIR=WEIGHT with a finite number, such as runs/a/adapter=0.7".to_owned()),
        }
    }
}

/// Runs the verb `adapters`.
pub(crate) fn adapters(verb: &AdaptersVerb) -> Result<()> {
    match verb {
        AdaptersVerb::List(args) => list(&args.folders),
        AdaptersVerb::Merge(args) => {
            if args.model.adapter.is_empty() {
                bail!("--adapter [NAME=]DIR: expected at least one adapter to merge, found none");
            }
            if args.adapter_only {
                bail!("--adapter-only: expected a model to merge into; `adapters convert` writes an adapter by itself");
            }
            export::export(args)
        }
        AdaptersVerb::Convert(args) => {
            convert(args)?;
            println!("{}", args.to.display());
            Ok(())
        }
        AdaptersVerb::Combine(args) => {
            combine(args)?;
            println!("{}", args.out.display());
            Ok(())
        }
    }
}

const ADAPTER_CONFIG: &str = "adapter_config.json";

/// Finds the adapter directories in `folder`: itself, or those inside it at any depth.
fn find_adapters(folder: &Path) -> Result<Vec<PathBuf>> {
    let (mut found, mut open) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = open.pop() {
        if folder.join(ADAPTER_CONFIG).is_file() {
            found.push(folder.clone());
        }
        let entries = fs::read_dir(&folder).with_context(|| format!("{}: cannot be read", folder.display()))?;
        open.extend(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir() && !path.is_symlink()));
    }
    if found.is_empty() {
        let expected = anyhow!("{}: expected adapters (folders with {ADAPTER_CONFIG}), found none", folder.display());
        return Err(identify::explain(expected, folder, Purpose::Adapter));
    }
    found.sort();
    Ok(found)
}

/// Prints a line for each adapter, and for each folder that is none or cannot be read.
///
/// # Errors
/// If there was such a folder, after all others have been listed.
fn list(folders: &[PathBuf]) -> Result<()> {
    println!("{:<40} {:<14} {:>11}  details", "adapter", "kind", "values");
    let (mut listed, mut failed) = (0, 0);
    for folder in folders {
        let lines = find_adapters(folder).map_or_else(
            |error| vec![(folder.clone(), Err(error))],
            |found| found.into_iter().map(|adapter| (adapter.clone(), line(&adapter))).collect(),
        );
        for (adapter, line) in lines {
            listed += 1;
            match line {
                Ok(line) => println!("{:<40} {line}", adapter.display().to_string()),
                Err(error) => {
                    failed += 1;
                    println!("{:<40} cannot be read: {error:#}", adapter.display().to_string());
                }
            }
        }
    }
    if failed > 0 {
        bail!("{failed} of {listed} cannot be read");
    }
    Ok(())
}

/// Describes an adapter by its PEFT type, its number of values and its settings.
fn line(directory: &Path) -> Result<String> {
    let directory = identify::adapter_directory(directory)?;
    let config = format::read_config(&directory)?;
    let tensors = format::read_tensors(&directory)?;
    let values: usize = tensors.values().map(|data| data.num_elements()).sum();
    let kind = config["peft_type"].as_str().unwrap_or("?");
    Ok(format!("{kind:<14} {values:>11}  {}", describe(&config)))
}

/// Describes an adapter by its main settings and its base model.
fn describe(config: &Value) -> String {
    let mut words = Vec::new();
    let mut add = |name: &str, value: &Value| {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        words.push(format!("{name} {text}"));
    };
    // AdaLoRA does not use `r`.
    let rank = if config["peft_type"] == "ADALORA" { ("target_r", "mean rank") } else { ("r", "rank") };
    for (key, name) in [rank, ("lora_alpha", "alpha"), ("num_virtual_tokens", "virtual tokens")] {
        if !config[key].is_null() {
            add(name, &config[key]);
        }
    }
    match &config["target_modules"] {
        Value::Array(names) => {
            let names: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
            add("on", &names.join(" ").into());
        }
        Value::Null => {}
        pattern => add("on", pattern),
    }
    for (key, name) in [("use_dora", "DoRA"), ("use_rslora", "rsLoRA"), ("prefix_projection", "projected")] {
        words.extend((config[key] == true).then(|| name.to_owned()));
    }
    let base = config["base_model_name_or_path"].as_str().unwrap_or("?");
    words.push(format!("for {base}"));
    words.join(", ")
}

/// Returns an error if `out` is a file or a directory that is not empty.
fn require_new_folder(out: &Path) -> Result<()> {
    if out.is_file() || out.read_dir().is_ok_and(|mut files| files.next().is_some()) {
        bail!("{}: expected a new folder, but something is there already; choose another", out.display());
    }
    Ok(())
}

fn convert(args: &ConvertArgs) -> Result<()> {
    let ConvertArgs { from, to, model, initial, dtype } = args;
    match (is_gguf(from), is_gguf(to), initial) {
        (true, false, None) => {
            require_new_folder(to)?;
            let checkpoint = fetch::open_checkpoint(model)?;
            Ok(adapter_to_peft(checkpoint.config(), from, to)?)
        }
        (false, true, None) => {
            if *dtype == ExportDtype::Q8_0 {
                bail!("--dtype: expected f32 or f16 for an adapter, found q8_0");
            }
            export::write_adapter_gguf(model, from, *dtype, to)
        }
        (false, false, Some(initial)) => {
            require_new_folder(to)?;
            let (from, initial) = (&identify::adapter_directory(from)?, &identify::adapter_directory(initial)?);
            with_backend!(Device::default(), |B, device| Ok(convert_mutated_to_lora::<B>(from, initial, to, device)?))
        }
        (false, false, None) => bail!(
            "{}: expected a name that ends in .gguf, or --initial DIR, the adapter as it was before training, to convert PiSSA to plain LoRA",
            to.display()
        ),
        _ => bail!(
            "expected DIR to FILE.gguf, FILE.gguf to DIR, or DIR to DIR with --initial, found {} to {}",
            from.display(),
            to.display()
        ),
    }
}

fn combine(args: &CombineArgs) -> Result<()> {
    require_new_folder(&args.out)?;
    if args.rank.is_some() && args.how != CombinationArg::Svd {
        bail!("--rank: only --how svd accepts a rank; otherwise it follows from the adapters");
    }
    let how = match args.how {
        CombinationArg::Cat => CombinationType::Cat,
        CombinationArg::Linear => CombinationType::Linear,
        CombinationArg::Svd => CombinationType::Svd { rank: args.rank.map(usize::from) },
    };
    let directories = adapter_directories(args.adapters.iter().map(|part| part.directory.as_path()))?;
    let weights = args.adapters.iter().map(|part| part.weight);
    let parts =
        directories.iter().zip(weights).map(|(adapter, weight)| Weighted { adapter: adapter.as_path(), weight });
    let parts: Vec<_> = parts.collect();
    with_backend!(Device::default(), |B, device| combine_directories::<B>(&parts, how, &args.out, device))?;
    Ok(())
}
