//! The recipe of a training run: one TOML file, read once and validated once.
//!
//! ```text
//! file + --set key=value → read (known keys, right types, defaults) → check (valid values) → derived defaults → Recipe
//! ```
//!
//! A [`Recipe`] that [`Recipe::load`] returns is valid and is not validated again. [`Recipe::to_toml`] writes every
//! default out, so that the copy in the run directory is complete. Relative paths are relative to the current
//! directory.

mod check;
mod check_adalora;
mod external_config;
mod invalid_value;
mod keys;
mod method;
mod other_file;
mod other_tools;
mod parallel;
mod pipeline;
mod read;
mod tables;
mod train;
mod validation_rows;
mod value;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use burn_zero::lr_schedule::LrKind;
use serde::{Deserialize, Serialize};

use crate::{
    fetch,
    identify::{self, Purpose},
};
use read::ParsedRecipe;

pub use external_config::{deepspeed_schedule, loss_scaler};
pub use method::{
    AdaLoraOptions, AdapterTargets, CommonMethodConfig, LoraOptions, MethodConfig, MethodKind, VirtualTokens,
};
pub use parallel::{OffloadConfig, ParallelConfig, ParallelFiles, ShardingConfig};
pub use pipeline::{Partition, PipelineOptions};
pub use tables::{ComputeDtype, DataConfig, Learn, ModelConfig, OnTooLong, WeightDtype};
pub use train::{EvalSaveConfig, KeepBest, LrScheduleConfig, OptimizerConfig, ReportTo, StepsConfig, TrainConfig};
pub use validation_rows::ValidationRows;
pub use value::{DatasetSource, Packing, TargetModules, TrainableLayers};

/// The text of a recipe, in TOML.
#[derive(Debug)]
pub struct RecipeText {
    pub text: String,
    /// The file that it came from, or other words for its origin; error messages begin with it.
    pub origin: PathBuf,
}

impl RecipeText {
    /// Reads a recipe file.
    ///
    /// # Errors
    /// One line that names the file.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("{}: the recipe cannot be read", path.display()));
        let text = text.map_err(|error| identify::explain(error, path, Purpose::Recipe))?;
        Ok(Self { text, origin: path.to_owned() })
    }
}

/// A valid recipe, and notes for its user.
#[derive(Debug)]
pub struct LoadedRecipe {
    /// The recipe, with every default filled in.
    pub recipe: Recipe,
    /// One line for each key of a ds_config or Accelerate file that is not honoured.
    pub notes: Vec<String>,
}

/// One training run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Recipe {
    /// The base model.
    pub model: ModelConfig,
    /// The training and validation data.
    pub data: DataConfig,
    /// The fine-tuning method.
    pub method: MethodConfig,
    /// Steps, optimizer, learning rate, evaluation and checkpoints.
    pub train: TrainConfig,
    /// Pipelines, sharding among ranks, and offload.
    pub parallel: ParallelConfig,
}

impl Recipe {
    /// Loads a recipe for a run of `world` ranks; each of `sets` is a `table.key=value` that overrides it. A ds_config
    /// or Accelerate file that it names is merged into the recipe. A run that is resumed has an `earlier` recipe, which
    /// decides about keys whose defaults have changed between versions.
    ///
    /// # Errors
    /// One line that names the origin of the text (or `--set`), the key, what was expected and what was found.
    pub fn load(text: &RecipeText, sets: &[String], world: u64, earlier: Option<&Self>) -> Result<LoadedRecipe> {
        let ParsedRecipe { mut recipe, origin, mut notes } = read::read(&text.text, &text.origin, sets, Some(world))?;
        if let Some(earlier) = earlier {
            recipe.train.schedule.warmup = recipe.train.schedule.warmup.or(earlier.train.schedule.warmup);
            recipe.data.format = recipe.data.format.or(earlier.data.format);
        }
        let constant = recipe.train.schedule.scheduler == LrKind::Constant;
        let recipe = recipe.validated(&origin)?;
        if constant && recipe.train.schedule.scheduler != LrKind::Constant {
            notes.push(
                "`train.scheduler`: \"constant\" with `train.warmup` is read as \"constant_with_warmup\"".to_owned(),
            );
        }
        Ok(LoadedRecipe { recipe, notes })
    }

    /// Parses a recipe from `text`, which came from `path`. A ds_config or Accelerate file that it names is not read.
    ///
    /// # Errors
    /// One line that names `path` (or `--set`), the key, what was expected and what was found.
    pub fn parse(text: &str, path: &Path, sets: &[String]) -> Result<Self> {
        let ParsedRecipe { recipe, origin, .. } = read::read(text, path, sets, None)?;
        recipe.validated(&origin)
    }

    fn validated(mut self, origin: &read::Origin) -> Result<Self> {
        // Invalid values are refused before the defaults that depend on them are filled in.
        check::check(&self).map_err(|(key, problem)| origin.error(key, &problem))?;
        self.fill_defaults();
        Ok(self)
    }

    /// Returns the recipe as TOML with every default written out; loading it gives the same recipe.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).context("the recipe cannot be written as TOML")
    }

    /// Returns whether the model is a GGUF file, judged by its name.
    fn is_gguf(&self) -> bool {
        self.model.path.to_ascii_lowercase().ends_with(".gguf") || self.model.path == fetch::SMOLLM2
    }

    /// Fills in the defaults that depend on other keys.
    fn fill_defaults(&mut self) {
        let kind = self.method.common.kind;
        if kind == MethodKind::Freeze {
            self.method.common.layers.get_or_insert_default();
        }
        if kind.is_lora() {
            self.method.targets.target_modules.get_or_insert_default();
        }
        let gguf = self.is_gguf();
        let learns = matches!(kind, MethodKind::Full | MethodKind::Freeze);
        self.model.dtype.get_or_insert(match (kind, gguf) {
            (MethodKind::QLora, true) => WeightDtype::Packed,
            (MethodKind::QLora, false) => WeightDtype::Nf4,
            _ if self.model.compute == ComputeDtype::Bf16 && !learns => WeightDtype::Bf16,
            _ if self.model.compute == ComputeDtype::F16 && !learns => WeightDtype::F16,
            _ => WeightDtype::F32,
        });
        self.train.optimizer.learning_rate.get_or_insert(kind.default_learning_rate());
        let schedule = &mut self.train.schedule;
        let warmup = *schedule.warmup.get_or_insert_default();
        if schedule.scheduler == LrKind::Constant && !warmup.is_zero() {
            schedule.scheduler = LrKind::ConstantWithWarmup;
        }
        let steps = &mut self.train.steps;
        if steps.max_steps.is_none() {
            steps.epochs.get_or_insert(1.0);
        }
    }
}

#[cfg(test)]
mod tests;
