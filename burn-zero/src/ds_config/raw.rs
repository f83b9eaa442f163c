//! A ds_config before resolution, and its resolution into a [`DsConfig`].

use super::{
    AutoValues, BatchSizes, DsConfig, SchedulerConfig,
    check::{Checker, UnhonouredKey, join_path},
    deprecated::replace_deprecated_keys,
    hjson,
    keys::{BETA_CYCLE, DEEPSPEED},
    optimizer,
    precision::{self, Bf16Config, Fp16Config},
    zero::ZeroConfig,
};
use crate::{ConfigError, Error, ZeroStage};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::{io, path::Path};

/// A well-formed ds_config whose `"auto"` values have not been replaced yet.
#[derive(Debug, Clone, PartialEq)]
pub struct RawDsConfig {
    pub(super) root: Map<String, Value>,
}

impl RawDsConfig {
    /// Parses Hjson, of which JSON is a part.
    ///
    /// # Errors
    /// [`ConfigError::Syntax`] if the text is not Hjson or has a duplicate key.
    pub fn from_hjson(text: &str) -> Result<Self, ConfigError> {
        let mut root = hjson::parse(text)?;
        replace_deprecated_keys(&mut root)?;
        Ok(Self { root })
    }

    /// Reads a Hjson file.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`ConfigError::File`] with the path and the error in it.
    pub fn read(path: &Path) -> Result<Self, Error> {
        parse_file(path, Self::from_hjson)
    }

    /// Returns the paths of the keys that are `"auto"`.
    pub fn auto_keys(&self) -> Vec<String> {
        let mut keys = Vec::new();
        collect_auto_keys(&self.root, "", &mut keys);
        keys
    }

    /// Returns the value that the file itself has at a path such as `zero_optimization.stage`; `None` if the key is
    /// absent or `"auto"`.
    pub fn get(&self, path: &str) -> Option<&Value> {
        let mut parts = path.split('.');
        let first = self.root.get(parts.next()?)?;
        let value = parts.try_fold(first, |value, part| value.get(part))?;
        Some(value).filter(|value| !value.is_null() && *value != "auto")
    }

    /// Returns the configuration for `world` ranks, with every `"auto"` replaced by the caller's value. The ranks of a
    /// pipeline (`pipeline.stages`, or the caller's number) share their micro-batches and count as one for the batch
    /// sizes.
    ///
    /// # Errors
    /// [`ConfigError::UnknownKey`], [`ConfigError::InvalidValue`] or [`ConfigError::Unsupported`] for keys and values,
    /// [`ConfigError::MissingBatchSize`], [`ConfigError::ZeroBatchSize`] or [`ConfigError::BatchSizeMismatch`] for
    /// batch sizes that do not fit together.
    ///
    /// # Panics
    /// If `world` is 0.
    pub fn resolve(&self, world: u64, auto: &AutoValues) -> Result<DsConfig, ConfigError> {
        let mut check = Checker { auto: &|path| auto.value(path), unhonoured: Vec::new() };
        let mut root = check.check_block("", DEEPSPEED, &self.root)?;
        self.fill_defaults(&mut root, auto);
        let count = |key| root.get(key).and_then(Value::as_u64);
        let pipeline_stages = root.get("pipeline").and_then(|block| block.get("stages")).and_then(Value::as_u64);
        let pipeline_stages = pipeline_stages.unwrap_or(auto.pipeline_stages);
        if !world.is_multiple_of(pipeline_stages) {
            let expected = format!("a divisor of the {world} ranks");
            return Err(ConfigError::invalid_value("pipeline.stages", expected, pipeline_stages.to_string()));
        }
        let batch = BatchSizes::complete(
            count("train_batch_size"),
            count("train_micro_batch_size_per_gpu"),
            count("gradient_accumulation_steps"),
            world / pipeline_stages,
        )?;
        let fp16: Option<Fp16Config> = take_block(&mut root, "fp16")?;
        let bf16: Option<Bf16Config> = take_block(&mut root, "bf16")?;
        let zero: Option<ZeroConfig> = take_block(&mut root, "zero_optimization")?;
        let scheduler = take_block(&mut root, "scheduler")?;
        if matches!(scheduler, Some(SchedulerConfig::OneCycle(_))) && !self.has_cycle_momentum() {
            // DeepSpeed cycles the momentum by default.
            let key = "scheduler.params.cycle_momentum".to_owned();
            check.unhonoured.push(UnhonouredKey { key, instead: BETA_CYCLE });
        }
        Ok(DsConfig {
            batch,
            zero: zero.unwrap_or_default().validated()?,
            precision: precision::resolve_precision(fp16.unwrap_or_default(), &bf16.unwrap_or_default())?,
            gradient_clipping: take_block(&mut root, "gradient_clipping")?.unwrap_or(1.0),
            optimizer: take_block(&mut root, "optimizer")?,
            scheduler,
            steps_per_print: take_block(&mut root, "steps_per_print")?,
            unhonoured: check.unhonoured,
        })
    }

    /// Sets defaults that depend on other keys.
    fn fill_defaults(&self, root: &mut Map<String, Value>, auto: &AutoValues) {
        if self.root.get("train_batch_size").is_some_and(|value| value == "auto") {
            root.entry("train_micro_batch_size_per_gpu").or_insert_with(|| auto.micro_batch.into());
            root.entry("gradient_accumulation_steps").or_insert_with(|| auto.accumulation.into());
        }
        if let Some(Value::Object(zero)) = root.get_mut("zero_optimization") {
            let weights = zero.get("stage").is_some_and(|stage| *stage == u8::from(ZeroStage::Weights));
            zero.entry("overlap_comm").or_insert_with(|| weights.into());
        }
        if let Some(Value::Object(block)) = root.get_mut("optimizer") {
            optimizer::resolve_adam_w_mode(block, optimizer::is_torch_adam(&self.root));
        }
    }

    fn has_cycle_momentum(&self) -> bool {
        let params = self.root.get("scheduler").and_then(|scheduler| scheduler.get("params"));
        params.and_then(|params| params.get("cycle_momentum")).is_some_and(Value::is_boolean)
    }
}

/// Reads and parses a file; errors name the file.
pub(super) fn parse_file<T>(path: &Path, parse: impl FnOnce(&str) -> Result<T, ConfigError>) -> Result<T, Error> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        let source = io::Error::new(error.kind(), format!("cannot be read: {error}"));
        Error::Io { path: path.to_owned(), source }
    })?;
    Ok(parse(&text).map_err(|source| ConfigError::File { path: path.to_owned(), source: Box::new(source) })?)
}

/// Takes a validated block out of `root` and deserializes it.
fn take_block<T: DeserializeOwned>(root: &mut Map<String, Value>, key: &str) -> Result<Option<T>, ConfigError> {
    let Some(value) = root.shift_remove(key) else {
        return Ok(None);
    };
    let found = value.to_string();
    serde_json::from_value(value).map(Some).map_err(|error| ConfigError::invalid_value(key, error.to_string(), &found))
}

fn collect_auto_keys(map: &Map<String, Value>, block: &str, keys: &mut Vec<String>) {
    for (name, value) in map {
        let path = join_path(block, name);
        match value {
            Value::Object(inner) => collect_auto_keys(inner, &path, keys),
            value if value == "auto" => keys.push(path),
            _ => {}
        }
    }
}
