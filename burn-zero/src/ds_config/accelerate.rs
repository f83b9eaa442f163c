//! Conversion of the YAML that `accelerate config` writes to a ds_config.

use super::{
    RawDsConfig,
    check::{Checker, UnhonouredKey},
    fsdp::fsdp_stage,
    keys::ACCELERATE,
    raw::parse_file,
    strict_yaml,
};
use crate::{ConfigError, Error, ZeroStage};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// The content of an Accelerate configuration file.
#[derive(Debug, Clone, PartialEq)]
pub struct AccelerateConfig {
    /// The number of ranks, if the file sets it.
    pub num_processes: Option<u64>,
    /// The number of machines.
    pub num_machines: u64,
    /// The key that asks for every layer to be recomputed in the backward pass, if one does:
    /// `fsdp_activation_checkpointing` or `megatron_lm_recompute_activations`, with its block.
    pub activation_checkpointing: Option<&'static str>,
    /// The equivalent ds_config.
    pub source: DsConfigSource,
    /// The keys of this file that are not honoured.
    pub unhonoured: Vec<UnhonouredKey>,
}

/// The location of the ds_config of an Accelerate file.
#[derive(Debug, Clone, PartialEq)]
pub enum DsConfigSource {
    /// In the file itself; batch sizes and gradient clipping are `"auto"` unless the file sets them.
    Inline(RawDsConfig),
    /// In a separate file, `deepspeed_config_file`, relative to the working directory or to the Accelerate file.
    File(PathBuf),
}

impl AccelerateConfig {
    /// Parses YAML.
    ///
    /// # Errors
    /// [`ConfigError::Syntax`], [`ConfigError::UnknownKey`], [`ConfigError::InvalidValue`] or
    /// [`ConfigError::Unsupported`].
    pub fn from_yaml(text: &str) -> Result<Self, ConfigError> {
        // Copied into the ds_config, which resolves it.
        let auto = |path: &str| path.starts_with("deepspeed_config.gradient_").then(|| "auto".into());
        let mut check = Checker { auto: &auto, unhonoured: Vec::new() };
        let root = check.check_block("", ACCELERATE, &strict_yaml::parse(text)?)?;
        let block = |name: &str| root.get(name).and_then(Value::as_object).filter(|block| !block.is_empty());
        let (deepspeed, fsdp, megatron) =
            (block("deepspeed_config"), block("fsdp_config"), block("megatron_lm_config"));
        let strategy = distributed_type(&root)?;
        let mut source = match strategy {
            DistributedType::DeepSpeed => from_deepspeed_config(deepspeed)?,
            DistributedType::Fsdp => DsConfigSource::Inline(raw_config_with_zero(zero_from_fsdp_config(fsdp)?)),
            DistributedType::MegatronLm => DsConfigSource::Inline(from_megatron_lm_config(megatron)),
            DistributedType::Ddp => DsConfigSource::Inline(raw_config_with_zero(json!({"stage": 0}))),
        };
        let mixed = root.get("mixed_precision").and_then(Value::as_str).unwrap_or("no");
        let mut note = |key: &str, instead, noted: bool| {
            check.unhonoured.extend(noted.then(|| UnhonouredKey { key: key.to_owned(), instead }));
        };
        const DECIDES: &str = "`distributed_type` selects another strategy";
        note("deepspeed_config", DECIDES, deepspeed.is_some() && strategy != DistributedType::DeepSpeed);
        note("fsdp_config", DECIDES, fsdp.is_some() && strategy != DistributedType::Fsdp);
        note("megatron_lm_config", DECIDES, megatron.is_some() && strategy != DistributedType::MegatronLm);
        match &mut source {
            DsConfigSource::Inline(document) => set_mixed_precision(&mut document.root, mixed)?,
            DsConfigSource::File(_) => note("mixed_precision", "`deepspeed_config_file` decides", mixed != "no"),
        }
        let megatron = megatron.filter(|_| strategy == DistributedType::MegatronLm);
        let recompute = [
            (fsdp.filter(|_| strategy == DistributedType::Fsdp), "fsdp_config.fsdp_activation_checkpointing"),
            (megatron, "megatron_lm_config.megatron_lm_recompute_activations"),
        ];
        let asks = |block: Option<&Map<String, Value>>, path: &str| {
            let key = path.rsplit('.').next().unwrap_or(path);
            block.and_then(|block| block.get(key)).is_some_and(|flag| *flag == true)
        };
        Ok(Self {
            num_processes: root.get("num_processes").and_then(Value::as_u64),
            num_machines: root.get("num_machines").and_then(Value::as_u64).unwrap_or(1),
            activation_checkpointing: recompute
                .into_iter()
                .find(|(block, path)| asks(*block, path))
                .map(|(_, path)| path),
            source,
            unhonoured: check.unhonoured,
        })
    }

    /// Reads a YAML file and the ds_config file that it names: relative to the working directory, or next to the YAML
    /// file.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read, [`ConfigError::File`] with the path and the error in it.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let mut accelerate = parse_file(path, Self::from_yaml)?;
        if let DsConfigSource::File(file) = &accelerate.source {
            let beside = path.parent().map(|folder| folder.join(file)).filter(|_| !file.exists());
            accelerate.source = DsConfigSource::Inline(RawDsConfig::read(beside.as_deref().unwrap_or(file))?);
        }
        Ok(accelerate)
    }
}

/// The strategy of data parallelism, as `distributed_type` selects it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DistributedType {
    DeepSpeed,
    Fsdp,
    MegatronLm,
    /// Plain data parallelism: nothing is sharded.
    Ddp,
}

fn distributed_type(root: &Map<String, Value>) -> Result<DistributedType, ConfigError> {
    const KEY: &str = "distributed_type";
    let refused =
        |found: &str, reason| Err(ConfigError::Unsupported { key: KEY.to_owned(), found: found.to_owned(), reason });
    match root.get(KEY).and_then(Value::as_str).unwrap_or("NO") {
        "DEEPSPEED" => Ok(DistributedType::DeepSpeed),
        "FSDP" => Ok(DistributedType::Fsdp),
        "MEGATRON_LM" => Ok(DistributedType::MegatronLm),
        "NO" | "MULTI_CPU" | "MULTI_GPU" | "MULTI_XPU" => Ok(DistributedType::Ddp),
        "TP" => refused("TP", "every rank computes whole layers; write MULTI_GPU, DEEPSPEED or MEGATRON_LM"),
        found @ ("XLA" | "TPU" | "MULTI_NPU" | "MULTI_MLU" | "MULTI_MUSA" | "MULTI_SDAA" | "MULTI_HPU") => {
            refused(found, "there is no backend for that device; write MULTI_GPU, MULTI_CPU or NO")
        }
        found => {
            Err(ConfigError::invalid_value(KEY, "NO, MULTI_CPU, MULTI_GPU, DEEPSPEED, FSDP or MEGATRON_LM", found))
        }
    }
}

/// Returns a ds_config with these ZeRO settings and `"auto"` for what Accelerate leaves to the training script.
fn raw_config_with_zero(zero: Value) -> RawDsConfig {
    let auto =
        ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"];
    let mut root: Map<String, Value> = auto.into_iter().map(|key| (key.to_owned(), "auto".into())).collect();
    root.insert("zero_optimization".to_owned(), zero);
    RawDsConfig { root }
}

fn from_deepspeed_config(block: Option<&Map<String, Value>>) -> Result<DsConfigSource, ConfigError> {
    let empty = Map::new();
    let block = block.unwrap_or(&empty);
    if let Some(Value::String(file)) = block.get("deepspeed_config_file").filter(|file| *file != "none") {
        return match block.keys().find(|key| *key != "deepspeed_config_file") {
            Some(key) => {
                let expected = format!("nothing, because {file} sets it");
                Err(ConfigError::invalid_value(format!("deepspeed_config.{key}"), &expected, block[key].to_string()))
            }
            None => Ok(DsConfigSource::File(file.into())),
        };
    }
    let stage = block.get("zero_stage").cloned().unwrap_or_else(|| 2.into());
    let offload = |device: &str, path: &str| json!({"device": block.get(device).unwrap_or(&"none".into()), "nvme_path": block.get(path)});
    let mut document = raw_config_with_zero(json!({
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
    Ok(DsConfigSource::Inline(document))
}

/// Returns the `zero_optimization` block of an `fsdp_config`. The default strategy is FULL_SHARD, as in Accelerate.
fn zero_from_fsdp_config(block: Option<&Map<String, Value>>) -> Result<Value, ConfigError> {
    let get = |key: &str| block.and_then(|block| block.get(key));
    // FSDP 2 has a flag to shard the weights again after the forward pass, FSDP 1 a sharding strategy.
    let stage = match get("fsdp_reshard_after_forward").or_else(|| get("fsdp_sharding_strategy")) {
        None | Some(Value::Bool(true)) => ZeroStage::Weights,
        Some(Value::Bool(false)) => ZeroStage::Gradients,
        Some(Value::String(name)) if name.eq_ignore_ascii_case("true") => ZeroStage::Weights,
        Some(Value::String(name)) if name.eq_ignore_ascii_case("false") => ZeroStage::Gradients,
        Some(Value::String(name)) => fsdp_stage(name)?,
        Some(other) => fsdp_stage(&other.to_string())?,
    };
    let offload = get("fsdp_offload_params").is_some_and(|flag| *flag == true);
    let device = |on| json!({"device": if on { "cpu" } else { "none" }});
    Ok(json!({
        "stage": stage,
        "offload_optimizer": device(offload),
        "offload_param": device(offload && stage == ZeroStage::Weights),
    }))
}

/// Returns a `megatron_lm_config` as a ds_config. Its distributed optimizer divides the optimizer states, as ZeRO stage 1
/// does. Its micro-batches are those of a step.
fn from_megatron_lm_config(block: Option<&Map<String, Value>>) -> RawDsConfig {
    let get = |key: &str| block.and_then(|block| block.get(key));
    let distributed = get("megatron_lm_use_distributed_optimizer").is_some_and(|flag| *flag == true);
    let mut document = raw_config_with_zero(json!({"stage": u8::from(distributed)}));
    let keys = [
        ("megatron_lm_num_micro_batches", "gradient_accumulation_steps"),
        ("megatron_lm_gradient_clipping", "gradient_clipping"),
    ];
    for (key, ours) in keys {
        if let Some(value) = get(key) {
            document.root.insert(ours.to_owned(), value.clone());
        }
    }
    if let Some(stages) = get("megatron_lm_pp_degree") {
        document.root.insert("pipeline".to_owned(), json!({"stages": stages}));
    }
    document
}

fn set_mixed_precision(root: &mut Map<String, Value>, mixed: &str) -> Result<(), ConfigError> {
    match mixed {
        "no" => {}
        "fp8" => {
            let reason = "no backend multiplies in 8 bits; write bf16";
            return Err(ConfigError::Unsupported {
                key: "mixed_precision".to_owned(),
                found: "fp8".to_owned(),
                reason,
            });
        }
        name => drop(root.insert(name.to_owned(), json!({"enabled": true}))),
    }
    Ok(())
}
