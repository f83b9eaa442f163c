//! Arguments of `medqa adapters`.

use super::{ExportArgs, ExportDtype};
use crate::{fetch, method_adapter::WeightedAdapter};
use clap::{Subcommand, ValueEnum};
use std::{num::NonZeroUsize, path::PathBuf};

#[derive(Subcommand)]
pub enum AdaptersVerb {
    /// List adapters with their PEFT type, number of values, settings and base model
    List {
        /// Adapter directories, or directories to search for adapters
        #[arg(required = true)]
        folders: Vec<PathBuf>,
    },
    /// Write a model with one or several adapters merged, as `export` does; refuses adapters with infinite or NaN
    /// values
    Merge(ExportArgs),
    /// Convert an adapter to llama.cpp's GGUF format or back (with --model), or from PiSSA to plain LoRA (with
    /// --initial)
    Convert {
        /// Adapter directory or GGUF adapter to convert
        from: PathBuf,
        /// Output: FILE.gguf, or a new adapter directory
        to: PathBuf,
        /// Base model, needed for its dimensions; its weights are not loaded
        #[arg(long, default_value = fetch::SMOLLM2)]
        model: String,
        /// The same PiSSA adapter as saved before training
        #[arg(long)]
        initial: Option<PathBuf>,
        /// Numeric format of the matrices in a GGUF file
        #[arg(long, default_value = "f32")]
        dtype: ExportDtype,
    },
    /// Combine several LoRA adapters into one, each with a weight; needs no model
    Combine {
        /// Adapters and their weights; a negative weight subtracts the adapter
        #[arg(required = true, value_name = "DIR=WEIGHT")]
        adapters: Vec<WeightedAdapter>,
        /// New adapter directory for the result
        #[arg(long)]
        out: PathBuf,
        /// PEFT's combination type: cat (concatenation: exact, the ranks add up), svd (the best approximation of a
        /// given rank), linear (sums the A and the B matrices: inexact, needs equal ranks)
        #[arg(long, default_value = "cat")]
        how: CombinationArg,
        /// LoRA rank of the result, for svd; default: the largest rank of the adapters
        #[arg(long)]
        rank: Option<NonZeroUsize>,
    },
}

/// Combination type, as in PEFT's `add_weighted_adapter`.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CombinationArg {
    /// Concatenate the A and the B matrices: exact
    Cat,
    /// Best approximation of a given rank, by singular value decomposition
    Svd,
    /// Sum the A and the B matrices: inexact
    Linear,
}
