//! Cache directory of fetched models, and verification of its files by SHA-256.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, anyhow, bail};
use sha2::{Digest, Sha256};

/// Returns the cache directory: `$MEDQA_CACHE`, else `$XDG_CACHE_HOME/medqa`, else `~/.cache/medqa`. It is created if
/// it does not exist.
pub(super) fn cache_dir() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let path = set("MEDQA_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|base| base.join("medqa")))
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache").join("medqa")))
        .ok_or_else(|| anyhow!("no place for the model cache: set MEDQA_CACHE to a directory"))?;
    fs::create_dir_all(&path)
        .with_context(|| format!("{}: the model cache cannot be created here; set MEDQA_CACHE", path.display()))?;
    Ok(path)
}

/// Locks the cache, so that no other medqa process writes the same files; the lock is released when the returned file
/// is dropped or the process ends.
pub(super) fn lock(cache: &Path) -> Result<File> {
    let path = cache.join(".lock");
    let file = File::create(&path).with_context(|| format!("{}: cannot be written", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!("waiting for another medqa process that is fetching into {}", cache.display());
        file.lock().with_context(|| format!("{}: cannot be locked", path.display()))?;
    }
    Ok(file)
}

/// Returns whether `file` exists and has this SHA-256 (hexadecimal, lower case).
///
/// Hashing 100 MB at every start would take noticeable time, so a marker file next to it records the size and
/// modification time for which the hash was right. If the directory is not writable, the file is hashed each time.
pub(super) fn is_intact(file: &Path, sha256: &str) -> Result<bool> {
    if !file.is_file() {
        return Ok(false);
    }
    let stamp = marker_content(file, sha256)?;
    let marker = marker_path(file);
    if fs::read_to_string(&marker).is_ok_and(|known| known == stamp) {
        return Ok(true);
    }
    let intact = sha256_of(file)? == sha256;
    if intact {
        // If this fails, the file is merely hashed again at the next start.
        let _ = write_atomically_with(&marker, |out| out.write_all(stamp.as_bytes()));
    }
    Ok(intact)
}

fn marker_path(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_os_string();
    name.push(".verified");
    file.with_file_name(name)
}

fn marker_content(file: &Path, sha256: &str) -> Result<String> {
    let about = fs::metadata(file).with_context(|| format!("{}: cannot be read", file.display()))?;
    let modified = about.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(format!("{sha256} {} {}\n", about.len(), modified.as_nanos()))
}

/// Returns the SHA-256 of a whole file (hexadecimal, lower case).
pub(super) fn sha256_of(path: &Path) -> Result<String> {
    let unreadable = || format!("{}: cannot be read", path.display());
    let mut file = File::open(path).with_context(unreadable)?;
    let mut hashing = HashingWriter::new(io::sink());
    io::copy(&mut file, &mut hashing).with_context(unreadable)?;
    Ok(hashing.finish())
}

/// A writer that computes the SHA-256 of the bytes written through it.
pub(super) struct HashingWriter<W> {
    inner: W,
    hasher: Sha256,
}

impl<W: Write> HashingWriter<W> {
    /// Creates a writer that passes all bytes on to `inner`.
    pub(super) fn new(inner: W) -> Self {
        Self { inner, hasher: Sha256::new() }
    }

    /// Returns the SHA-256 (hexadecimal, lower case).
    pub(super) fn finish(self) -> String {
        self.hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Writes a file atomically: into a temporary file in the same directory, which is then renamed to `path`.
pub(super) fn write_atomically_with(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let unwritable = || format!("{}: cannot be written", path.display());
    let mut options = tempfile::Builder::new();
    options.prefix(".medqa-");
    // A temporary file is private by default; a model is as readable as the user's other files.
    #[cfg(unix)]
    options.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut beside = options.tempfile_in(folder).with_context(unwritable)?;
    write(beside.as_file_mut()).with_context(unwritable)?;
    beside.persist(path).map_err(|error| error.error).with_context(unwritable)?;
    Ok(())
}

/// Copies a model (a file or a directory of files) into the directory `dest` and returns the path of the copy.
pub(super) fn copy_into(model: &Path, dest: &Path) -> Result<PathBuf> {
    if dest.exists() && !dest.is_dir() {
        bail!("{}: expected a directory to put the model into, found a file", dest.display());
    }
    fs::create_dir_all(dest).with_context(|| format!("{}: cannot be made", dest.display()))?;
    if model.is_file() {
        return copy_file(model, dest);
    }
    for entry in fs::read_dir(model).with_context(|| format!("{}: cannot be read", model.display()))? {
        let path = entry?.path();
        // The hub's cache holds symbolic links to its blobs; `is_file` and the copy follow them.
        if path.is_file() {
            copy_file(&path, dest)?;
        }
    }
    Ok(dest.to_path_buf())
}

fn copy_file(file: &Path, dest: &Path) -> Result<PathBuf> {
    let name = file.file_name().ok_or_else(|| anyhow!("{}: not a file's path", file.display()))?;
    let copy = dest.join(name);
    if same_file(file, &copy) {
        return Ok(copy);
    }
    let mut source = File::open(file).with_context(|| format!("{}: cannot be read", file.display()))?;
    write_atomically_with(&copy, |out| io::copy(&mut source, out).map(drop))?;
    Ok(copy)
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn a_changed_file_is_noticed_through_its_marker() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("m.gguf");
        assert!(!is_intact(&file, ABC).unwrap());
        fs::write(&file, "abc").unwrap();
        assert!(is_intact(&file, ABC).unwrap());
        assert!(marker_path(&file).is_file());
        assert!(is_intact(&file, ABC).unwrap());
        fs::write(&file, "abd, longer").unwrap();
        assert!(!is_intact(&file, ABC).unwrap());
        // The marker of one hash says nothing about another.
        fs::write(&file, "abc").unwrap();
        assert!(is_intact(&file, ABC).unwrap());
        assert!(!is_intact(&file, "00").unwrap());
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let failed = write_atomically_with(&path, |out| {
            out.write_all(b"half")?;
            Err(io::Error::other("cut"))
        });
        assert!(format!("{:#}", failed.unwrap_err()).contains("cut"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn models_are_copied_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (model, dest) = (folder.path().join("model"), folder.path().join("deep/dest"));
        fs::create_dir(&model).unwrap();
        fs::write(model.join("config.json"), "{}").unwrap();
        assert_eq!(copy_into(&model, &dest).unwrap(), dest);
        assert_eq!(fs::read_to_string(dest.join("config.json")).unwrap(), "{}");
        // A model that is in the directory already is left as it is.
        assert_eq!(copy_into(&dest.join("config.json"), &dest).unwrap(), dest.join("config.json"));
        assert!(copy_into(&model, &dest.join("config.json")).is_err());
    }
}
