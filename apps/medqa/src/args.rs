//! Arguments that several verbs share.

use crate::{
    backend::Device,
    fetch,
    method_adapter::ADAPTER_NAME,
    recipe::{ComputeDtype, Learn, WeightDtype},
    schema::{Columns, Format, SchemaRequest},
    template::TemplateOptions,
};
use anyhow::{Result, anyhow};
use clap::Args;
use serde_json::Value;
use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    str::FromStr,
};

/// Parses a number of a type without zero, such as `NonZeroUsize`.
///
/// # Errors
/// The words that clap shows after the option's name.
pub(crate) fn parse_positive<T: FromStr>(text: &str) -> Result<T, String> {
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

/// The chat template, instead of the one that the model or the adapter comes with.
#[derive(Args, Clone, Default)]
pub struct TemplateArgs {
    /// File with a chat template (Jinja), instead of the model's or the adapter's own
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// Variable of the chat template, for example enable_thinking=false; the value is JSON, or else a string; may be
    /// given several times
    #[arg(long = "template-arg", value_name = "NAME=VALUE")]
    pub template_arguments: Vec<TemplateArgument>,
    /// Token that ends an answer, instead of the one that the chat template writes
    #[arg(long, value_name = "TOKEN")]
    pub end_token: Option<String>,
}

impl TemplateArgs {
    /// Returns the changes to a tokenizer's chat template.
    pub fn options(&self) -> TemplateOptions {
        let arguments = self.template_arguments.iter().map(|argument| (argument.name.clone(), argument.value.clone()));
        TemplateOptions {
            file: self.chat_template.clone(),
            arguments: arguments.collect(),
            end_token: self.end_token.clone(),
        }
    }
}

/// A variable of the chat template, given as `NAME=VALUE`.
#[derive(Debug, Clone, PartialEq)]
pub struct TemplateArgument {
    /// Name of the variable.
    pub name: String,
    /// Its value.
    pub value: Value,
}

impl FromStr for TemplateArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text
            .split_once('=')
            .filter(|(name, _)| !name.trim().is_empty())
            .ok_or_else(|| format!("expected NAME=VALUE, such as enable_thinking=false, found {text:?}"))?;
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
        Ok(Self { name: name.trim().to_owned(), value })
    }
}

/// Numeric formats of the model's weights and of the products with them.
#[derive(Args, Clone, Copy)]
pub(crate) struct WeightsArgs {
    /// Numeric format of the weights in memory; packed needs a GGUF file
    #[arg(long, default_value = "f32")]
    pub weights: WeightDtype,
    /// Numeric format of the matrix products with the weights
    #[arg(long, default_value = "f32")]
    pub compute: ComputeDtype,
}

/// Format and column names of a data file, and how its conversations are learned.
#[derive(Args, Clone)]
pub struct RowsArgs {
    /// Format of the rows in the data file; by default it is recognized by the keys of the rows
    #[arg(long)]
    pub format: Option<Format>,
    /// Columns that have other names in the file than in the format, for example question=prompt,answer=response
    #[arg(long, value_name = "COLUMN=NAME,...")]
    pub columns: Option<Columns>,
    /// Answers of a conversation that are learned
    #[arg(long, default_value = "all")]
    pub learn: Learn,
    #[command(flatten)]
    pub template: TemplateArgs,
}

impl RowsArgs {
    /// Returns the format and the column names that are asked for, after checking that they fit together.
    pub fn schema(&self) -> Result<SchemaRequest> {
        let request = SchemaRequest { format: self.format, columns: self.columns.clone().unwrap_or_default() };
        request.check().map_err(|problem| anyhow!("--columns: {problem}"))?;
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_argument_is_json_or_a_string() {
        for (text, name, value) in [
            ("enable_thinking=false", "enable_thinking", serde_json::json!(false)),
            ("date=26 Jul 2024", "date", serde_json::json!("26 Jul 2024")),
            ("a=b=c", "a", serde_json::json!("b=c")),
            ("list=[1, \"x\"]", "list", serde_json::json!([1, "x"])),
            ("empty=", "empty", serde_json::json!("")),
        ] {
            assert_eq!(text.parse(), Ok(TemplateArgument { name: name.to_owned(), value }), "{text}");
        }
        for wrong in ["", "=1", "enable_thinking"] {
            assert!(wrong.parse::<TemplateArgument>().unwrap_err().contains("NAME=VALUE"), "{wrong}");
        }
    }
}
