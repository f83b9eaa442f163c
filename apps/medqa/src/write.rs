//! Atomic writes: a file or folder appears complete or not at all.

use anyhow::{Context, Result};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Writes `bytes` to a temporary file next to `path`, then renames it to `path`.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = partial_path(path);
    fs::write(&partial, bytes)
        .and_then(|()| fs::rename(&partial, path))
        .inspect_err(|_| drop(fs::remove_file(&partial)))
        .with_context(|| format!("{}: cannot be written", path.display()))
}

/// Lets `fill` write into a temporary folder next to `out`, then renames it to `out`; an empty folder at `out` is
/// replaced.
pub(crate) fn write_dir_atomically(out: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let out = std::path::absolute(out).with_context(|| out.display().to_string())?;
    create_parent_dir(&out)?;
    let partial = partial_path(&out);
    // Removes what an interrupted earlier attempt left.
    remove_dir_if_exists(&partial)?;
    let work = || -> Result<()> {
        fs::create_dir(&partial).with_context(|| format!("{}: cannot be made", partial.display()))?;
        fill(&partial)?;
        if out.is_dir() {
            fs::remove_dir(&out).with_context(|| format!("{}: cannot be replaced", out.display()))?;
        }
        fs::rename(&partial, &out).with_context(|| format!("{}: cannot be made", out.display()))
    };
    // If the cleanup fails too, the first error is the one to report.
    work().inspect_err(|_| drop(remove_dir_if_exists(&partial)))
}

/// Creates the parent folder of `path`.
pub(crate) fn create_parent_dir(path: &Path) -> Result<()> {
    let Some(parent) = path.parent() else { return Ok(()) };
    fs::create_dir_all(parent).with_context(|| format!("{}: cannot be made", parent.display()))
}

/// Returns the temporary path, `path.part`.
pub(crate) fn partial_path(path: &Path) -> PathBuf {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".part");
    partial.into()
}

fn remove_dir_if_exists(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{}: cannot be removed", directory.display()))
        }
        _ => Ok(()),
    }
}
