//! A training run as one TOML file, read once and checked once.
//!
//! ```text
//! file + --set key=value → read (known keys, right types) → defaults → check (possible values) → Recipe
//! ```
//!
//! Nobody validates a [`Recipe`] again: what [`Recipe::load`] returns can be run. [`Recipe::to_toml`] writes every
//! default out, so that the file kept beside a run says all that it did. Relative paths are relative to the current
//! directory.

mod check;
mod foreign;
mod method;
mod parallel;
mod read;
mod tables;
mod train;
mod value;

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::fetch;

pub use foreign::{loss_scaler, schedule as deepspeed_schedule};
pub use method::{Choice, Lora, Method, MethodKind, Scope, VirtualTokens};
pub use parallel::{Division, Files, Offload, Parallel, Place};
pub use tables::{Compute, Data, Dtype, Model, OnTooLong};
pub use train::{Optimizer, OptimizerKind, ReportTo, Saving, Schedule, Scheduler, Steps, Train};
pub use value::{Checkpointing, Layers, Packing, TargetModules};

/// One training run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Recipe {
    /// What is trained.
    pub model: Model,
    /// What it is trained on.
    pub data: Data,
    /// Which of its parameters learn.
    pub method: Method,
    /// How they learn.
    pub train: Train,
    /// What is divided among ranks.
    pub parallel: Parallel,
}

impl Recipe {
    /// Reads the recipe at `path` for a run of `world` ranks; each of `sets` is a `table.key=value` that overrides it. A
    /// ds_config or an Accelerate file that it names is part of the recipe from then on; the second value says which of its
    /// keys are not honoured.
    ///
    /// # Errors
    /// One line that names the file (or `--set`), the key, what was expected and what was found.
    pub fn load(path: &Path, sets: &[String], world: u64) -> Result<(Self, Vec<String>)> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("{}: the recipe cannot be read", path.display()))?;
        let (recipe, origin, notes) = read::read(&text, path, sets, Some(world))?;
        Ok((recipe.checked(&origin)?, notes))
    }

    /// [`Recipe::load`] for a text that came from `path`; files of other programs are named and not read.
    pub fn parse(text: &str, path: &Path, sets: &[String]) -> Result<Self> {
        let (recipe, origin, _) = read::read(text, path, sets, None)?;
        recipe.checked(&origin)
    }

    fn checked(mut self, origin: &read::Origin) -> Result<Self> {
        // Impossible values are refused before defaults that depend on them are chosen.
        check::check(&self).map_err(|(key, problem)| origin.error(key, &problem))?;
        self.fill();
        Ok(self)
    }

    /// The recipe with every default written out; loading it gives the same recipe.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).context("the recipe cannot be written as TOML")
    }

    /// Whether the model is a GGUF file, as far as its name tells.
    fn is_gguf(&self) -> bool {
        self.model.path.to_ascii_lowercase().ends_with(".gguf") || self.model.path == fetch::SMOLLM2
    }

    /// Defaults that depend on other keys.
    fn fill(&mut self) {
        let kind = self.method.choice.kind;
        if kind == MethodKind::Freeze {
            self.method.choice.layers.get_or_insert_default();
        }
        if kind.is_lora() {
            self.method.scope.target_modules.get_or_insert_default();
        }
        let gguf = self.is_gguf();
        let learns = matches!(kind, MethodKind::Full | MethodKind::Freeze);
        self.model.dtype.get_or_insert(match (kind, gguf) {
            (MethodKind::QLora, true) => Dtype::Packed,
            (MethodKind::QLora, false) => Dtype::Nf4,
            _ if self.model.compute == Compute::Bf16 && !learns => Dtype::Bf16,
            _ if self.model.compute == Compute::F16 && !learns => Dtype::F16,
            _ => Dtype::F32,
        });
        self.train.optimizer.learning_rate.get_or_insert(kind.learning_rate());
        let steps = &mut self.train.steps;
        if steps.max_steps.is_none() {
            steps.epochs.get_or_insert(1.0);
        }
    }
}

#[cfg(test)]
mod tests;
