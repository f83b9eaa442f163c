//! DeepSpeed's ds_config.json and Accelerate's YAML as parts of a recipe: what a file says is put where the recipe says
//! nothing, and `"auto"` stands for what the recipe says. Where both say something it must be the same.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use burn_llama::Checkpoint;
use burn_zero::{
    ds_config::{
        Accelerate, Adam, AutoPrecision, AutoValues, Device, Document, DsConfig, Optimizer, Precision, Source, Stage,
    },
    precision::LossScaler,
};
use serde_json::json;
use toml::Value;

use super::{Compute, Dtype, Recipe};
use crate::fetch;

/// What a file says about a key of the recipe.
pub struct Said {
    /// The recipe's key.
    pub key: &'static str,
    /// The file's.
    pub theirs: String,
    pub value: Value,
    /// Whether it is a default of the program whose file it is: the recipe may say otherwise.
    pub weak: bool,
}

/// What a file says.
pub struct Foreign {
    pub file: String,
    pub said: Vec<Said>,
    /// What it says in vain.
    pub notes: Vec<String>,
}

/// Reads the file that a recipe names, if it names one.
///
/// # Errors
/// One line that names the file and the key.
pub fn read(recipe: &Recipe, world: u64) -> Result<Option<Foreign>> {
    let files = &recipe.parallel.files;
    let mut foreign = Foreign { file: String::new(), said: Vec::new(), notes: Vec::new() };
    let document = match (&files.deepspeed, &files.accelerate) {
        (None, None) => return Ok(None),
        (Some(deepspeed), Some(accelerate)) => {
            bail!("`parallel.deepspeed` is {deepspeed} and `parallel.accelerate` is {accelerate}; remove one")
        }
        (Some(file), None) => {
            foreign.file = file.clone();
            Document::read(Path::new(file))?
        }
        (None, Some(file)) => {
            foreign.file = file.clone();
            foreign.accelerate(Accelerate::read(Path::new(file))?, world)?
        }
    };
    let auto = auto(recipe, &document).with_context(|| foreign.file.clone())?;
    let config = document.resolve(world, &auto).map_err(|error| anyhow!("{}: {error}", foreign.file))?;
    foreign.notes.extend(config.unhonoured.iter().map(ToString::to_string));
    foreign.batch(&document, &config);
    foreign.zero(&document, &config)?;
    foreign.numbers(&document, &config)?;
    foreign.optimizer(&document, &config);
    foreign.scheduler(&document)?;
    Ok(Some(foreign))
}

/// What the recipe says where the file says "auto".
fn auto(recipe: &Recipe, document: &Document) -> Result<AutoValues> {
    let train = &recipe.train;
    let (optimizer, steps) = (&train.optimizer, &train.steps);
    let precision = match (recipe.model.compute, recipe.model.dtype) {
        (Compute::Bf16, _) | (_, Some(Dtype::Bf16)) => AutoPrecision::Bf16,
        (Compute::F16, _) | (_, Some(Dtype::F16)) => AutoPrecision::F16,
        _ => AutoPrecision::F32,
    };
    // Bucket sizes follow from the model's width; only then is the model looked for.
    let sizes = ["reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"];
    let keys = document.auto_keys();
    let wanted = sizes.iter().any(|size| keys.contains(&format!("zero_optimization.{size}")));
    let hidden_size = match wanted {
        true => Some(Checkpoint::open(&fetch::resolve(&recipe.model.path)?)?.config().hidden_size as u64),
        false => None,
    };
    Ok(AutoValues {
        micro_batch: steps.batch_size as u64,
        accumulation: steps.gradient_accumulation as u64,
        gradient_clipping: optimizer.max_grad_norm,
        adam: Adam {
            lr: optimizer.learning_rate.unwrap_or_else(|| recipe.method.choice.kind.learning_rate()),
            betas: optimizer.betas.into(),
            eps: optimizer.epsilon,
            weight_decay: optimizer.weight_decay,
        },
        precision,
        hidden_size,
        ..AutoValues::default()
    })
}

impl Foreign {
    fn say(&mut self, key: &'static str, theirs: impl Into<String>, value: impl Into<Value>) {
        self.said.push(Said { key, theirs: theirs.into(), value: value.into(), weak: false });
    }

    fn note(&mut self, key: &str, instead: &str) {
        self.notes.push(format!("`{key}` is not honoured: {instead}"));
    }

    /// What only Accelerate's file says; the ds_config that it amounts to.
    fn accelerate(&mut self, accelerate: Accelerate, world: u64) -> Result<Document> {
        self.notes.extend(accelerate.unhonoured.iter().map(ToString::to_string));
        if let Some(processes) = accelerate.num_processes.filter(|&processes| processes != world) {
            self.notes.push(format!("`num_processes` is {processes}, but mpirun started {world}: mpirun decides"));
        }
        if accelerate.activation_checkpointing {
            let theirs = "fsdp_config.fsdp_activation_checkpointing";
            self.say("train.activation_checkpointing", theirs, "full");
        }
        match accelerate.source {
            Source::Document(document) => Ok(document),
            Source::File(file) => Ok(Document::read(&file)?),
        }
    }

    fn batch(&mut self, document: &Document, config: &DsConfig) {
        let keys = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"];
        let says = keys.map(|key| document.says(key).is_some());
        let automatic = document.auto_keys();
        let ours = [
            (1, "train.batch_size", config.batch.micro),
            (2, "train.gradient_accumulation", config.batch.accumulation),
        ];
        for (i, key, value) in ours {
            // What two of three keys leave open follows from them.
            if says[i] || says.contains(&true) && !automatic.iter().any(|auto| auto == keys[i]) {
                let theirs = if says[i] { keys[i] } else { keys[usize::from(!says[0])] };
                self.say(key, theirs, value as i64);
            }
        }
        if document.says("gradient_clipping").is_some() {
            self.say("train.max_grad_norm", "gradient_clipping", config.gradient_clipping);
        }
    }

    fn zero(&mut self, document: &Document, config: &DsConfig) -> Result<()> {
        let (zero, path) = (&config.zero, |key: &str| format!("zero_optimization.{key}"));
        let says = |key: &str| document.says(&path(key)).is_some();
        if says("stage") {
            self.say("parallel.zero_stage", path("stage"), i64::from(u8::from(zero.stage)));
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
            let name = match offload.device {
                Device::None => "none",
                Device::Cpu => "cpu",
                Device::Nvme => "nvme",
            };
            self.say(key, device, name);
            let path = path(&format!("{block}.nvme_path"));
            if let Some(found) = offload.nvme_path.as_ref().filter(|_| offload.device == Device::Nvme) {
                let found = found.display().to_string();
                if folder.as_ref().is_some_and(|folder| *folder != found) {
                    bail!("{}: `{path}`: expected the folder of `offload_optimizer`, found {found}", self.file);
                }
                self.say("parallel.nvme_path", path, found.clone());
                folder = Some(found);
            }
        }
        if document.auto_keys().contains(&path("reduce_bucket_size")) || says("reduce_bucket_size") {
            self.say("parallel.bucket_size", path("reduce_bucket_size"), zero.reduce_bucket_size as i64);
        }
        if says("overlap_comm") {
            self.say("parallel.overlap", path("overlap_comm"), zero.overlap_comm);
        }
        self.not_here(document, config);
        Ok(())
    }

    /// Says which settings of ZeRO have no counterpart.
    fn not_here(&mut self, document: &Document, config: &DsConfig) {
        const AHEAD: &str = "a segment's weights are gathered while the one before it runs, and let go of after it";
        let table = [
            ("sub_group_size", "a bucket is updated at a time; reduce_bucket_size decides"),
            ("stage3_max_live_parameters", AHEAD),
            ("stage3_max_reuse_distance", AHEAD),
            ("stage3_prefetch_bucket_size", AHEAD),
            ("stage3_param_persistence_threshold", "small weights are divided too"),
            ("stage3_model_persistence_threshold", "small weights are divided too"),
        ];
        for (key, instead) in table {
            let key = format!("zero_optimization.{key}");
            if document.says(&key).is_some() {
                self.note(&key, instead);
            }
        }
        let gathered = "zero_optimization.allgather_bucket_size";
        if document.says(gathered).is_some() && config.zero.allgather_bucket_size != config.zero.reduce_bucket_size {
            self.note(gathered, "what is reduced together is gathered together; reduce_bucket_size decides");
        }
        if document.says("zero_optimization.contiguous_gradients").is_some_and(|flag| *flag == false) {
            self.note("zero_optimization.contiguous_gradients", "a bucket is one buffer");
        }
        let weights = "zero_optimization.stage3_gather_16bit_weights_on_model_save";
        if document.says(weights).is_some_and(|flag| *flag == false) && config.zero.stage == Stage::Weights {
            self.note(weights, "a run's end always writes the whole model or adapter");
        }
    }

    /// `fp16` and `bf16`. Sums and weights that learn are f32 in any case.
    fn numbers(&mut self, document: &Document, config: &DsConfig) -> Result<()> {
        match config.precision {
            Precision::F32 => {}
            Precision::Bf16 => self.say("model.compute", "bf16.enabled", "bf16"),
            Precision::F16 { .. } => {
                self.say("model.compute", "fp16.enabled", "f16");
                if let Some(block) = document.says("fp16") {
                    let value = Value::try_from(block).with_context(|| format!("{}: `fp16`", self.file))?;
                    self.say("train.fp16", "fp16", value);
                }
            }
        }
        Ok(())
    }

    fn optimizer(&mut self, document: &Document, config: &DsConfig) {
        let Some(optimizer) = &config.optimizer else { return };
        let one = |beta: f64| Value::from(vec![beta, 0.999]);
        let pair = |(a, b): (f64, f64)| Value::from(vec![a, b]);
        let (name, lr, betas, eps, decay) = match *optimizer {
            Optimizer::AdamW(adam) => ("adamw", adam.lr, pair(adam.betas), Some(adam.eps), adam.weight_decay),
            Optimizer::Adam(adam) => ("adam", adam.lr, pair(adam.betas), Some(adam.eps), adam.weight_decay),
            Optimizer::Lamb(lamb) => ("lamb", lamb.lr, pair(lamb.betas), Some(lamb.eps), lamb.weight_decay),
            Optimizer::Lion(lion) => ("lion", lion.lr, pair(lion.betas), None, lion.weight_decay),
            Optimizer::Sgd(sgd) => ("sgd", sgd.lr, one(sgd.momentum), None, sgd.weight_decay),
        };
        self.say("train.optimizer", "optimizer.type", name);
        let momentum = if name == "sgd" { "momentum" } else { "betas" };
        let values = [
            ("train.learning_rate", "lr", Some(lr.into())),
            ("train.betas", momentum, Some(betas)),
            ("train.epsilon", "eps", eps.map(Value::from)),
            ("train.weight_decay", "weight_decay", Some(decay.into())),
        ];
        let automatic = document.auto_keys();
        for (key, param, value) in values {
            let theirs = format!("optimizer.params.{param}");
            if let Some(value) = value.filter(|_| !automatic.contains(&theirs)) {
                let weak = document.says(&theirs).is_none();
                self.said.push(Said { key, theirs, value, weak });
            }
        }
        for key in ["max_coeff", "min_coeff", "nesterov"].map(|param| format!("optimizer.params.{param}")) {
            if document.says(&key).is_some_and(|value| *value != false) {
                self.note(&key, "the optimizer has its usual constants");
            }
        }
    }

    /// The block as it stands: the number of steps that its "auto"s stand for is known when the rows have been read.
    fn scheduler(&mut self, document: &Document) -> Result<()> {
        let Some(block) = document.says("scheduler") else { return Ok(()) };
        let value = Value::try_from(block).with_context(|| format!("{}: `scheduler`", self.file))?;
        self.say("train.deepspeed_scheduler", "scheduler", value);
        Ok(())
    }
}

/// What scales the loss of products in f16, by DeepSpeed's `fp16` block or as it does without one.
pub fn loss_scaler(block: Option<&toml::Table>) -> Result<LossScaler, burn_zero::Error> {
    let mut block = block.cloned().unwrap_or_default();
    block.insert("enabled".to_owned(), true.into());
    let text = json!({ "train_micro_batch_size_per_gpu": 1, "fp16": block }).to_string();
    Document::from_json(&text)?.resolve(1, &AutoValues::default())?.precision.loss_scaler()
}

/// DeepSpeed's schedule by its block, in a run of `total` steps that warms up in `warmup`.
pub fn schedule(
    block: &toml::Table,
    learning_rate: f64,
    (warmup, total): (usize, usize),
) -> Result<burn_zero::schedule::DeepSpeed, burn_zero::Error> {
    let text = json!({ "train_micro_batch_size_per_gpu": 1, "scheduler": block }).to_string();
    let auto = AutoValues {
        adam: Adam { lr: learning_rate, ..Adam::default() },
        warmup_steps: warmup as u64,
        total_steps: total as u64,
        ..AutoValues::default()
    };
    let config = Document::from_json(&text)?.resolve(1, &auto)?;
    let scheduler = config.scheduler.expect("the block is there");
    Ok(scheduler.schedule(learning_rate))
}
