//! The state of a run, and the checkpoints that it can resume from.

use super::inputs::RunInputs;
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

/// Recipe keys that a resumed run may change: they decide when it ends, what it writes and where it computes, not what
/// a step computes.
const KEYS_FREE_ON_RESUME: [&str; 22] = [
    "train.max_steps",
    "train.epochs",
    "train.eval_every",
    "train.eval_device",
    "train.save_every",
    "train.keep",
    "train.report_to",
    // Their product with the number of ranks must stay, see `TrainerState::rows_per_step`, and with `data.packing =
    // "fill"` the batch size must stay too.
    "train.batch_size",
    "train.gradient_accumulation",
    "parallel.pipeline",
    "parallel.data",
    "parallel.schedule",
    "parallel.chunks",
    "parallel.partition",
    "parallel.zero_stage",
    "parallel.bucket_size",
    "parallel.offload_optimizer",
    "parallel.nvme_path",
    "parallel.offload_param",
    "parallel.overlap",
    "parallel.trace",
    "train.memory_gib",
];

/// The file of a checkpoint that holds the trainable parameters and the optimizer states.
pub(super) const STATE_FILE: &str = "training.safetensors";

/// The contents of a checkpoint's `state.json`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct TrainerState {
    /// Optimizer steps taken.
    pub step: usize,
    /// The steps among these that were skipped because gradients overflowed; they do not advance the learning rate
    /// schedule.
    #[serde(default)]
    pub skipped: usize,
    /// Rows per step, of all ranks.
    pub rows_per_step: usize,
    /// Input tokens seen.
    pub tokens: usize,
    /// The time taken.
    #[serde(flatten)]
    pub time: TimeTaken,
    /// The validation loss before the first step.
    pub valid_loss_before: Option<f64>,
    /// The length of `metrics.jsonl`: anything after it belongs to steps that a resumed run repeats.
    pub metrics_bytes: u64,
    /// The inputs of the run; none in checkpoints of earlier versions.
    #[serde(default)]
    pub inputs: Option<RunInputs>,
}

/// The time that a run has taken.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(super) struct TimeTaken {
    /// Seconds since the run started, without the time between interruption and resume.
    pub seconds: f64,
    /// The seconds among these that were spent in steps.
    pub stepping: f64,
}

/// Returns the checkpoints of a run directory, oldest first, and removes incomplete ones that a killed run left. A run
/// that has no directory yet has none.
pub(super) fn checkpoints(directory: &Path) -> Result<Vec<PathBuf>> {
    let context = || format!("{}: cannot be read", directory.display());
    let mut found = Vec::new();
    if !directory.is_dir() {
        return Ok(Vec::new());
    }
    for entry in fs::read_dir(directory).with_context(context)? {
        let path = entry.with_context(context)?.path();
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

/// Reads a checkpoint's `state.json`.
pub(super) fn read_state(checkpoint: &Path) -> Result<TrainerState> {
    let path = checkpoint.join("state.json");
    let text = fs::read(&path).with_context(|| format!("{}: cannot be read", path.display()));
    text.and_then(|text| {
        serde_json::from_slice(&text).with_context(|| format!("{}: not a valid training state", path.display()))
    })
    .with_context(|| advice(checkpoint))
}

/// Returns the advice for a checkpoint that cannot be used.
pub(super) fn advice(checkpoint: &Path) -> String {
    format!("{}: the checkpoint is damaged; remove this folder to resume from the one before", checkpoint.display())
}

/// Returns the temporary path at which a checkpoint is written before it is renamed.
pub(super) fn partial_path(checkpoint: &Path) -> PathBuf {
    checkpoint.with_extension("part")
}

/// Creates an empty folder at the temporary path of a checkpoint.
pub(super) fn create_partial(checkpoint: &Path) -> Result<PathBuf> {
    let partial = partial_path(checkpoint);
    remove_if_exists(&partial)
        .and_then(|()| fs::create_dir_all(&partial))
        .with_context(|| checkpoint.display().to_string())?;
    Ok(partial)
}

/// Completes the temporary folder of a checkpoint and renames it, if it was `written`; else removes it.
pub(super) fn commit(checkpoint: &Path, progress: &TrainerState, written: Result<()>) -> Result<()> {
    let partial = partial_path(checkpoint);
    written
        .and_then(|()| {
            write::write_atomically(&partial.join("state.json"), serde_json::to_string_pretty(progress)?.as_bytes())
        })
        .and_then(|()| fs::rename(&partial, checkpoint).with_context(|| checkpoint.display().to_string()))
        .inspect_err(|_| drop(remove_if_exists(&partial)))
}

fn remove_if_exists(folder: &Path) -> std::io::Result<()> {
    if folder.exists() { fs::remove_dir_all(folder) } else { Ok(()) }
}

/// Removes a checkpoint; it is renamed first, so that a half-removed one cannot be taken for a complete one.
pub(super) fn remove(checkpoint: &Path) -> Result<()> {
    let partial = partial_path(checkpoint);
    fs::rename(checkpoint, &partial)
        .and_then(|()| fs::remove_dir_all(&partial))
        .with_context(|| format!("{}: cannot be removed", checkpoint.display()))
}

/// Reads the recipe of the run in `directory`.
///
/// # Errors
/// If there is no run, or its recipe is not valid.
pub(crate) fn read_recipe(directory: &Path) -> Result<Recipe> {
    let path = directory.join("recipe.toml");
    let text = fs::read_to_string(&path)
        .with_context(|| format!("{}: cannot be read; there is no run to resume", path.display()))?;
    Recipe::parse(&text, &path, &[])
}

/// Refuses to resume a run that is complete, unless the recipe makes it longer and there is a checkpoint to go on from.
pub(super) fn ensure_not_complete(directory: &Path, recipe: &Recipe) -> Result<()> {
    if !directory.join("summary.json").exists() {
        return Ok(());
    }
    let (at, before) = (directory.display(), read_recipe(directory)?.train.steps);
    let now = &recipe.train.steps;
    let longer = match (now.max_steps, before.max_steps) {
        (Some(now), Some(before)) => now > before,
        (None, None) => now.epochs > before.epochs,
        // The number of steps per epoch is not known yet.
        _ => true,
    };
    if !longer {
        bail!("{at}: the run is complete; a higher `train.max_steps` or `train.epochs` makes it longer");
    }
    if checkpoints(directory)?.is_empty() {
        bail!(
            "{at}: the run is complete and has no checkpoint to go on from; one is written after every `train.save_every` \
             steps, but none after the last step"
        );
    }
    Ok(())
}

/// Returns the number of steps in the summary of a complete run; none if the run is not complete.
///
/// # Errors
/// If the summary cannot be read.
pub(super) fn steps_of_complete_run(directory: &Path) -> Result<Option<usize>> {
    let path = directory.join("summary.json");
    if !path.exists() {
        return Ok(None);
    }
    let at = || format!("{}: expected the summary of a run", path.display());
    let summary: serde_json::Value = serde_json::from_slice(&fs::read(&path).with_context(at)?).with_context(at)?;
    Ok(summary["steps"].as_u64().map(|steps| steps as usize))
}

/// Refuses to resume a run with another recipe.
pub(super) fn ensure_same_recipe(directory: &Path, recipe: &Recipe) -> Result<()> {
    let path = directory.join("recipe.toml");
    // Read as a recipe, because an earlier version may have written it.
    let old: toml::Value = toml::from_str(&read_recipe(directory)?.to_toml()?)?;
    let new: toml::Value = toml::from_str(&recipe.to_toml()?)?;
    let (mut before, mut now) = (Vec::new(), Vec::new());
    flatten("", &old, &mut before);
    flatten("", &new, &mut now);
    let fixed = |key: &str| key == "train.batch_size" && recipe.data.packing == Packing::Fill;
    let free = |key: &str| KEYS_FREE_ON_RESUME.contains(&key) && !fixed(key);
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
