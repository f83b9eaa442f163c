//! Files that are there whole or not at all.

use anyhow::{Context, Result};
use std::path::Path;

/// Writes beside `path`, then renames.
pub fn whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".part");
    let beside = Path::new(&beside);
    std::fs::write(beside, bytes)
        .and_then(|()| std::fs::rename(beside, path))
        .inspect_err(|_| drop(std::fs::remove_file(beside)))
        .with_context(|| format!("{}: cannot be written", path.display()))
}
