//! CMeKG, the Chinese medical knowledge graph, from the Python package `PyCMeKG`. It is fetched when it is asked for and
//! is no part of this program.

use super::{cache, download, index};
use anyhow::{Context, Result, bail};
use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

const PROJECT: &str = "pycmekg";
const ARCHIVE: &str = "PyCMeKG-0.2.5.tar.gz";
/// Path of the graph inside the archive.
const MEMBER: &str = "PyCMeKG-0.2.5/pyCMeKG/model/cmekg.pkl";
const SHA256: &str = "eb0ab98b384b4272feead720bbb5f262715973589004d8a5093c5020d954c4b5";

/// Returns the path of the graph in the cache, after fetching it from the package index if needed.
///
/// # Errors
/// If the index cannot be reached, or the file is another one than it was.
pub(crate) fn fetch() -> Result<PathBuf> {
    let cache = cache::cache_dir()?;
    let file = cache.join("cmekg-0.2.5.pkl");
    if cache::is_intact(&file, SHA256)? {
        return Ok(file);
    }
    let _lock = cache::lock(&cache)?;
    if cache::is_intact(&file, SHA256)? {
        return Ok(file);
    }
    eprintln!(
        "CMeKG: fetching {ARCHIVE} (12 MB). Its package says MIT; the terms of the data behind it are not clear, and it was \
         extracted by machine and is partly wrong. Use it for research only."
    );
    let (agent, index_file) = index::find_file(PROJECT, ARCHIVE, "").context("CMeKG cannot be fetched")?;
    let part = cache.join(format!("{ARCHIVE}.part"));
    download::download(&agent, &index_file, &part)?;
    let unpacked = unpack(&part, &file);
    let _ = fs::remove_file(&part);
    unpacked?;
    if !cache::is_intact(&file, SHA256)? {
        let _ = fs::remove_file(&file);
        bail!("{ARCHIVE}: `{MEMBER}` has another SHA-256 than expected ({SHA256})");
    }
    Ok(file)
}

fn unpack(archive: &Path, file: &Path) -> Result<()> {
    let damaged = || format!("{}: expected a tar archive compressed by gzip", archive.display());
    let reader = flate2::read::GzDecoder::new(File::open(archive).with_context(damaged)?);
    let mut tar = tar::Archive::new(reader);
    for entry in tar.entries().with_context(damaged)? {
        let mut entry = entry.with_context(damaged)?;
        if entry.path().is_ok_and(|path| path == Path::new(MEMBER)) {
            return cache::write_atomically_with(file, |out: &mut File| {
                io::copy(&mut entry, out)?;
                out.flush()
            });
        }
    }
    bail!("{}: no `{MEMBER}` in it", archive.display())
}
