//! Fetching models from the Hugging Face Hub with `hf-hub` and its cache.
//!
//! `hf-hub` reads `HF_HOME` and `HF_ENDPOINT`; this module reads `HF_TOKEN`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE`, which
//! `hf-hub` does not support.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo};

use super::http;
use super::pip_config::{env_var, is_true};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Files that a model may have besides its configuration and weights.
const OPTIONAL_FILES: [&str; 6] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];
/// Connection timeout: an unreachable hub delays the next source by no more than this.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Downloads the missing files of a model, the weights last, and returns its directory in the hub's cache.
pub(super) fn fetch(id: &str) -> Result<PathBuf> {
    if let Some(snapshot) = cached(id) {
        return Ok(snapshot);
    }
    if env_var("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value)) {
        bail!("{id}: not complete in {} and HF_HUB_OFFLINE is set", cache().path().display());
    }
    check_reachable(id)?;
    let mut builder = ApiBuilder::from_env().with_cache_dir(cache().path().clone()).with_retries(3);
    if let Some(token) = token() {
        builder = builder.with_token(Some(token));
    }
    download(id, &builder.build().context("the hub's client cannot be created")?.model(id.to_string()))
}

/// Returns the model's directory in the hub's cache if it is complete.
///
/// This module downloads the weights last, so complete weights mean that every other file has been requested.
pub(super) fn cached(id: &str) -> Option<PathBuf> {
    let repo = cache().model(id.to_string());
    let config = repo.get("config.json")?;
    // Another program may have downloaded the weights alone.
    repo.get("tokenizer.json")?;
    has_weights(&repo).then(|| config.parent().map(Path::to_path_buf)).flatten()
}

fn has_weights(repo: &CacheRepo) -> bool {
    match repo.get(INDEX) {
        Some(index) => shard_files(&index).is_ok_and(|shards| shards.iter().all(|shard| repo.get(shard).is_some())),
        None => repo.get(WEIGHTS).is_some(),
    }
}

fn cache() -> Cache {
    env_var("HF_HUB_CACHE").map_or_else(Cache::from_env, |path| Cache::new(PathBuf::from(path)))
}

/// Returns `HF_TOKEN`, else the token that a login has stored in the hub's home directory, which `HF_HUB_CACHE` does
/// not move.
fn token() -> Option<String> {
    env_var("HF_TOKEN").or_else(|| Cache::from_env().token())
}

/// Sends one small request with a deadline, since `hf-hub` itself would wait for as long as the operating system
/// allows.
fn check_reachable(id: &str) -> Result<()> {
    let endpoint = env_var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
    let url = format!("{}/{id}/resolve/main/config.json", endpoint.trim_end_matches('/'));
    let agent = http::agent(CONNECT_TIMEOUT)?;
    let mut request = agent.head(&url).config().timeout_global(Some(2 * CONNECT_TIMEOUT)).build();
    if let Some(token) = token() {
        request = request.header("Authorization", format!("Bearer {token}"));
    }
    match request.call() {
        Ok(_) => Ok(()),
        Err(error) => bail!(with_advice(id, &http::describe_error(&url, &error), status(&error))),
    }
}

fn status(error: &ureq::Error) -> Option<u16> {
    match error {
        ureq::Error::StatusCode(code) => Some(*code),
        _ => None,
    }
}

/// Adds advice to an error if the hub's answer is one that the user can do something about.
fn with_advice(id: &str, reason: &str, status: Option<u16>) -> String {
    match status {
        Some(401 | 403) => format!("{reason}: {id} does not exist, or asks for a login: set HF_TOKEN"),
        Some(404) => format!("{reason}: {id} has no such file, or does not exist"),
        _ => reason.to_string(),
    }
}

fn download(id: &str, repo: &ApiRepo) -> Result<PathBuf> {
    let config = get_required(id, repo, "config.json")?;
    for name in OPTIONAL_FILES {
        get_optional(id, repo, name)?;
    }
    match get_optional(id, repo, INDEX)? {
        Some(index) => {
            for shard in shard_files(&index)? {
                get_required(id, repo, &shard)?;
            }
        }
        None => drop(get_required(id, repo, WEIGHTS)?),
    }
    let folder = config.parent().ok_or_else(|| anyhow!("{}: not in a directory", config.display()))?;
    Ok(folder.to_path_buf())
}

fn get_required(id: &str, repo: &ApiRepo, name: &str) -> Result<PathBuf> {
    get_optional(id, repo, name)?.ok_or_else(|| anyhow!("{id}: the hub has no `{name}` for it"))
}

/// Returns the path of a downloaded file, or `None` if the hub has no such file.
fn get_optional(id: &str, repo: &ApiRepo, name: &str) -> Result<Option<PathBuf>> {
    match repo.get(name) {
        Ok(path) => Ok(Some(path)),
        Err(ApiError::RequestError(error)) => match status(&error) {
            Some(404) => Ok(None),
            status => bail!(with_advice(id, &http::describe_error(&repo.url(name), &error), status)),
        },
        Err(error) => Err(error).with_context(|| format!("{id}: `{name}` could not be downloaded")),
    }
}

/// Returns the files that the index of sharded weights names.
fn shard_files(index: &Path) -> Result<BTreeSet<String>> {
    let malformed = || format!("{}: expected an object `weight_map` of file names", index.display());
    let text = std::fs::read_to_string(index).with_context(malformed)?;
    let value: serde_json::Value = serde_json::from_str(&text).with_context(malformed)?;
    let map = value.get("weight_map").and_then(|map| map.as_object()).with_context(malformed)?;
    let name = |value: &serde_json::Value| {
        // The name becomes a path in the cache, so it must not lead out of the directory.
        let name = value.as_str().filter(|name| !name.is_empty() && !name.contains(['/', '\\']));
        name.map(str::to_string).with_context(malformed)
    };
    map.values().map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_names_each_shard_once() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join(INDEX);
        std::fs::write(
            &index,
            r#"{"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}"#,
        )
        .unwrap();
        assert_eq!(Vec::from_iter(shard_files(&index).unwrap()), ["m-1.safetensors", "m-2.safetensors"]);
        for bad in ["", "{}", r#"{"weight_map": {"a": 1}}"#, r#"{"weight_map": {"a": "../x"}}"#] {
            std::fs::write(&index, bad).unwrap();
            assert!(shard_files(&index).is_err(), "{bad}");
        }
    }
}
