//! The result of a run: an adapter or a model.

use crate::method_adapter::AttachedAdapter;
use anyhow::Result;
use burn::backend::Autodiff;
use burn_llama::{Llama, Tokenizer, checkpoint, kernel::Kernels, tokenizer::ChatFiles};
use std::path::Path;

/// The form of the result.
pub(super) enum RunOutput {
    /// An adapter in PEFT's format, with what it needs of the tokenizer.
    Adapter(AttachedAdapter, TokenizerFiles),
    /// A Hugging Face model, with the tokenizer.
    Model(Box<Tokenizer>),
}

/// The tokenizer's files that are saved with an adapter.
pub(super) enum TokenizerFiles {
    /// The chat template and the stop ids that it was trained with. The tokenizer itself is the model's, and is dropped
    /// once the rows are tokens.
    Chat(ChatFiles),
    /// The whole tokenizer, for an adapter that has rows for single tokens.
    Whole(Box<Tokenizer>),
}

impl TokenizerFiles {
    fn of(adapter: &AttachedAdapter, tokenizer: Tokenizer) -> Self {
        if adapter.has_tokens() { Self::Whole(Box::new(tokenizer)) } else { Self::Chat(tokenizer.chat_files()) }
    }

    fn save(&self, folder: &Path) -> Result<()> {
        match self {
            Self::Chat(files) => Ok(files.save(folder)?),
            Self::Whole(tokenizer) => Ok(tokenizer.save(folder)?),
        }
    }
}

impl RunOutput {
    /// Returns the form of the result of training `adapter`, or the model itself if there is none.
    pub(super) fn new(adapter: Option<AttachedAdapter>, tokenizer: Tokenizer) -> Self {
        match adapter {
            Some(adapter) => {
                let tokenizer = TokenizerFiles::of(&adapter, tokenizer);
                Self::Adapter(adapter, tokenizer)
            }
            None => Self::Model(Box::new(tokenizer)),
        }
    }

    /// Returns the name of the result's folder in a run directory.
    pub(super) fn folder_name(&self) -> &'static str {
        match self {
            Self::Adapter(..) => "adapter",
            Self::Model(_) => "model",
        }
    }

    /// Writes the result into `folder`.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub(super) fn save<B: Kernels>(&self, model: &Llama<Autodiff<B>>, folder: &Path) -> Result<()> {
        match self {
            Self::Adapter(adapter, tokenizer) => {
                adapter.save(model, folder)?;
                tokenizer.save(folder)
            }
            Self::Model(tokenizer) => {
                checkpoint::save(model, folder)?;
                Ok(tokenizer.save(folder)?)
            }
        }
    }
}
