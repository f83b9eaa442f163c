//! The YAML that `accelerate config` writes, as a ds_config.

use super::{
    Document, Stage,
    check::{Check, Unhonoured, wrong},
    document::in_file,
    fsdp::fsdp_stage,
    keys::ACCELERATE,
    strict,
};
use crate::Error;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// An Accelerate file.
#[derive(Debug, Clone, PartialEq)]
pub struct Accelerate {
    /// The number of ranks, if the file says it.
    pub num_processes: Option<u64>,
    /// The number of machines.
    pub num_machines: u64,
    /// Whether every layer runs again in the backward pass (`fsdp_activation_checkpointing`).
    pub activation_checkpointing: bool,
    /// The ds_config that it amounts to.
    pub source: Source,
    /// The keys of this file that are not honoured.
    pub unhonoured: Vec<Unhonoured>,
}

/// Where the ds_config of an Accelerate file is.
#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// In the file itself; batch sizes and clipping are `"auto"` where it does not say them.
    Document(Document),
    /// In a file of its own, `deepspeed_config_file`, relative to where training was started or to the Accelerate file.
    File(PathBuf),
}

impl Accelerate {
    /// Reads YAML.
    ///
    /// # Errors
    /// [`Error::Syntax`], [`Error::UnknownKey`], [`Error::Key`] or [`Error::Refused`].
    pub fn from_yaml(text: &str) -> Result<Self, Error> {
        // Carried into the ds_config, which knows what it stands for.
        let auto = |path: &str| path.starts_with("deepspeed_config.gradient_").then(|| "auto".into());
        let mut check = Check { auto: &auto, unhonoured: Vec::new() };
        let root = check.block("", ACCELERATE, &strict::from_yaml(text)?)?;
        let block = |name: &str| root.get(name).and_then(Value::as_object).filter(|block| !block.is_empty());
        let (deepspeed, fsdp) = (block("deepspeed_config"), block("fsdp_config"));
        let strategy = strategy(&root)?;
        let mut source = match strategy {
            Strategy::DeepSpeed => of_deepspeed(deepspeed)?,
            Strategy::Fsdp => Source::Document(document(of_fsdp(fsdp)?)),
            Strategy::Plain => Source::Document(document(json!({"stage": 0}))),
        };
        let mixed = root.get("mixed_precision").and_then(Value::as_str).unwrap_or("no");
        let mut note = |key: &str, instead, noted: bool| {
            check.unhonoured.extend(noted.then(|| Unhonoured { key: key.to_owned(), instead }));
        };
        const DECIDES: &str = "`distributed_type` says something else";
        note("deepspeed_config", DECIDES, deepspeed.is_some() && strategy != Strategy::DeepSpeed);
        note("fsdp_config", DECIDES, fsdp.is_some() && strategy != Strategy::Fsdp);
        match &mut source {
            Source::Document(document) => precision(&mut document.root, mixed)?,
            Source::File(_) => note("mixed_precision", "`deepspeed_config_file` decides", mixed != "no"),
        }
        let recompute = fsdp.and_then(|fsdp| fsdp.get("fsdp_activation_checkpointing"));
        Ok(Self {
            num_processes: root.get("num_processes").and_then(Value::as_u64),
            num_machines: root.get("num_machines").and_then(Value::as_u64).unwrap_or(1),
            activation_checkpointing: strategy == Strategy::Fsdp && recompute.is_some_and(|flag| *flag == true),
            source,
            unhonoured: check.unhonoured,
        })
    }

    /// Reads a YAML file, and the ds_config that it names, looked for beside it if it is not found from here.
    ///
    /// # Errors
    /// [`Error::File`] with what is wrong.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let mut accelerate = in_file(path, Self::from_yaml)?;
        if let Source::File(file) = &accelerate.source {
            let beside = path.parent().map(|folder| folder.join(file)).filter(|_| !file.exists());
            accelerate.source = Source::Document(Document::read(beside.as_deref().unwrap_or(file))?);
        }
        Ok(accelerate)
    }
}

/// What trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Strategy {
    DeepSpeed,
    Fsdp,
    /// Every rank holds all.
    Plain,
}

fn strategy(root: &Map<String, Value>) -> Result<Strategy, Error> {
    const KEY: &str = "distributed_type";
    let refused = |found: &str, reason| Err(Error::Refused { key: KEY.to_owned(), found: found.to_owned(), reason });
    match root.get(KEY).and_then(Value::as_str).unwrap_or("NO") {
        "DEEPSPEED" => Ok(Strategy::DeepSpeed),
        "FSDP" => Ok(Strategy::Fsdp),
        "NO" | "MULTI_CPU" | "MULTI_GPU" | "MULTI_XPU" => Ok(Strategy::Plain),
        found @ ("MEGATRON_LM" | "TP") => refused(found, "every rank runs all layers; write MULTI_GPU or DEEPSPEED"),
        found @ ("XLA" | "TPU" | "MULTI_NPU" | "MULTI_MLU" | "MULTI_MUSA" | "MULTI_SDAA" | "MULTI_HPU") => {
            refused(found, "there is no backend for that device; write MULTI_GPU, MULTI_CPU or NO")
        }
        found => Err(wrong(KEY, "NO, MULTI_CPU, MULTI_GPU, DEEPSPEED or FSDP", found)),
    }
}

/// A ds_config that leaves to the caller what Accelerate leaves to the script.
fn document(zero: Value) -> Document {
    let auto =
        ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"];
    let mut root: Map<String, Value> = auto.into_iter().map(|key| (key.to_owned(), "auto".into())).collect();
    root.insert("zero_optimization".to_owned(), zero);
    Document { root }
}

fn of_deepspeed(block: Option<&Map<String, Value>>) -> Result<Source, Error> {
    let empty = Map::new();
    let block = block.unwrap_or(&empty);
    if let Some(Value::String(file)) = block.get("deepspeed_config_file").filter(|file| *file != "none") {
        return match block.keys().find(|key| *key != "deepspeed_config_file") {
            Some(key) => {
                let expected = format!("nothing, because {file} says it");
                Err(wrong(&format!("deepspeed_config.{key}"), &expected, &block[key].to_string()))
            }
            None => Ok(Source::File(file.into())),
        };
    }
    let stage = block.get("zero_stage").cloned().unwrap_or_else(|| 2.into());
    let offload = |device: &str, path: &str| json!({"device": block.get(device).unwrap_or(&"none".into()), "nvme_path": block.get(path)});
    let mut document = document(json!({
        "stage": stage,
        "offload_optimizer": offload("offload_optimizer_device", "offload_optimizer_nvme_path"),
        "offload_param": offload("offload_param_device", "offload_param_nvme_path"),
        "stage3_gather_16bit_weights_on_model_save": block.get("zero3_save_16bit_model"),
    }));
    for key in ["gradient_accumulation_steps", "gradient_clipping"] {
        if let Some(value) = block.get(key) {
            document.root.insert(key.to_owned(), value.clone());
        }
    }
    Ok(Source::Document(document))
}

/// `zero_optimization` of an `fsdp_config`; FULL_SHARD where it says no strategy, as Accelerate.
fn of_fsdp(block: Option<&Map<String, Value>>) -> Result<Value, Error> {
    let get = |key: &str| block.and_then(|block| block.get(key));
    // Version 2 says whether the weights are divided again after the forward pass, version 1 a strategy.
    let stage = match get("fsdp_reshard_after_forward").or_else(|| get("fsdp_sharding_strategy")) {
        None | Some(Value::Bool(true)) => Stage::Weights,
        Some(Value::Bool(false)) => Stage::Gradients,
        Some(Value::String(name)) if name.eq_ignore_ascii_case("true") => Stage::Weights,
        Some(Value::String(name)) if name.eq_ignore_ascii_case("false") => Stage::Gradients,
        Some(Value::String(name)) => fsdp_stage(name)?,
        Some(other) => fsdp_stage(&other.to_string())?,
    };
    let offload = get("fsdp_offload_params").is_some_and(|flag| *flag == true);
    let device = |on| json!({"device": if on { "cpu" } else { "none" }});
    Ok(json!({
        "stage": stage,
        "offload_optimizer": device(offload),
        "offload_param": device(offload && stage == Stage::Weights),
    }))
}

fn precision(root: &mut Map<String, Value>, mixed: &str) -> Result<(), Error> {
    match mixed {
        "no" => {}
        "fp8" => {
            let reason = "no backend multiplies in 8 bits; write bf16";
            return Err(Error::Refused { key: "mixed_precision".to_owned(), found: "fp8".to_owned(), reason });
        }
        name => drop(root.insert(name.to_owned(), json!({"enabled": true}))),
    }
    Ok(())
}
