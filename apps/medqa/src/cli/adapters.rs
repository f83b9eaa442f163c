//! `medqa adapters`.

use super::{ExportArgs, Precision};
use crate::{adapter::Weighted, fetch};
use clap::{Subcommand, ValueEnum};
use std::{num::NonZeroUsize, path::PathBuf};

#[derive(Subcommand)]
pub enum AdaptersVerb {
    /// What adapters are: kind, base model, sizes
    List {
        /// Adapter directories, or folders that hold some
        #[arg(required = true)]
        folders: Vec<PathBuf>,
    },
    /// Write a model with one or several adapters merged, as `export` does; refuses adapters with numbers that are not finite
    Merge(ExportArgs),
    /// Convert an adapter: to llama.cpp's GGUF file and back (with --model), or from PiSSA to plain LoRA (with --initial)
    Convert {
        /// An adapter directory or a GGUF adapter
        from: PathBuf,
        /// FILE.gguf, or a new adapter directory
        to: PathBuf,
        /// The base model, for its sizes; its weights are not loaded
        #[arg(long, default_value = fetch::SMOLLM2)]
        model: String,
        /// The adapter as it was saved before training
        #[arg(long)]
        initial: Option<PathBuf>,
        /// How a GGUF file stores matrices
        #[arg(long, default_value = "f32")]
        dtype: Precision,
    },
    /// Make one LoRA adapter of several, each by a weight; no model is needed
    Combine {
        /// Adapters and their weights; negative ones take away
        #[arg(required = true, value_name = "DIR=WEIGHT")]
        adapters: Vec<Weighted>,
        /// The new adapter directory
        #[arg(long)]
        out: PathBuf,
        /// How: side by side (exact, rank is the sum), svd (the best of a rank), linear (rough, equal ranks)
        #[arg(long, default_value = "cat")]
        how: How,
        /// The rank, for svd; default: the largest of the adapters
        #[arg(long)]
        rank: Option<NonZeroUsize>,
    },
}

/// PEFT's ways to combine adapters.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum How {
    /// Side by side
    Cat,
    /// The best approximation of a rank
    Svd,
    /// Sums of both halves
    Linear,
}
