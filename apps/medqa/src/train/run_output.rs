//! The result of a run: an adapter or a model.

use crate::method_adapter::AttachedAdapter;
use anyhow::Result;
use burn::backend::Autodiff;
use burn_llama::{Llama, Tokenizer, checkpoint, kernel::Kernels};
use std::path::Path;

/// The form of the result.
pub enum RunOutput {
    /// An adapter in PEFT's format, with the tokenizer if it has rows for single tokens. Another adapter needs none, so
    /// the tokenizer is dropped once the rows are tokens.
    Adapter(AttachedAdapter, Option<Box<Tokenizer>>),
    /// A Hugging Face model, with the tokenizer.
    Model(Box<Tokenizer>),
}

impl RunOutput {
    /// Returns the form of the result of training `adapter`, or the model itself if there is none.
    pub fn new(adapter: Option<AttachedAdapter>, tokenizer: Tokenizer) -> Self {
        match adapter {
            None => Self::Model(Box::new(tokenizer)),
            Some(adapter) => {
                let tokenizer = adapter.has_tokens().then(|| Box::new(tokenizer));
                Self::Adapter(adapter, tokenizer)
            }
        }
    }

    /// Returns the name of the result's folder in a run directory.
    pub fn folder_name(&self) -> &'static str {
        match self {
            Self::Adapter(..) => "adapter",
            Self::Model(_) => "model",
        }
    }

    /// Writes the result into `folder`.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save<B: Kernels>(&self, model: &Llama<Autodiff<B>>, folder: &Path) -> Result<()> {
        match self {
            Self::Adapter(adapter, tokenizer) => {
                adapter.save(model, folder)?;
                tokenizer.iter().try_for_each(|tokenizer| Ok(tokenizer.save(folder)?))
            }
            Self::Model(tokenizer) => {
                checkpoint::save(model, folder)?;
                Ok(tokenizer.save(folder)?)
            }
        }
    }
}
