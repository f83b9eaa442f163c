//! Files and folders that are there whole or not at all.

use anyhow::{Context, Result};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Writes beside `path`, then renames.
pub fn whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let beside = beside(path);
    fs::write(&beside, bytes)
        .and_then(|()| fs::rename(&beside, path))
        .inspect_err(|_| drop(fs::remove_file(&beside)))
        .with_context(|| format!("{}: cannot be written", path.display()))
}

/// Fills a folder beside `out`, then renames it; an empty folder at `out` is replaced.
pub fn whole_folder(out: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let out = std::path::absolute(out).with_context(|| out.display().to_string())?;
    parent(&out)?;
    let part = beside(&out);
    // What an earlier attempt that was cut short has left.
    remove(&part)?;
    let work = || -> Result<()> {
        fs::create_dir(&part).with_context(|| format!("{}: cannot be made", part.display()))?;
        fill(&part)?;
        if out.is_dir() {
            fs::remove_dir(&out).with_context(|| format!("{}: cannot be replaced", out.display()))?;
        }
        fs::rename(&part, &out).with_context(|| format!("{}: cannot be made", out.display()))
    };
    // The error that matters is the first one.
    work().inspect_err(|_| drop(remove(&part)))
}

/// Makes the folder that `path` lies in.
pub fn parent(path: &Path) -> Result<()> {
    let Some(parent) = path.parent() else { return Ok(()) };
    fs::create_dir_all(parent).with_context(|| format!("{}: cannot be made", parent.display()))
}

/// `path.part`.
fn beside(path: &Path) -> PathBuf {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".part");
    beside.into()
}

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{}: cannot be removed", directory.display()))
        }
        _ => Ok(()),
    }
}
