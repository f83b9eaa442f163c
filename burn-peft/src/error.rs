//! What can go wrong with an adapter from outside.

use crate::packed::Codec;
use std::path::{Path, PathBuf};

/// Everything that an adapter's configuration or files can be wrong in.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// A file's content is not an adapter's.
    #[error("{path}: {key}: expected {expected}, found {found}")]
    Format {
        /// The file.
        path: PathBuf,
        /// The key or place in the file.
        key: String,
        /// What should stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A configuration value that no adapter can have.
    #[error("{message}")]
    Config {
        /// The field, the value found, and what would do.
        message: String,
    },
    /// No linear layer has a name that `target_modules` selects.
    #[error("target_modules {target} selects no linear layer; the model has {available}")]
    NoTarget {
        /// The selection.
        target: String,
        /// The last path segments of the model's linear layers.
        available: String,
    },
    /// The adapter's tensors are not those that its configuration asks for on this model.
    #[error("{path}: the adapter does not fit the model: {message}; was it trained on another base model?")]
    Mismatch {
        /// The adapter's directory.
        path: PathBuf,
        /// Missing, unexpected and misshapen tensors.
        message: String,
    },
    /// A weight would have to change, and cannot.
    #[error(
        "{operation} changes the weights, and these stay packed ({codec}): load the model with float weights for it"
    )]
    Packed {
        /// How they are packed.
        codec: Codec,
        /// What was asked for.
        operation: &'static str,
    },
    /// An adapter does not fit into the tensors of another.
    #[error(
        "{path}: the adapter does not fit into the tensors of `{name}`: {message}; a hot swap keeps layers and ranks: delete `{name}` and load this one instead"
    )]
    Swap {
        /// The new adapter's directory.
        path: PathBuf,
        /// The adapter on the model.
        name: String,
        /// Missing, unexpected and misshapen tensors.
        message: String,
    },
    /// No adapter of that name is on the model.
    #[error("adapter `{name}` is not on the model, which has {known}")]
    Unknown {
        /// The name.
        name: String,
        /// The names that there are.
        known: String,
    },
    /// A value of an adapter is no number.
    #[error("adapter `{name}`: expected finite numbers, found others in the adapter of {layer}; nothing was merged")]
    NotFinite {
        /// The adapter's name.
        name: String,
        /// The layer's path.
        layer: String,
    },
    /// An adapter of that name cannot be had, or not do this.
    #[error("adapter `{name}` {state}")]
    Name {
        /// The adapter's name.
        name: String,
        /// What is the matter with it.
        state: &'static str,
    },
}

impl Error {
    pub(crate) fn io(path: &Path, error: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), error }
    }

    pub(crate) fn format(path: &Path, key: &str, expected: impl Into<String>, found: impl ToString) -> Self {
        Self::Format { path: path.to_owned(), key: key.into(), expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn config(message: impl Into<String>) -> Self {
        Self::Config { message: message.into() }
    }
}
