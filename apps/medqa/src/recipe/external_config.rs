//! DeepSpeed's ds_config.json and Accelerate's YAML as parts of a recipe: the settings of such a file fill keys that
//! the recipe leaves out, and its `"auto"` values are taken from the recipe. If both set a value, the two must agree.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use burn_zero::{
    ConfigError, OffloadDevice, ZeroStage,
    ds_config::{
        AccelerateConfig, AdamParams, AutoPrecision, AutoValues, DsConfig, DsConfigSource, OptimizerConfig, Precision,
        RawDsConfig,
    },
    precision::LossScaler,
};
use serde_json::json;
use toml::Value;

use super::{ComputeDtype, Recipe, WeightDtype};
use crate::{
    fetch,
    identify::{self, Purpose},
};

/// A setting of the external file for a key of the recipe.
pub(super) struct ExternalSetting {
    /// The recipe's key.
    pub key: &'static str,
    /// The file's key.
    pub external_key: String,
    pub value: Value,
    /// True if the value is only that program's default, which the recipe may override.
    pub is_default: bool,
}

/// The settings of an external file.
pub(super) struct ExternalConfig {
    pub file: String,
    pub settings: Vec<ExternalSetting>,
    /// Notes about settings that have no effect.
    pub notes: Vec<String>,
}

/// Reads the ds_config or Accelerate file that a recipe names, if it names one.
///
/// # Errors
/// One line that names the file and the key.
pub(super) fn read(recipe: &Recipe, world: u64) -> Result<Option<ExternalConfig>> {
    let files = &recipe.parallel.files;
    let mut foreign = ExternalConfig { file: String::new(), settings: Vec::new(), notes: Vec::new() };
    let document = match (&files.deepspeed, &files.accelerate) {
        (None, None) => return Ok(None),
        (Some(deepspeed), Some(accelerate)) => {
            bail!("`parallel.deepspeed` is {deepspeed} and `parallel.accelerate` is {accelerate}; remove one")
        }
        (Some(file), None) => {
            foreign.file = file.clone();
            explained(RawDsConfig::read(Path::new(file)).map_err(whole_message), file, Purpose::DeepSpeed)?
        }
        (None, Some(file)) => {
            foreign.file = file.clone();
            let config = AccelerateConfig::read(Path::new(file)).map_err(whole_message);
            let config = explained(config, file, Purpose::Accelerate)?;
            foreign.accelerate(config, world)?
        }
    };
    let auto = auto_values(recipe, &document).with_context(|| foreign.file.clone())?;
    let purpose = if files.deepspeed.is_some() { Purpose::DeepSpeed } else { Purpose::Accelerate };
    let config = document.resolve(world, &auto).map_err(|error| anyhow!("{}: {error}", foreign.file));
    let config = explained(config, &foreign.file, purpose)?;
    foreign.notes.extend(config.unhonoured.iter().map(ToString::to_string));
    foreign.batch(&document, &config);
    foreign.zero(&document, &config)?;
    foreign.precision(&document, &config)?;
    foreign.optimizer(&document, &config);
    foreign.scheduler(&document)?;
    Ok(Some(foreign))
}

/// Returns the message of an error, which contains those of its sources, as an error without sources.
fn whole_message(error: burn_zero::Error) -> anyhow::Error {
    anyhow!("{error}")
}

/// Adds to the error of a file that could not be read what stands at its path.
fn explained<T>(read: Result<T>, file: &str, purpose: Purpose) -> Result<T> {
    read.map_err(|error| identify::explain(error, Path::new(file), purpose))
}

/// Returns the recipe's values for the keys that are "auto" in the file.
fn auto_values(recipe: &Recipe, document: &RawDsConfig) -> Result<AutoValues> {
    let train = &recipe.train;
    let (optimizer, steps) = (&train.optimizer, &train.steps);
    let precision = match (recipe.model.compute, recipe.model.dtype) {
        (ComputeDtype::Bf16, _) | (_, Some(WeightDtype::Bf16)) => AutoPrecision::Bf16,
        (ComputeDtype::F16, _) | (_, Some(WeightDtype::F16)) => AutoPrecision::F16,
        _ => AutoPrecision::F32,
    };
    // "auto" sizes depend on the model's hidden size; only then is the model opened.
    let sizes = ["reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"];
    let keys = document.auto_keys();
    let wanted = sizes.iter().any(|size| keys.contains(&format!("zero_optimization.{size}")));
    let hidden_size = match wanted {
        true => Some(fetch::open_checkpoint(&recipe.model.path)?.config().hidden_size as u64),
        false => None,
    };
    Ok(AutoValues {
        micro_batch: steps.batch_size as u64,
        accumulation: steps.gradient_accumulation as u64,
        gradient_clipping: optimizer.max_grad_norm,
        pipeline_stages: recipe.parallel.pipeline.pipeline as u64,
        adam: AdamParams {
            lr: optimizer.learning_rate.unwrap_or_else(|| recipe.method.common.kind.default_learning_rate()),
            betas: optimizer.betas.into(),
            eps: optimizer.epsilon,
            weight_decay: optimizer.weight_decay,
        },
        precision,
        hidden_size,
        ..AutoValues::default()
    })
}

impl ExternalConfig {
    fn set(&mut self, key: &'static str, external_key: impl Into<String>, value: impl Into<Value>) {
        self.settings.push(ExternalSetting {
            key,
            external_key: external_key.into(),
            value: value.into(),
            is_default: false,
        });
    }

    fn note(&mut self, key: &str, instead: &str) {
        self.notes.push(format!("`{key}` is not honoured: {instead}"));
    }

    /// Adds the settings that only Accelerate's file has, and returns the equivalent ds_config.
    fn accelerate(&mut self, accelerate: AccelerateConfig, world: u64) -> Result<RawDsConfig> {
        self.notes.extend(accelerate.unhonoured.iter().map(ToString::to_string));
        if let Some(processes) = accelerate.num_processes.filter(|&processes| processes != world) {
            self.notes.push(format!("`num_processes` is {processes}, but mpirun started {world}: mpirun decides"));
        }
        if let Some(external_key) = accelerate.activation_checkpointing {
            self.set("train.activation_checkpointing", external_key, "full");
        }
        match accelerate.source {
            DsConfigSource::Inline(document) => Ok(document),
            DsConfigSource::File(file) => Ok(RawDsConfig::read(&file)?),
        }
    }

    fn batch(&mut self, document: &RawDsConfig, config: &DsConfig) {
        let keys = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"];
        let says = keys.map(|key| document.get(key).is_some());
        let automatic = document.auto_keys();
        let ours = [
            (1, "train.batch_size", config.batch.micro),
            (2, "train.gradient_accumulation", config.batch.accumulation),
        ];
        for (i, key, value) in ours {
            // Two of the three keys determine the third.
            if says[i] || says.contains(&true) && !automatic.iter().any(|auto| auto == keys[i]) {
                let external_key = if says[i] { keys[i] } else { keys[usize::from(!says[0])] };
                self.set(key, external_key, value as i64);
            }
        }
        if let Some(stages) = document.get("pipeline.stages").and_then(serde_json::Value::as_u64) {
            self.set("parallel.pipeline", "pipeline.stages", stages as i64);
        }
        if document.get("gradient_clipping").is_some() {
            self.set("train.max_grad_norm", "gradient_clipping", config.gradient_clipping);
        }
    }

    fn zero(&mut self, document: &RawDsConfig, config: &DsConfig) -> Result<()> {
        let (zero, path) = (&config.zero, |key: &str| format!("zero_optimization.{key}"));
        let says = |key: &str| document.get(&path(key)).is_some();
        if says("stage") {
            self.set("parallel.zero_stage", path("stage"), i64::from(u8::from(zero.stage)));
        }
        let offloads = [
            ("offload_optimizer", "parallel.offload_optimizer", &zero.offload_optimizer),
            ("offload_param", "parallel.offload_param", &zero.offload_param),
        ];
        let mut folder: Option<String> = None;
        for (block, key, offload) in offloads {
            if !says(&format!("{block}.device")) {
                continue;
            }
            let device = path(&format!("{block}.device"));
            self.set(key, device, Value::try_from(offload.device)?);
            let path = path(&format!("{block}.nvme_path"));
            if let Some(found) = offload.nvme_path.as_ref().filter(|_| offload.device == OffloadDevice::Nvme) {
                let found = found.display().to_string();
                if folder.as_ref().is_some_and(|folder| *folder != found) {
                    bail!("{}: `{path}`: expected the folder of `offload_optimizer`, found {found}", self.file);
                }
                self.set("parallel.nvme_path", path, found.clone());
                folder = Some(found);
            }
        }
        if document.auto_keys().contains(&path("reduce_bucket_size")) || says("reduce_bucket_size") {
            self.set("parallel.bucket_size", path("reduce_bucket_size"), zero.reduce_bucket_size as i64);
        }
        if says("overlap_comm") {
            self.set("parallel.overlap", path("overlap_comm"), zero.overlap_comm);
        }
        self.note_unsupported(document, config);
        Ok(())
    }

    /// Adds notes about ZeRO settings that have no counterpart here.
    fn note_unsupported(&mut self, document: &RawDsConfig, config: &DsConfig) {
        const AHEAD: &str = "a segment's weights are gathered while the one before it runs, and released after it";
        let table = [
            ("sub_group_size", "the optimizer updates one bucket at a time; reduce_bucket_size decides"),
            ("stage3_max_live_parameters", AHEAD),
            ("stage3_max_reuse_distance", AHEAD),
            ("stage3_prefetch_bucket_size", AHEAD),
            ("stage3_param_persistence_threshold", "small weights are sharded too"),
            ("stage3_model_persistence_threshold", "small weights are sharded too"),
        ];
        for (key, instead) in table {
            let key = format!("zero_optimization.{key}");
            if document.get(&key).is_some() {
                self.note(&key, instead);
            }
        }
        let gathered = "zero_optimization.allgather_bucket_size";
        if document.get(gathered).is_some() && config.zero.allgather_bucket_size != config.zero.reduce_bucket_size {
            self.note(gathered, "reduce and all-gather use the same buckets; reduce_bucket_size decides");
        }
        if document.get("zero_optimization.contiguous_gradients").is_some_and(|flag| *flag == false) {
            self.note("zero_optimization.contiguous_gradients", "a bucket is one buffer");
        }
        let weights = "zero_optimization.stage3_gather_16bit_weights_on_model_save";
        if document.get(weights).is_some_and(|flag| *flag == false) && config.zero.stage == ZeroStage::Weights {
            self.note(weights, "the end of a run always writes the whole model or adapter");
        }
    }

    /// Adds the settings of `fp16` and `bf16`. Accumulators and trainable weights are f32 in any case.
    fn precision(&mut self, document: &RawDsConfig, config: &DsConfig) -> Result<()> {
        match config.precision {
            Precision::F32 => {}
            Precision::Bf16 => self.set("model.compute", "bf16.enabled", "bf16"),
            Precision::F16 { .. } => {
                self.set("model.compute", "fp16.enabled", "f16");
                if let Some(block) = document.get("fp16") {
                    let value = Value::try_from(block).with_context(|| format!("{}: `fp16`", self.file))?;
                    self.set("train.fp16", "fp16", value);
                }
            }
        }
        Ok(())
    }

    fn optimizer(&mut self, document: &RawDsConfig, config: &DsConfig) {
        let Some(optimizer) = &config.optimizer else { return };
        let one = |beta: f64| Value::from(vec![beta, 0.999]);
        let pair = |(a, b): (f64, f64)| Value::from(vec![a, b]);
        let (name, lr, betas, eps, decay) = match *optimizer {
            OptimizerConfig::AdamW(adam) => ("adamw", adam.lr, pair(adam.betas), Some(adam.eps), adam.weight_decay),
            OptimizerConfig::Adam(adam) => ("adam", adam.lr, pair(adam.betas), Some(adam.eps), adam.weight_decay),
            OptimizerConfig::Lamb(lamb) => ("lamb", lamb.lr, pair(lamb.betas), Some(lamb.eps), lamb.weight_decay),
            OptimizerConfig::Lion(lion) => ("lion", lion.lr, pair(lion.betas), None, lion.weight_decay),
            OptimizerConfig::Sgd(sgd) => ("sgd", sgd.lr, one(sgd.momentum), None, sgd.weight_decay),
        };
        self.set("train.optimizer", "optimizer.type", name);
        let momentum = if name == "sgd" { "momentum" } else { "betas" };
        let values = [
            ("train.learning_rate", "lr", Some(lr.into())),
            ("train.betas", momentum, Some(betas)),
            ("train.epsilon", "eps", eps.map(Value::from)),
            ("train.weight_decay", "weight_decay", Some(decay.into())),
        ];
        let automatic = document.auto_keys();
        for (key, param, value) in values {
            let external_key = format!("optimizer.params.{param}");
            if let Some(value) = value.filter(|_| !automatic.contains(&external_key)) {
                let is_default = document.get(&external_key).is_none();
                self.settings.push(ExternalSetting { key, external_key, value, is_default });
            }
        }
        for key in ["max_coeff", "min_coeff", "nesterov"].map(|param| format!("optimizer.params.{param}")) {
            if document.get(&key).is_some_and(|value| *value != false) {
                self.note(&key, "the optimizer uses its default");
            }
        }
    }

    /// Adds the scheduler block unresolved: the number of steps, which its "auto" values need, is known only when the
    /// rows have been read.
    fn scheduler(&mut self, document: &RawDsConfig) -> Result<()> {
        let Some(block) = document.get("scheduler") else { return Ok(()) };
        let value = Value::try_from(block).with_context(|| format!("{}: `scheduler`", self.file))?;
        self.set("train.deepspeed_scheduler", "scheduler", value);
        Ok(())
    }
}

/// Returns the loss scaler for matrix products in f16, by DeepSpeed's `fp16` block or with its defaults.
pub fn loss_scaler(block: Option<&toml::Table>) -> Result<LossScaler, ConfigError> {
    let mut block = block.cloned().unwrap_or_default();
    block.insert("enabled".to_owned(), true.into());
    let text = json!({ "train_micro_batch_size_per_gpu": 1, "fp16": block }).to_string();
    RawDsConfig::from_hjson(&text)?.resolve(1, &AutoValues::default())?.precision.loss_scaler()
}

/// Returns DeepSpeed's learning rate schedule by its `scheduler` block, for a run of `total` steps with `warmup` steps
/// of warmup.
pub fn deepspeed_schedule(
    block: &toml::Table,
    learning_rate: f64,
    warmup: usize,
    total: usize,
) -> Result<burn_zero::lr_schedule::DeepSpeedLrSchedule, ConfigError> {
    let text = json!({ "train_micro_batch_size_per_gpu": 1, "scheduler": block }).to_string();
    let auto = AutoValues {
        adam: AdamParams { lr: learning_rate, ..AdamParams::default() },
        warmup_steps: warmup as u64,
        total_steps: total as u64,
        ..AutoValues::default()
    };
    let config = RawDsConfig::from_hjson(&text)?.resolve(1, &auto)?;
    let scheduler = config.scheduler.expect("the block is there");
    Ok(scheduler.lr_schedule(learning_rate))
}
