//! Arguments that several verbs share.

use crate::{
    backend::Device,
    fetch,
    method_adapter::ADAPTER_NAME,
    recipe::{ComputeDtype, WeightDtype},
    schema::{Columns, Format, Schema},
};
use anyhow::{Result, anyhow};
use clap::Args;
use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    str::FromStr,
};

/// Parses a number of a type without zero, such as `NonZeroUsize`.
///
/// # Errors
/// The words that clap shows after the option's name.
pub fn parse_positive<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| "expected a positive integer".to_owned())
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
    /// Adapter directory in PEFT's format, or the run directory or checkpoint that holds one, optionally with a name;
    /// `chat`, `eval`, `export` and `adapters merge` accept several
    #[arg(long, value_name = "[NAME=]DIR")]
    pub adapter: Vec<AdapterPath>,
    /// Directory or GGUF file to read the tokenizer from, instead of the model's own tokenizer
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
}

/// An adapter directory given on the command line as `[NAME=]DIR`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterPath {
    /// Name of the adapter on the model.
    pub name: String,
    /// Path of PEFT's adapter directory.
    pub directory: PathBuf,
}

impl From<PathBuf> for AdapterPath {
    /// Names the adapter after its directory, or after the parent directory if that is a run's `adapter`.
    fn from(directory: PathBuf) -> Self {
        let part = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
        let own = part(&directory).filter(|name| name != "adapter");
        let name = own.or_else(|| directory.parent().and_then(part)).unwrap_or_else(|| ADAPTER_NAME.to_owned());
        Self { name, directory }
    }
}

impl FromStr for AdapterPath {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text.split_once('=') {
            Some((name, directory)) if !name.is_empty() && !name.contains('/') && !Path::new(text).exists() => {
                Self { name: name.to_owned(), directory: directory.into() }
            }
            _ => PathBuf::from(text).into(),
        })
    }
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
