//! Names the thing at a path, wherever something there cannot be opened: the error then says what was found and which
//! command comes next.

mod advice;
mod kind;

pub(crate) use advice::advice;
use anyhow::{Result, anyhow, bail};
use kind::PathKind;
use std::path::{Path, PathBuf};

/// The use that a path was given for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Model,
    Adapter,
    Tokenizer,
    Rows,
    Recipe,
    DeepSpeed,
    Accelerate,
}

/// Appends to an error what stands at the path, unless it is of the expected kind.
pub(crate) fn explain(error: anyhow::Error, path: &Path, purpose: Purpose) -> anyhow::Error {
    match advice(path, purpose) {
        Some(found) => anyhow!("{error:#}; {found}"),
        None => error,
    }
}

/// Returns the adapter directory that a path leads to: itself, or the one in a run directory or a checkpoint.
///
/// # Errors
/// If there is none; the error says what stands at the path.
pub(crate) fn adapter_directory(path: &Path) -> Result<PathBuf> {
    match PathKind::of(path) {
        PathKind::Adapter => return Ok(path.to_owned()),
        PathKind::Run | PathKind::RunCheckpoint if path.join("adapter/adapter_config.json").is_file() => {
            return Ok(path.join("adapter"));
        }
        _ => {}
    }
    let expected = "expected an adapter directory in PEFT's format, a run directory or a checkpoint";
    match advice(path, Purpose::Adapter) {
        Some(found) => bail!("{}: {expected}; {found}", path.display()),
        None => bail!(
            "{}: {expected}, found no such directory; an adapter of the hub is fetched by `hf download ID --local-dir DIR`",
            path.display()
        ),
    }
}

/// Returns the adapter directory that each path leads to, like [`adapter_directory`].
///
/// # Errors
/// One line that names every path that leads to none.
pub(crate) fn adapter_directories<'a>(paths: impl Iterator<Item = &'a Path>) -> Result<Vec<PathBuf>> {
    all(paths.map(adapter_directory))
}

/// Returns all values, or one error with the messages of all that failed.
pub(crate) fn all<T>(results: impl Iterator<Item = Result<T>>) -> Result<Vec<T>> {
    let (mut values, mut problems) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(value) => values.push(value),
            Err(problem) => problems.push(format!("{problem:#}")),
        }
    }
    if problems.is_empty() { Ok(values) } else { bail!("{}", problems.join("; and ")) }
}

/// Returns whether a path is a directory of no special kind, such as a model's.
pub(crate) fn is_plain_directory(path: &Path) -> bool {
    PathKind::of(path) == PathKind::Directory
}

/// Returns the model in the directory of a run that trained the whole model, or in a checkpoint of one.
pub(crate) fn trained_model(path: &Path) -> Option<PathBuf> {
    let model = path.join("model");
    let run = matches!(PathKind::of(path), PathKind::Run | PathKind::RunCheckpoint);
    (run && model.join("config.json").is_file()).then_some(model)
}
