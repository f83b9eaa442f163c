//! The chat template of a model: what replaces it, its arguments, and the token that ends an answer.

use crate::recipe::Recipe;
use anyhow::{Context, Result};
use burn_llama::{ChatTemplate, Tokenizer};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// The changes to a tokenizer's chat template.
#[derive(Debug, Clone, Default)]
pub struct TemplateOptions {
    /// A file with the template to use instead of the model's.
    pub file: Option<PathBuf>,
    /// Variables that the template sees, besides those of every template.
    pub arguments: Map<String, Value>,
    /// The token that ends an answer, instead of the one that the template writes.
    pub end_token: Option<String>,
}

impl From<&Recipe> for TemplateOptions {
    fn from(recipe: &Recipe) -> Self {
        Self {
            file: recipe.model.chat_template.as_deref().map(PathBuf::from),
            arguments: recipe.data.template_arguments.clone(),
            end_token: recipe.data.end_token.clone(),
        }
    }
}

impl TemplateOptions {
    /// Returns the tokenizer with the changes.
    ///
    /// # Errors
    /// If the file cannot be read, the template does not parse or is missing, or the vocabulary has no such end token.
    pub fn apply(&self, mut tokenizer: Tokenizer) -> Result<Tokenizer> {
        if let Some(path) = &self.file {
            tokenizer = with_template_file(tokenizer, path)?;
        }
        if !self.arguments.is_empty() {
            let template = chat_template(&tokenizer)?.clone();
            tokenizer = tokenizer.with_chat_template(template.with_arguments(&self.arguments)?);
        }
        Ok(match &self.end_token {
            Some(token) => tokenizer.with_end_of_turn(token)?,
            None => tokenizer,
        })
    }
}

/// Returns the model's chat template.
pub(crate) fn chat_template(tokenizer: &Tokenizer) -> Result<&ChatTemplate> {
    tokenizer
        .chat_template()
        .with_context(|| format!("{}: no chat template; use an instruction-tuned model", tokenizer.path().display()))
}

/// Replaces the chat template by the one in a file.
fn with_template_file(tokenizer: Tokenizer, path: &Path) -> Result<Tokenizer> {
    let at = || path.display().to_string();
    let source =
        std::fs::read_to_string(path).with_context(|| format!("{}: the chat template cannot be read", at()))?;
    let template = tokenizer.parse_chat_template(&source).with_context(at)?;
    Ok(tokenizer.with_chat_template(template))
}

/// Applies the chat template and the stop ids that a run has saved with its adapter, as `transformers` saves them with a
/// tokenizer. A folder without them changes nothing.
pub(crate) fn apply_saved(mut tokenizer: Tokenizer, directory: &Path) -> Result<Tokenizer> {
    let template = directory.join("chat_template.jinja");
    if template.is_file() {
        tokenizer = with_template_file(tokenizer, &template)?;
    }
    let path = directory.join("generation_config.json");
    if !path.is_file() {
        return Ok(tokenizer);
    }
    let at = || path.display().to_string();
    let text = std::fs::read(&path).with_context(at)?;
    let config: Value = serde_json::from_slice(&text).with_context(at)?;
    let ids = match &config["eos_token_id"] {
        Value::Array(ids) => ids.clone(),
        id => vec![id.clone()],
    };
    let ids = ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok());
    Ok(tokenizer.with_stop_ids(ids))
}
