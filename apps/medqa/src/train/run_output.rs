//! The result of a run: an adapter or a model.

use crate::method_adapter::AttachedAdapter;
use anyhow::Result;
use burn::backend::Autodiff;
use burn_llama::{Llama, Tokenizer, checkpoint, kernel::Kernels, tokenizer::ChatFiles};
use std::path::Path;

/// The form of the result.
pub enum RunOutput {
    /// An adapter in PEFT's format, with the chat template and the stop ids that it was trained with. It needs no more of
    /// the tokenizer, which is dropped once the rows are tokens.
    Adapter(AttachedAdapter, ChatFiles),
    /// A Hugging Face model, with the tokenizer.
    Model(Box<Tokenizer>),
}

impl RunOutput {
    /// Returns the form of the result of training `adapter`, or the model itself if there is none.
    pub fn new(adapter: Option<AttachedAdapter>, tokenizer: Tokenizer) -> Self {
        match adapter {
            Some(adapter) => Self::Adapter(adapter, tokenizer.chat_files()),
            None => Self::Model(Box::new(tokenizer)),
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
            Self::Adapter(adapter, chat) => {
                adapter.save(model, folder)?;
                Ok(chat.save(folder)?)
            }
            Self::Model(tokenizer) => {
                checkpoint::save(model, folder)?;
                Ok(tokenizer.save(folder)?)
            }
        }
    }
}
