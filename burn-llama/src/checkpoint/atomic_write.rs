//! Atomic file writes: a file appears under its name only when it is complete.

use crate::Error;
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

/// Creates a temporary file next to `path` (with `.part` appended to its name), lets `write` fill it, then renames it
/// to `path`. On an error the temporary file is removed and any existing file at `path` is left unchanged.
///
/// # Errors
/// If `write` fails, or the file cannot be created, written or renamed.
pub(crate) fn atomic_write_with(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = Path::new(&part);
    let fail = |error| Error::io(path, error);
    let result = File::create(part).map_err(fail).and_then(|file| {
        let mut out = BufWriter::with_capacity(1 << 20, file);
        write(&mut out)?;
        out.flush().and_then(|()| fs::rename(part, path)).map_err(fail)
    });
    if result.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(part);
    }
    result
}

/// Writes `bytes` to `path` with [`atomic_write_with`].
///
/// # Errors
/// If the file cannot be created, written or renamed.
pub(crate) fn atomic_write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    atomic_write_with(path, |out| out.write_all(bytes).map_err(|e| Error::io(path, e)))
}
