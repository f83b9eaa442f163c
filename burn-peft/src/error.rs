//! Errors of adapters' configurations, files and names.

use burn_peft_kernels::Codec;
use std::path::{Path, PathBuf};

/// An error of an adapter's configuration or files, or of an operation on the adapters of a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        error: std::io::Error,
    },
    /// A file's content is not that of a supported adapter.
    #[error("{path}: {key}: expected {expected}, found {found}")]
    Format {
        /// The file.
        path: PathBuf,
        /// The key or position in the file.
        key: String,
        /// The expected content.
        expected: String,
        /// The content found.
        found: String,
    },
    /// An invalid configuration value.
    #[error("{message}")]
    Config {
        /// The field, the value found and the valid values.
        message: String,
    },
    /// No linear layer has a name that `target_modules` selects.
    #[error("target_modules {target} selects no linear layer; the model has {available}")]
    NoTarget {
        /// The value of `target_modules`.
        target: String,
        /// The last path segments of the model's linear layers.
        available: String,
    },
    /// The adapter's tensors are not those that its configuration requires on this model.
    #[error("{path}: the adapter does not fit the model: {message}; was it trained on another base model?")]
    Mismatch {
        /// The adapter's directory.
        path: PathBuf,
        /// The missing and unexpected tensors and those of a wrong shape.
        message: String,
    },
    /// An operation would change a weight that is packed.
    #[error(
        "{operation} changes the weights, but these are packed ({codec}): load the model with float weights instead"
    )]
    Packed {
        /// The format in which the weight is packed.
        codec: Codec,
        /// The operation that was requested.
        operation: &'static str,
    },
    /// The new adapter of a hot swap does not fit into the tensors of the old one.
    #[error(
        "{path}: the adapter does not fit into the tensors of `{name}`: {message}; a hot swap keeps layers \
         and ranks: delete `{name}` and load this one instead"
    )]
    Hotswap {
        /// The new adapter's directory.
        path: PathBuf,
        /// The adapter on the model.
        name: String,
        /// The missing and unexpected tensors and those of a wrong shape.
        message: String,
    },
    /// The model has no adapter of that name.
    #[error("adapter `{name}` is not on the model, which has {known}")]
    UnknownAdapter {
        /// The name.
        name: String,
        /// The names of the model's adapters.
        known: String,
    },
    /// An adapter contains a value that is not finite.
    #[error(
        "adapter `{name}`: expected finite numbers, found NaN or infinity in the adapter of {layer}; nothing was merged"
    )]
    NotFinite {
        /// The adapter's name.
        name: String,
        /// The layer's path.
        layer: String,
    },
    /// The adapter of that name cannot be added, or does not allow the operation.
    #[error("adapter `{name}` {state}")]
    InvalidAdapter {
        /// The adapter's name.
        name: String,
        /// The reason, as a predicate such as "is merged into the weights".
        state: &'static str,
    },
}

/// The state of an adapter that has to be unmerged first.
pub(crate) const MERGED: &str = "is merged into the weights; unmerge it first";
/// The state of an adapter that cannot be taken off the model.
pub(crate) const CHANGED_BASE: &str =
    "changed the base model, whose original values are not kept: load the model again without it";

impl Error {
    pub(crate) fn io(path: &Path, error: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), error }
    }

    pub(crate) fn format(path: &Path, key: &str, expected: impl Into<String>, found: impl ToString) -> Self {
        Self::Format { path: path.to_owned(), key: key.into(), expected: expected.into(), found: found.to_string() }
    }

    /// Returns the error of the adapter `name`; `state` is the reason as a predicate.
    pub(crate) fn adapter(name: &str, state: &'static str) -> Self {
        Self::InvalidAdapter { name: name.to_owned(), state }
    }

    /// Returns the error of a start of an adapter that reads the whole model, on a rank that holds a part of it.
    pub fn needs_whole_model(start: &str) -> Self {
        Self::config(format!(
            "{start}: expected a process that holds the whole model, found a rank that holds a part of it: make the adapter \
             with one process and give it as `method.init`"
        ))
    }

    pub(crate) fn config(message: impl Into<String>) -> Self {
        Self::Config { message: message.into() }
    }
}
