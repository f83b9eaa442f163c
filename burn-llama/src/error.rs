//! What can go wrong with input from outside: files, fields, tensors, templates.

use std::path::{Path, PathBuf};

/// Everything that a checkpoint, a tokenizer or a configuration from outside can be wrong in.
///
/// A message says which file and which key, what was expected, what was found, and what to do.
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
    /// A file is not what its name or its header says.
    #[error("{path}: {key}: expected {expected}, found {found}")]
    Format {
        /// The file.
        path: PathBuf,
        /// The key, field or place in the file.
        key: String,
        /// What should stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A field of a model configuration has a value that the model cannot have or that is not supported.
    #[error("config field `{field}`: expected {expected}, found {found}")]
    Config {
        /// The field's name as in `config.json`.
        field: String,
        /// The values that would do.
        expected: String,
        /// The value found.
        found: String,
    },
    /// The tensors of a checkpoint are not those of the model.
    #[error("{path}: {mismatch}")]
    Tensors {
        /// The checkpoint.
        path: PathBuf,
        /// All differences at once.
        mismatch: Mismatch,
    },
    /// A tokenizer cannot be built or cannot encode.
    #[error("{path}: tokenizer: {message}")]
    Tokenizer {
        /// The file the tokenizer comes from.
        path: PathBuf,
        /// What is wrong and what would do.
        message: String,
    },
    /// A chat template is missing, does not parse, or refuses the messages.
    #[error("chat template: {message}")]
    Template {
        /// The template engine's words, or what is missing.
        message: String,
    },
    /// An adapter could not be read, attached or written.
    #[error(transparent)]
    Peft(#[from] burn_peft::Error),
}

impl Error {
    /// Wraps an input or output error with the file it happened on.
    pub fn io(path: &Path, error: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), error }
    }

    /// A malformed file: where, what was expected, what was found.
    pub fn format(path: &Path, key: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Format { path: path.to_owned(), key: key.into(), expected: expected.into(), found: found.into() }
    }

    /// Names the file in which a wrong configuration field or a template that does not parse stands.
    pub fn in_file(self, path: &Path) -> Self {
        match self {
            Self::Config { field, expected, found } => Self::format(path, field, expected, found),
            Self::Template { message } => Self::format(path, "chat_template", "a Jinja template that parses", message),
            other => other,
        }
    }

    /// A configuration field with a wrong or unsupported value.
    pub fn config(field: impl Into<String>, expected: impl Into<String>, found: impl ToString) -> Self {
        Self::Config { field: field.into(), expected: expected.into(), found: found.to_string() }
    }
}

/// The differences between the tensors of a checkpoint and those of a model.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// Tensors of the model that the checkpoint lacks.
    pub missing: Vec<String>,
    /// Tensors of the checkpoint that the model lacks.
    pub extra: Vec<String>,
    /// Tensors whose shape or type differs: name, expected, found.
    pub misshapen: Vec<(String, String, String)>,
}

impl Mismatch {
    /// Whether checkpoint and model agree.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.extra.is_empty() && self.misshapen.is_empty()
    }
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the tensors are not those of the model that the configuration describes")?;
        if !self.missing.is_empty() {
            write!(f, "; missing: {}", self.missing.join(", "))?;
        }
        if !self.extra.is_empty() {
            write!(f, "; not part of the model: {}", self.extra.join(", "))?;
        }
        for (name, expected, found) in &self.misshapen {
            write!(f, "; {name}: expected {expected}, found {found}")?;
        }
        Ok(())
    }
}
