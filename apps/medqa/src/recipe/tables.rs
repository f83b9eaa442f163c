//! The tables `[model]` and `[data]`.

use burn::tensor::DType;
use burn_llama::Storage;
use burn_peft::MatmulPrecision;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    validation_rows::ValidationRows,
    value::{DatasetSource, Packing, deserialize_sources},
};
use crate::schema::{Columns, Format, SchemaRequest};

/// The table `[model]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelConfig {
    /// A Hugging Face directory, a GGUF file, a hub id or `smollm2-135m-instruct`.
    pub path: String,
    /// A file with a chat template, instead of the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// The storage format of frozen weights; always set once a recipe is loaded. By default f32, with `qlora` the GGUF
    /// file's own blocks, or nf4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<WeightDtype>,
    /// The numeric format of matrix products with the model's weights; with bf16 or f16, frozen weights are also stored
    /// in it by default.
    pub compute: ComputeDtype,
}

/// Numeric format of the matrix products. Norms, attention, adapters, accumulators, the optimizer and trainable weights
/// are f32 in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// Matrix products in f32
    #[default]
    F32,
    /// Matrix products in bf16, to which both factors are rounded: faster if the hardware multiplies bf16
    Bf16,
    /// Matrix products in f16, to which both factors are rounded: the results of f16 elsewhere, without a gain in speed
    /// here; the loss is scaled
    F16,
}

impl From<ComputeDtype> for MatmulPrecision {
    fn from(compute: ComputeDtype) -> Self {
        match compute {
            ComputeDtype::F32 => Self::F32,
            ComputeDtype::Bf16 => Self::Bf16,
            ComputeDtype::F16 => Self::F16,
        }
    }
}

/// Storage format of frozen weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum WeightDtype {
    /// 4 bytes per weight
    #[default]
    F32,
    /// 2 bytes per weight, 10 bits of mantissa
    F16,
    /// 2 bytes per weight, the range of f32
    Bf16,
    /// The quantized blocks of the GGUF file as they are
    Packed,
    /// 4-bit NormalFloat blocks, quantized from whatever the file holds
    Nf4,
}

impl WeightDtype {
    /// Returns whether weights are quantized blocks, which cannot be trained.
    pub fn is_packed(self) -> bool {
        matches!(self, Self::Packed | Self::Nf4)
    }
}

impl From<WeightDtype> for Storage {
    fn from(dtype: WeightDtype) -> Self {
        match dtype {
            WeightDtype::F32 => Self::Dense(DType::F32),
            WeightDtype::F16 => Self::Dense(DType::F16),
            WeightDtype::Bf16 => Self::Dense(DType::BF16),
            WeightDtype::Packed => Self::Packed,
            WeightDtype::Nf4 => Self::Nf4,
        }
    }
}

/// The table `[data]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataConfig {
    /// The file of validation rows, or the share of the training rows that is taken for validation, such as `0.05`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub valid: Option<ValidationRows>,
    /// The maximum number of rows of `valid`, the first ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub valid_limit: Option<usize>,
    /// The format of every file that does not name its own; by default it is recognized by the keys of the rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// The maximum length of a row, in tokens.
    pub max_length: usize,
    /// The treatment of longer rows.
    pub on_too_long: OnTooLong,
    /// The answers of a conversation that are learned.
    pub learn: Learn,
    /// The token that ends an answer, instead of the one that the chat template writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_token: Option<String>,
    /// True if rows are shuffled anew for every epoch.
    pub shuffle: bool,
    /// True if rows of similar length are put into the same steps, so that they need less padding; only with `shuffle`.
    pub group_by_length: bool,
    /// True if the rows of a micro-batch are concatenated without padding, which changes no result beyond rounding;
    /// `"fill"` also puts as many rows into a micro-batch as fit into `train.batch_size` · `max_length` tokens.
    pub packing: Packing,
    /// The column names of the files, if they differ from those of the format, such as `{ question = "prompt" }`.
    #[serde(skip_serializing_if = "Columns::is_empty")]
    pub columns: Columns,
    /// Variables of the chat template, such as `{ enable_thinking = false }`.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub template_arguments: Map<String, Value>,
    /// The files of training rows: a path, or a list of `{ path, format, columns, weight }`.
    #[serde(deserialize_with = "deserialize_sources")]
    pub train: Vec<DatasetSource>,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            valid: None,
            valid_limit: None,
            format: None,
            max_length: 512,
            on_too_long: OnTooLong::Truncate,
            learn: Learn::All,
            end_token: None,
            shuffle: true,
            group_by_length: false,
            packing: Packing::PaddingFree,
            columns: Columns::default(),
            template_arguments: Map::new(),
            train: Vec::new(),
        }
    }
}

impl DataConfig {
    /// Returns the format and columns that are asked for a file: those of its source, else those of the table. The
    /// table's columns apply only to the table's own format.
    pub fn schema(&self, source: Option<&DatasetSource>) -> SchemaRequest {
        let format = source.and_then(|source| source.format).or(self.format);
        let same = format.unwrap_or_default() == self.format.unwrap_or_default();
        let shared = if same { self.columns.clone() } else { Columns::default() };
        SchemaRequest { format, columns: source.and_then(|source| source.columns.clone()).unwrap_or(shared) }
    }
}

/// Answers of a conversation that are learned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Learn {
    /// Learn every answer
    #[default]
    All,
    /// Learn the last answer only
    Last,
}

/// Treatment of rows longer than `max_length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnTooLong {
    /// Cut the row to the length
    Truncate,
    /// Leave the row out, and count it
    Drop,
    /// Report an error; a run does not start
    Error,
}
