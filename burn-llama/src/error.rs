//! Errors of input from outside: files, fields, tensors, templates.

use std::path::{Path, PathBuf};

/// An error of a checkpoint, a tokenizer, a configuration or a chat template.
///
/// The message names the file and the key, the expected and the found value, and what to do.
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
    /// The content of a file is malformed.
    #[error("{path}: {key}: expected {expected}, found {found}")]
    Format {
        /// The file.
        path: PathBuf,
        /// The key, field or place in the file.
        key: String,
        /// The expected content.
        expected: String,
        /// The content that was found.
        found: String,
    },
    /// A field of a model configuration has an impossible or unsupported value.
    #[error("config field `{field}`: expected {expected}, found {found}")]
    Config {
        /// The field's name as in `config.json`.
        field: String,
        /// The values that are accepted.
        expected: String,
        /// The value that was found.
        found: String,
    },
    /// The tensors of a checkpoint do not match those of the model.
    #[error("{path}: {mismatch}")]
    Tensors {
        /// The checkpoint.
        path: PathBuf,
        /// All differences at once.
        mismatch: TensorMismatch,
    },
    /// A tokenizer cannot be built or cannot encode.
    #[error("{path}: tokenizer: {message}")]
    Tokenizer {
        /// The file the tokenizer comes from.
        path: PathBuf,
        /// The problem and how to solve it.
        message: String,
    },
    /// A chat template is missing, does not parse, or refuses the messages.
    #[error("chat template: {message}")]
    Template {
        /// The message of the template engine, or a description of what is missing.
        message: String,
    },
    /// A result of the model is not finite.
    #[error("{result}: expected finite numbers, found NaN or infinity: {cause}")]
    NotFinite {
        /// The result, such as `loss`.
        result: &'static str,
        /// The tensor that holds values that are not finite, or that none does.
        cause: String,
    },
    /// A sequence is longer than the model supports.
    #[error("expected at most {limit} positions, the model's own context length, found {found}; shorten the text")]
    ContextLength {
        /// The number of positions that the model supports.
        limit: usize,
        /// The number of positions of the sequence, virtual tokens included.
        found: usize,
    },
    /// An adapter could not be read, attached or written.
    #[error(transparent)]
    Peft(#[from] burn_peft::Error),
}

impl Error {
    /// Wraps an I/O error with the file on which it happened.
    pub fn io(path: &Path, error: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), error }
    }

    /// Returns the error of a malformed file: its place in the file, the expected and the found content.
    pub fn format(path: &Path, key: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Format { path: path.to_owned(), key: key.into(), expected: expected.into(), found: found.into() }
    }

    /// Adds the file to the error of a configuration field or of a chat template.
    pub fn in_file(self, path: &Path) -> Self {
        match self {
            Self::Config { field, expected, found } => Self::format(path, field, expected, found),
            Self::Template { message } => Self::format(path, "chat_template", "a Jinja template that parses", message),
            other => other,
        }
    }

    /// Returns the error of a configuration field with a wrong or unsupported value.
    pub fn config(field: impl Into<String>, expected: impl Into<String>, found: impl ToString) -> Self {
        Self::Config { field: field.into(), expected: expected.into(), found: found.to_string() }
    }
}

/// The differences between the tensors of a checkpoint and those of a model.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct TensorMismatch {
    /// Tensors of the model that the checkpoint lacks.
    pub missing: Vec<String>,
    /// Tensors of the checkpoint that the model lacks.
    pub unexpected: Vec<String>,
    /// Tensors with another shape or type.
    pub mismatched: Vec<MismatchedTensor>,
}

/// A tensor whose shape or type is not that of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MismatchedTensor {
    /// The key of the tensor.
    pub name: String,
    /// The shape or type in the model.
    pub expected: String,
    /// The shape or type in the checkpoint.
    pub found: String,
}

impl TensorMismatch {
    /// Returns true if checkpoint and model agree.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.mismatched.is_empty()
    }
}

impl std::fmt::Display for TensorMismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the tensors are not those of the model that the configuration describes")?;
        if !self.missing.is_empty() {
            write!(f, "; missing: {}", examples(&self.missing))?;
        }
        if !self.unexpected.is_empty() {
            write!(f, "; not part of the model: {}", examples(&self.unexpected))?;
        }
        for MismatchedTensor { name, expected, found } in self.mismatched.iter().take(SHOWN) {
            write!(f, "; {name}: expected {expected}, found {found}")?;
        }
        match self.mismatched.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "; and {more} more of another shape"),
        }
    }
}

/// The number of tensors of one kind that an error names.
const SHOWN: usize = 3;

/// Returns the first names of a list and the number of the others.
fn examples(names: &[String]) -> String {
    let shown = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}
