//! Files that appear under their name when they are whole, and not before.

use crate::Error;
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

/// Lets `write` fill a file beside `path` (its name with `.part`), then renames it; on an error the half-written file is
/// removed and what stood at `path` stays.
///
/// # Errors
/// Those of `write`, or if the file cannot be made, written or renamed.
pub(crate) fn beside(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<(), Error>) -> Result<(), Error> {
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
        // The error that matters is the first one.
        let _ = fs::remove_file(part);
    }
    result
}

/// Writes a whole file as [`beside`] does.
///
/// # Errors
/// If the file cannot be made, written or renamed.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    beside(path, |out| out.write_all(bytes).map_err(|e| Error::io(path, e)))
}
