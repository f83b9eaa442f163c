//! A ds_config as it stands, and its resolution into one value.

use super::{
    AutoValues, Batch, DsConfig, Scheduler, Stage,
    check::{Check, Unhonoured},
    keys::DEEPSPEED,
    modernise::modernise,
    optimizer,
    precision::{self, Bf16, Fp16},
    strict,
    zero::Zero,
};
use crate::Error;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::path::Path;

/// A ds_config as it stands: well-formed, its `"auto"`s not yet filled.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    pub(super) root: Map<String, Value>,
}

impl Document {
    /// Reads JSON.
    ///
    /// # Errors
    /// [`Error::Syntax`] if it is none, or a key stands twice.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        let mut root = strict::from_json(text)?;
        modernise(&mut root)?;
        Ok(Self { root })
    }

    /// Reads a JSON file.
    ///
    /// # Errors
    /// [`Error::File`] with what is wrong.
    pub fn read(path: &Path) -> Result<Self, Error> {
        in_file(path, Self::from_json)
    }

    /// The paths of the keys that are left to the caller.
    pub fn auto_keys(&self) -> Vec<String> {
        let mut keys = Vec::new();
        collect(&self.root, "", &mut keys);
        keys
    }

    /// What the file itself says under a path such as `zero_optimization.stage`; none where it says nothing, or `"auto"`.
    pub fn says(&self, path: &str) -> Option<&Value> {
        let mut parts = path.split('.');
        let first = self.root.get(parts.next()?)?;
        let value = parts.try_fold(first, |value, part| value.get(part))?;
        Some(value).filter(|value| !value.is_null() && *value != "auto")
    }

    /// The configuration for `world` ranks, every `"auto"` replaced by the caller's value.
    ///
    /// # Errors
    /// [`Error::UnknownKey`], [`Error::Key`], [`Error::Refused`] or [`Error::Setting`] for keys and values,
    /// [`Error::NoBatch`], [`Error::ZeroBatch`] or [`Error::Batch`] for batch sizes that do not fit together.
    ///
    /// # Panics
    /// If the world has no rank.
    pub fn resolve(&self, world: u64, auto: &AutoValues) -> Result<DsConfig, Error> {
        let mut check = Check { auto: &|path| auto.value(path), unhonoured: Vec::new() };
        let mut root = check.block("", DEEPSPEED, &self.root)?;
        self.fill(&mut root, auto);
        let count = |key| root.get(key).and_then(Value::as_u64);
        let batch = Batch::complete(
            count("train_batch_size"),
            count("train_micro_batch_size_per_gpu"),
            count("gradient_accumulation_steps"),
            world,
        )?;
        let fp16: Option<Fp16> = take(&mut root, "fp16")?;
        let bf16: Option<Bf16> = take(&mut root, "bf16")?;
        let zero: Option<Zero> = take(&mut root, "zero_optimization")?;
        let scheduler = take(&mut root, "scheduler")?;
        if matches!(scheduler, Some(Scheduler::OneCycle(_))) && !self.says_cycle_momentum() {
            // DeepSpeed's default is to cycle it.
            let instead = "the optimizer's betas stay as they are; only the learning rate moves";
            check.unhonoured.push(Unhonoured { key: "scheduler.params.cycle_momentum".to_owned(), instead });
        }
        Ok(DsConfig {
            batch,
            zero: zero.unwrap_or_default().checked()?,
            precision: precision::precision(fp16.unwrap_or_default(), &bf16.unwrap_or_default())?,
            gradient_clipping: take(&mut root, "gradient_clipping")?.unwrap_or(1.0),
            optimizer: take(&mut root, "optimizer")?,
            scheduler,
            steps_per_print: take(&mut root, "steps_per_print")?,
            unhonoured: check.unhonoured,
        })
    }

    /// What one key says about another.
    fn fill(&self, root: &mut Map<String, Value>, auto: &AutoValues) {
        if self.root.get("train_batch_size").is_some_and(|value| value == "auto") {
            root.entry("train_micro_batch_size_per_gpu").or_insert_with(|| auto.micro_batch.into());
            root.entry("gradient_accumulation_steps").or_insert_with(|| auto.accumulation.into());
        }
        if let Some(Value::Object(zero)) = root.get_mut("zero_optimization") {
            let weights = zero.get("stage").is_some_and(|stage| *stage == u8::from(Stage::Weights));
            zero.entry("overlap_comm").or_insert_with(|| weights.into());
        }
        if let Some(Value::Object(block)) = root.get_mut("optimizer") {
            optimizer::settle(block, optimizer::asks_for_torch(&self.root));
        }
    }

    fn says_cycle_momentum(&self) -> bool {
        let params = self.root.get("scheduler").and_then(|scheduler| scheduler.get("params"));
        params.and_then(|params| params.get("cycle_momentum")).is_some_and(Value::is_boolean)
    }
}

/// Reads a file and names it in whatever is wrong with it.
pub(super) fn in_file<T>(path: &Path, parse: impl FnOnce(&str) -> Result<T, Error>) -> Result<T, Error> {
    let parsed = std::fs::read_to_string(path).map_err(Error::from).and_then(|text| parse(&text));
    parsed.map_err(|source| Error::File { file: path.display().to_string(), source: Box::new(source) })
}

/// A block that the walk has checked, as its type.
fn take<T: DeserializeOwned>(root: &mut Map<String, Value>, key: &str) -> Result<Option<T>, Error> {
    let Some(value) = root.shift_remove(key) else {
        return Ok(None);
    };
    let found = value.to_string();
    serde_json::from_value(value).map(Some).map_err(|error| super::check::wrong(key, &error.to_string(), &found))
}

fn collect(map: &Map<String, Value>, block: &str, keys: &mut Vec<String>) {
    for (name, value) in map {
        let path = if block.is_empty() { name.clone() } else { format!("{block}.{name}") };
        match value {
            Value::Object(inner) => collect(inner, &path, keys),
            value if value == "auto" => keys.push(path),
            _ => {}
        }
    }
}
