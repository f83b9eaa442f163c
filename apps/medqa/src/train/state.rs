//! What a run has behind it, and where it can go on from.

use crate::{
    recipe::{Packing, Recipe},
    write,
};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Keys that a resumed run may change: they say when it ends, what it writes and who computes, not what a step does.
const FREE: [&str; 17] = [
    "train.max_steps",
    "train.epochs",
    "train.eval_every",
    "train.eval_device",
    "train.save_every",
    "train.keep",
    "train.report_to",
    // Their product with the number of ranks must stay, see Progress, and filled micro-batches their size.
    "train.batch_size",
    "train.gradient_accumulation",
    "parallel.zero_stage",
    "parallel.bucket_size",
    "parallel.offload_optimizer",
    "parallel.nvme_path",
    "parallel.offload_param",
    "parallel.overlap",
    "parallel.trace",
    "train.memory_gib",
];

/// `state.json` of a checkpoint.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Steps taken.
    pub step: usize,
    /// Of these, those that changed nothing because gradients overflowed: the learning rate waits for them.
    #[serde(default)]
    pub skipped: usize,
    /// Rows per step, of all ranks.
    pub rows_per_step: usize,
    /// Input tokens seen.
    pub tokens: usize,
    /// Since the run began, pauses aside.
    pub seconds: f64,
    /// Of these, spent in steps.
    pub stepping: f64,
    /// Before the first step.
    pub valid_loss_before: Option<f64>,
    /// The length of `metrics.jsonl`: what stands behind it belongs to steps that are taken again.
    pub metrics_bytes: u64,
}

/// The checkpoints of a run folder, oldest first. What a killed run left unfinished is removed.
pub fn checkpoints(directory: &Path) -> Result<Vec<PathBuf>> {
    let place = || format!("{}: cannot be read", directory.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(place)? {
        let path = entry.with_context(place)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some(name) = name.strip_prefix("checkpoint-") else { continue };
        if name.ends_with(".part") {
            fs::remove_dir_all(&path).with_context(|| format!("{}: cannot be removed", path.display()))?;
        } else if let Ok(step) = name.parse::<usize>() {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// What `state.json` of a checkpoint says.
pub fn read(checkpoint: &Path) -> Result<Progress> {
    let path = checkpoint.join("state.json");
    let text = fs::read(&path).with_context(|| format!("{}: cannot be read", path.display()));
    text.and_then(|text| {
        serde_json::from_slice(&text).with_context(|| format!("{}: no state of a run", path.display()))
    })
    .with_context(|| advice(checkpoint))
}

/// What to do about a checkpoint that cannot be used.
pub fn advice(checkpoint: &Path) -> String {
    format!("{}: the checkpoint is damaged; remove this folder to go on from the one before", checkpoint.display())
}

/// Where a checkpoint is written before it is renamed.
pub fn beside(checkpoint: &Path) -> PathBuf {
    checkpoint.with_extension("part")
}

/// Makes an empty folder beside a checkpoint's place.
pub fn begin(checkpoint: &Path) -> Result<PathBuf> {
    let beside = beside(checkpoint);
    clear(&beside).and_then(|()| fs::create_dir_all(&beside)).with_context(|| checkpoint.display().to_string())?;
    Ok(beside)
}

/// Puts the folder beside a checkpoint in its place, if it was `written`; else removes it.
pub fn commit(checkpoint: &Path, progress: &Progress, written: Result<()>) -> Result<()> {
    let beside = beside(checkpoint);
    written
        .and_then(|()| write::whole(&beside.join("state.json"), serde_json::to_string_pretty(progress)?.as_bytes()))
        .and_then(|()| fs::rename(&beside, checkpoint).with_context(|| checkpoint.display().to_string()))
        .inspect_err(|_| drop(clear(&beside)))
}

fn clear(folder: &Path) -> std::io::Result<()> {
    if folder.exists() { fs::remove_dir_all(folder) } else { Ok(()) }
}

/// Removes a checkpoint, so that no half of it can be taken for a whole one.
pub fn remove(checkpoint: &Path) -> Result<()> {
    let beside = checkpoint.with_extension("part");
    fs::rename(checkpoint, &beside)
        .and_then(|()| fs::remove_dir_all(&beside))
        .with_context(|| format!("{}: cannot be removed", checkpoint.display()))
}

/// Refuses to go on with a run by another recipe.
pub fn same_recipe(directory: &Path, recipe: &Recipe) -> Result<()> {
    let path = directory.join("recipe.toml");
    let text = fs::read_to_string(&path)
        .with_context(|| format!("{}: cannot be read; there is no run to resume", path.display()))?;
    let old: toml::Value = toml::from_str(&text).with_context(|| format!("{}: not valid TOML", path.display()))?;
    let new: toml::Value = toml::from_str(&recipe.to_toml()?)?;
    let (mut before, mut now) = (Vec::new(), Vec::new());
    flatten("", &old, &mut before);
    flatten("", &new, &mut now);
    let fixed = |key: &str| key == "train.batch_size" && recipe.data.packing == Packing::Fill;
    let free = |key: &str| FREE.contains(&key) && !fixed(key);
    for key in before.iter().chain(&now).map(|(key, _)| key).filter(|key| !free(key)) {
        let of = |all: &[(String, String)]| {
            all.iter().find(|(other, _)| other == key).map_or("nothing".to_owned(), |(_, value)| value.clone())
        };
        let (before, now) = (of(&before), of(&now));
        if before != now {
            bail!(
                "{}: `{key}`: the run has {before}, the recipe {now}; a resumed run keeps its recipe",
                path.display()
            );
        }
    }
    Ok(())
}

fn flatten(prefix: &str, value: &toml::Value, into: &mut Vec<(String, String)>) {
    match value {
        toml::Value::Table(table) => {
            for (key, value) in table {
                flatten(&if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") }, value, into);
            }
        }
        value => into.push((prefix.to_owned(), value.to_string())),
    }
}
