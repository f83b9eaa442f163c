//! The tables `[model]`, `[data]` and `[method]`.

use burn::tensor::DType;
use burn_llama::Storage;
use burn_peft::kernel;
use serde::{Deserialize, Serialize};

use super::value::{Packing, Source, sources};
use crate::data::{Columns, Format, Schema};

/// `[model]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Model {
    /// A Hugging Face directory, a GGUF file, a hub id or `smollm2-135m-instruct`.
    pub path: String,
    /// Storage of the weights that do not learn; always there once a recipe is loaded: by default f32, with `qlora` the GGUF
    /// file's own blocks, or nf4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// In what products with the model's weights are computed; with bf16 or f16, weights that do not learn are stored so by
    /// default.
    pub compute: Compute,
}

/// In what products are computed. Norms, attention, adapters, sums, the optimizer and weights that learn are f32 either way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// Products of f32
    #[default]
    F32,
    /// Products of bf16, to which both factors are rounded: faster where the machine multiplies them itself
    Bf16,
    /// Products of f16, to which both factors are rounded: what f16 would give elsewhere, at no gain here; the loss is scaled
    F16,
}

impl From<Compute> for kernel::Compute {
    fn from(compute: Compute) -> Self {
        match compute {
            Compute::F32 => Self::F32,
            Compute::Bf16 => Self::Bf16,
            Compute::F16 => Self::F16,
        }
    }
}

/// How a frozen weight is stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 4 bytes
    #[default]
    F32,
    /// 2 bytes, 10 bits of mantissa
    F16,
    /// 2 bytes, the range of f32
    Bf16,
    /// The GGUF file's blocks as they are
    Packed,
    /// 4-bit blocks made from whatever the file holds
    Nf4,
}

impl Dtype {
    /// Whether weights are blocks, which cannot learn.
    pub fn is_packed(self) -> bool {
        matches!(self, Self::Packed | Self::Nf4)
    }
}

impl From<Dtype> for Storage {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::Dense(DType::F32),
            Dtype::F16 => Self::Dense(DType::F16),
            Dtype::Bf16 => Self::Dense(DType::BF16),
            Dtype::Packed => Self::Packed,
            Dtype::Nf4 => Self::Nf4,
        }
    }
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Data {
    /// Rows to validate on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub valid: Option<String>,
    /// At most so many rows of `valid`, the first ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub valid_limit: Option<usize>,
    /// Format of every file that does not name its own.
    pub format: Format,
    /// Longest row, in tokens.
    pub max_length: usize,
    /// What happens to a longer one.
    pub on_too_long: OnTooLong,
    /// Whether each epoch sees the rows in an order of its own.
    pub shuffle: bool,
    /// Whether rows of like lengths are put into the same steps, so that they need less padding; only with `shuffle`.
    pub group_by_length: bool,
    /// Whether the rows of a batch are joined into one without padding, which changes no result beyond rounding; `"fill"`: and
    /// as many rows make a micro-batch as have `train.batch_size` · `max_length` tokens together.
    pub packing: Packing,
    /// The files' own names of the format's columns, such as `{ question = "prompt" }`.
    #[serde(skip_serializing_if = "Columns::is_empty")]
    pub columns: Columns,
    /// Rows to train on: a path, or a list of `{ path, format, columns, weight }`.
    #[serde(deserialize_with = "sources")]
    pub train: Vec<Source>,
}

impl Default for Data {
    fn default() -> Self {
        Self {
            valid: None,
            valid_limit: None,
            format: Format::Qa,
            max_length: 512,
            on_too_long: OnTooLong::Truncate,
            shuffle: true,
            group_by_length: false,
            packing: Packing::Joined,
            columns: Columns::default(),
            train: Vec::new(),
        }
    }
}

impl Data {
    /// How a file is read: as its source says, else as the table says. The table's columns are those of its own format.
    pub fn schema(&self, source: Option<&Source>) -> Schema {
        let format = source.and_then(|source| source.format).unwrap_or(self.format);
        let shared = if format == self.format { self.columns.clone() } else { Columns::default() };
        Schema { format, columns: source.and_then(|source| source.columns.clone()).unwrap_or(shared) }
    }
}

/// What happens to a row longer than `max_length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnTooLong {
    /// It is cut to the length
    Truncate,
    /// It is left out, and counted
    Drop,
    /// It is a mistake, and a run does not start
    Error,
}
