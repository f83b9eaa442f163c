//! Models on the Hugging Face Hub, by way of `hf-hub` and its cache.
//!
//! `HF_HOME` and `HF_ENDPOINT` are read by `hf-hub`; `HF_TOKEN`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE` by us, since it
//! knows none of them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo};

use super::http;
use super::pip_config::{is_true, variable_value};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Files that a model may have beside its configuration and weights.
const OPTIONAL: [&str; 6] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];
/// How long an unreachable hub may hold up the way to the next source.
const CONNECT: Duration = Duration::from_secs(5);

/// The model's directory in the hub's cache; what is missing is downloaded, the weights last.
pub fn fetch(id: &str) -> Result<PathBuf> {
    if let Some(snapshot) = cached(id) {
        return Ok(snapshot);
    }
    if variable_value("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value)) {
        bail!("{id}: not complete in {} and HF_HUB_OFFLINE is set", cache().path().display());
    }
    check_reachable(id)?;
    let mut builder = ApiBuilder::from_env().with_cache_dir(cache().path().clone()).with_retries(3);
    if let Some(token) = token() {
        builder = builder.with_token(Some(token));
    }
    download(id, &builder.build().context("the hub's client cannot be made")?.model(id.to_string()))
}

/// The model's directory in the hub's cache, if nothing is missing there.
///
/// Weights come last when we download, so complete weights say that every other file was asked for.
pub fn cached(id: &str) -> Option<PathBuf> {
    let repo = cache().model(id.to_string());
    let config = repo.get("config.json")?;
    // Another program may have taken the weights alone.
    repo.get("tokenizer.json")?;
    has_weights(&repo).then(|| config.parent().map(Path::to_path_buf)).flatten()
}

fn has_weights(repo: &CacheRepo) -> bool {
    match repo.get(INDEX) {
        Some(index) => shards(&index).is_ok_and(|shards| shards.iter().all(|shard| repo.get(shard).is_some())),
        None => repo.get(WEIGHTS).is_some(),
    }
}

fn cache() -> Cache {
    variable_value("HF_HUB_CACHE").map_or_else(Cache::from_env, |path| Cache::new(PathBuf::from(path)))
}

/// `HF_TOKEN`, else what a login has left in the hub's home, which `HF_HUB_CACHE` does not move.
fn token() -> Option<String> {
    variable_value("HF_TOKEN").or_else(|| Cache::from_env().token())
}

/// One small request with a deadline: `hf-hub` itself would wait for as long as the system lets it.
fn check_reachable(id: &str) -> Result<()> {
    let endpoint = variable_value("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
    let url = format!("{}/{id}/resolve/main/config.json", endpoint.trim_end_matches('/'));
    let agent = http::agent(CONNECT)?;
    let mut request = agent.head(&url).config().timeout_global(Some(2 * CONNECT)).build();
    if let Some(token) = token() {
        request = request.header("Authorization", format!("Bearer {token}"));
    }
    match request.call() {
        Ok(_) => Ok(()),
        Err(error) => bail!(explained(id, &http::reason(&url, &error), status(&error))),
    }
}

fn status(error: &ureq::Error) -> Option<u16> {
    match error {
        ureq::Error::StatusCode(code) => Some(*code),
        _ => None,
    }
}

/// The hub's answers that a person can do something about.
fn explained(id: &str, reason: &str, status: Option<u16>) -> String {
    match status {
        Some(401 | 403) => format!("{reason}: {id} does not exist, or asks for a login: set HF_TOKEN"),
        Some(404) => format!("{reason}: {id} has no such file, or does not exist"),
        _ => reason.to_string(),
    }
}

fn download(id: &str, repo: &ApiRepo) -> Result<PathBuf> {
    let config = required(id, repo, "config.json")?;
    for name in OPTIONAL {
        optional(id, repo, name)?;
    }
    match optional(id, repo, INDEX)? {
        Some(index) => {
            for shard in shards(&index)? {
                required(id, repo, &shard)?;
            }
        }
        None => drop(required(id, repo, WEIGHTS)?),
    }
    let folder = config.parent().ok_or_else(|| anyhow!("{}: not in a directory", config.display()))?;
    Ok(folder.to_path_buf())
}

fn required(id: &str, repo: &ApiRepo, name: &str) -> Result<PathBuf> {
    optional(id, repo, name)?.ok_or_else(|| anyhow!("{id}: the hub has no `{name}` for it"))
}

/// `None` where the hub has no such file.
fn optional(id: &str, repo: &ApiRepo, name: &str) -> Result<Option<PathBuf>> {
    match repo.get(name) {
        Ok(path) => Ok(Some(path)),
        Err(ApiError::RequestError(error)) => match status(&error) {
            Some(404) => Ok(None),
            status => bail!(explained(id, &http::reason(&repo.url(name), &error), status)),
        },
        Err(error) => Err(error).with_context(|| format!("{id}: `{name}` could not be downloaded")),
    }
}

/// The files that an index of weights names.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let malformed = || format!("{}: expected an object `weight_map` of file names", index.display());
    let text = std::fs::read_to_string(index).with_context(malformed)?;
    let value: serde_json::Value = serde_json::from_str(&text).with_context(malformed)?;
    let map = value.get("weight_map").and_then(|map| map.as_object()).with_context(malformed)?;
    let name = |value: &serde_json::Value| {
        // The name becomes a path in the cache.
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
        assert_eq!(Vec::from_iter(shards(&index).unwrap()), ["m-1.safetensors", "m-2.safetensors"]);
        for bad in ["", "{}", r#"{"weight_map": {"a": 1}}"#, r#"{"weight_map": {"a": "../x"}}"#] {
            std::fs::write(&index, bad).unwrap();
            assert!(shards(&index).is_err(), "{bad}");
        }
    }
}
