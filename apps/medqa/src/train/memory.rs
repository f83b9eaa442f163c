//! Checks before a run that it fits into this machine's memory, and suggests settings that do.

use crate::{
    backend::Device,
    footprint,
    method_adapter::lora_config,
    process,
    recipe::{ComputeDtype, MethodKind, Recipe, WeightDtype},
};
use anyhow::{Result, bail};
use burn_llama::LlamaConfig;
use burn_zero::{
    OffloadDevice, ZeroStage,
    estimate::{
        BaseModel, LlamaShape, MemoryEstimate, MicroBatch, RankStages, RunFootprint, StatePlacement, TrainedWeights,
        TrainingPrecision, WeightStorage,
    },
    segment::Checkpointing,
};
use std::fs;

const GIB: f64 = (1u64 << 30) as f64;

/// The sizes that the memory of a run depends on, besides its recipe.
#[derive(Debug, Clone)]
pub(crate) struct RunSizes {
    /// The dimensions of the model.
    pub shape: LlamaShape,
    /// Parameters of the base model, without adapters.
    pub parameters: u64,
    /// Trainable parameters.
    pub trained: u64,
    /// Tokens of the largest micro-batch.
    pub tokens: u64,
    /// The number of ranks, or of pipelines.
    pub world: u64,
    /// The stages of this rank; none if it runs the whole model.
    pub stages: Option<RankStages>,
}

impl RunSizes {
    /// Returns the lower bound that is known before anything is loaded: the parameters of the base model, all of them
    /// trainable with full fine-tuning, else none.
    pub(crate) fn lower_bound(config: &LlamaConfig, recipe: &Recipe, world: u64) -> Self {
        let shape = footprint::model_shape(config);
        let parameters = shape.parameters(config.tie_word_embeddings);
        let trained = if recipe.method.common.kind == MethodKind::Full { parameters } else { 0 };
        Self { shape, parameters, trained, tokens: 0, world, stages: None }
    }

    /// Returns the memory of this rank at its peak in a run by a recipe.
    pub(crate) fn peak_memory(&self, recipe: &Recipe) -> MemoryEstimate {
        let footprint = self.footprint(recipe);
        match &self.stages {
            Some(stages) => footprint.peak_memory_of_stages(stages),
            None => footprint.peak_memory(),
        }
    }

    /// Returns the bytes that this rank needs on device and host.
    fn peak_bytes(&self, recipe: &Recipe) -> u64 {
        match &self.stages {
            Some(stages) => {
                let memory = self.peak_memory(recipe);
                // The first rank reads the whole model to write a result.
                let first = stages.segments.iter().any(|stage| stage.start == 0);
                let whole = if first { self.footprint(recipe).base.storage.bytes(self.parameters) } else { 0 };
                memory.total().max(memory.total() - memory.activations + whole)
            }
            None => self.footprint(recipe).peak_bytes(),
        }
    }

    /// Returns the footprint of a run of these sizes by a recipe.
    pub(crate) fn footprint(&self, recipe: &Recipe) -> RunFootprint {
        let storage = weight_storage(recipe.model.dtype.unwrap_or_default());
        let trained_weights = match recipe.method.common.kind {
            MethodKind::Full => TrainedWeights::All,
            MethodKind::Freeze => TrainedWeights::Part,
            _ => TrainedWeights::Adapters,
        };
        let mixed = trained_weights == TrainedWeights::All && storage != WeightStorage::F32;
        let (sharding, offload) = (&recipe.parallel.sharding, &recipe.parallel.offload);
        RunFootprint {
            base: BaseModel { shape: self.shape, weights: self.parameters, storage },
            trained_weights,
            trained: self.trained,
            precision: if mixed { TrainingPrecision::Mixed } else { TrainingPrecision::F32 },
            placement: StatePlacement {
                stage: sharding.zero_stage,
                world_size: self.world,
                offload_optimizer: offload.offload_optimizer,
                offload_param: offload.offload_param,
                // Gradient accumulation keeps the gradients until the last micro-batch.
                optimizer_in_backward: steps_in_backward(recipe)
                    && recipe.train.steps.gradient_accumulation == 1
                    && self.stages.is_none(),
            },
            bucket_size: sharding.bucket_size as u64,
            micro_batch: MicroBatch {
                tokens: self.tokens,
                checkpointing: recipe.train.steps.activation_checkpointing,
                first_layer: self.first_trained_layer(recipe),
                ..MicroBatch::default()
            },
        }
    }

    /// Returns the index of the first layer with a trained weight: that of the last blocks if `freeze` trains these.
    fn first_trained_layer(&self, recipe: &Recipe) -> u64 {
        let common = &recipe.method.common;
        let layers = common.layers.as_ref().filter(|layers| layers.count > 0 && layers.extra_modules.is_empty());
        let layers = layers.filter(|_| common.kind == MethodKind::Freeze);
        layers.map_or(0, |layers| self.shape.layers.saturating_sub(layers.count as u64))
    }
}

/// Returns whether the optimizer steps during the backward pass: gradients are not clipped, and no overflow can skip
/// the step.
fn steps_in_backward(recipe: &Recipe) -> bool {
    recipe.train.optimizer.max_grad_norm == 0.0 && recipe.model.compute != ComputeDtype::F16
}

/// Returns the format in which weights of this data type are stored.
fn weight_storage(dtype: WeightDtype) -> WeightStorage {
    match dtype {
        WeightDtype::F32 => WeightStorage::F32,
        WeightDtype::F16 | WeightDtype::Bf16 => WeightStorage::Half,
        WeightDtype::Packed | WeightDtype::Nf4 => WeightStorage::Quantized,
    }
}

/// Refuses a run that does not fit into the memory that the recipe allows, or that this machine has available for a
/// rank. The memory of a GPU is not checked.
///
/// # Errors
/// One line with what is needed, what there is, and what would fit.
pub(super) fn check(sizes: &RunSizes, recipe: &Recipe, device: &Device) -> Result<()> {
    if !["cpu", "tch"].contains(&device.to_string().as_str()) {
        return Ok(());
    }
    let available_bytes = match recipe.train.eval_save.memory_gib {
        Some(0.0) => return Ok(()),
        Some(gib) => (gib * GIB) as u64 / local_world_size(),
        None => match available_memory() {
            Some(bytes) => bytes,
            None => return Ok(()),
        },
    };
    let needed = sizes.peak_bytes(recipe);
    if needed <= available_bytes {
        return Ok(());
    }
    let fits: Vec<String> = alternatives(sizes, recipe)
        .into_iter()
        .filter(|alternative| alternative.bytes <= available_bytes)
        .map(|Alternative { change, bytes }| format!("{change} ({:.2} GiB)", bytes as f64 / GIB))
        .collect();
    let advice = if fits.is_empty() {
        "no setting is enough; take a smaller model, or more ranks on more machines".to_owned()
    } else {
        format!("it would fit with {}", fits.join(", or "))
    };
    bail!(
        "the run needs about {:.2} GiB of memory for each rank and has {:.2} GiB: {advice}; `train.memory_gib` \
         sets the memory of a machine, 0 turns this check off",
        needed as f64 / GIB,
        available_bytes as f64 / GIB
    )
}

/// A recipe, and the sizes of its run.
#[derive(Clone)]
struct Candidate {
    recipe: Recipe,
    sizes: RunSizes,
}

impl Candidate {
    fn total_bytes(&self) -> u64 {
        self.sizes.peak_bytes(&self.recipe)
    }
}

/// A change to the recipe, and the bytes that a rank needs after it.
struct Alternative {
    change: String,
    bytes: u64,
}

/// Returns changes to the recipe that need less memory, each alone and all together.
fn alternatives(sizes: &RunSizes, recipe: &Recipe) -> Vec<Alternative> {
    let before = Candidate { recipe: recipe.clone(), sizes: sizes.clone() };
    let (mut all, mut together) = (Vec::new(), before.clone());
    offer_changes(sizes, recipe, |name, change| {
        let mut alone = before.clone();
        change(&mut alone);
        change(&mut together);
        all.push(Alternative { change: name.to_owned(), bytes: alone.total_bytes() });
    });
    if all.len() > 1 {
        let changes: Vec<&str> = all.iter().map(|alternative| alternative.change.as_str()).collect();
        let change = format!("all of these: {}", changes.join(", "));
        all.push(Alternative { change, bytes: together.total_bytes() });
    }
    all
}

/// Calls `offer` with the name and the effect of every change that can need less memory.
fn offer_changes(sizes: &RunSizes, recipe: &Recipe, mut offer: impl FnMut(&str, &dyn Fn(&mut Candidate))) {
    let steps = &recipe.train.steps;
    if steps.activation_checkpointing != Checkpointing::Full && sizes.tokens > 0 {
        offer("train.activation_checkpointing = \"full\"", &|run| {
            run.recipe.train.steps.activation_checkpointing = Checkpointing::Full;
        });
    }
    // More micro-batches may keep more activations in a pipeline.
    if steps.batch_size > 1 && sizes.tokens > 0 && sizes.stages.is_none() {
        let (rows, batch) = (steps.batch_size * steps.gradient_accumulation, steps.batch_size as u64);
        offer(&format!("train.batch_size = 1 with gradient_accumulation = {rows}"), &|run| {
            run.sizes.tokens = run.sizes.tokens.div_ceil(batch);
        });
    }
    if sizes.world > 1 && sizes.stages.is_none() && recipe.parallel.sharding.zero_stage < ZeroStage::Weights {
        offer("parallel.zero_stage = 3", &|run| run.recipe.parallel.sharding.zero_stage = ZeroStage::Weights);
    }
    if recipe.parallel.offload.offload_optimizer != OffloadDevice::Nvme && sizes.trained > 0 {
        offer("parallel.offload_optimizer = \"nvme\"", &|run| {
            run.recipe.parallel.offload.offload_optimizer = OffloadDevice::Nvme;
        });
    }
    if recipe.method.common.kind == MethodKind::Full {
        offer("method.kind = \"lora\"", &|run| {
            run.recipe.method.common.kind = MethodKind::Lora;
            // A recipe that is invalid with LoRA is refused when it is run.
            let shape = &run.sizes.shape;
            run.sizes.trained = footprint::count_lora_params(shape, &lora_config(&run.recipe)).unwrap_or(0);
        });
    }
}

fn local_world_size() -> u64 {
    process::local_world_size() as u64
}

/// Returns the memory that a rank may have in total: what it holds, and an equal share of what the machine or container
/// has available.
fn available_memory() -> Option<u64> {
    let free = read_proc_kib("/proc/meminfo", "MemAvailable:")? * 1024;
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let group = number("/sys/fs/cgroup/memory.max").zip(number("/sys/fs/cgroup/memory.current"));
    let free = group.map_or(free, |(most, now)| free.min(most.saturating_sub(now)));
    Some(free / local_world_size() + rss_anon_bytes())
}

/// Returns the anonymous resident memory of this process in bytes, without pages of files; 0 if the system does not
/// report it.
pub(crate) fn rss_anon_bytes() -> u64 {
    read_proc_kib("/proc/self/status", "RssAnon:").unwrap_or(0) * 1024
}

/// Returns the peak resident memory of this process in bytes, pages of files included; 0 if the system does not report
/// it.
pub(crate) fn peak_rss_bytes() -> u64 {
    read_proc_kib("/proc/self/status", "VmHWM:").unwrap_or(0) * 1024
}

fn read_proc_kib(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn recipe(sets: &[&str]) -> Recipe {
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        Recipe::parse("[model]\npath = 'm'\n[data]\ntrain = 't'\n", Path::new("r.toml"), &sets).unwrap()
    }

    /// Returns the sizes of a run with a model of a billion weights and 4096 tokens per micro-batch.
    fn load(trained: u64, world: u64) -> RunSizes {
        let shape = LlamaShape {
            layers: 16,
            hidden: 2048,
            intermediate: 8192,
            heads: 32,
            kv_heads: 8,
            head_dim: 64,
            vocabulary: 128_256,
        };
        RunSizes { shape, parameters: shape.parameters(true), trained, tokens: 4096, world, stages: None }
    }

    fn refusal(load: &RunSizes, recipe: &Recipe) -> String {
        check(load, recipe, &Device::default()).unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_fit_is_refused_with_what_would() {
        let full = load(load(0, 1).parameters, 1);
        let found = refusal(&full, &recipe(&["method.kind=full", "train.memory_gib=16"]));
        assert!(found.contains("has 16.00 GiB") && found.contains("method.kind = \"lora\""), "{found}");
        assert!(!found.contains("zero_stage"), "there is one rank: {found}");
        assert!(found.contains("parallel.offload_optimizer = \"nvme\""), "{found}");
        let none = refusal(&full, &recipe(&["method.kind=full", "train.memory_gib=1"]));
        assert!(none.contains("no setting is enough"), "{none}");
        let ranks = RunSizes { world: 4, ..full.clone() };
        let found = refusal(&ranks, &recipe(&["method.kind=full", "train.memory_gib=14"]));
        assert!(found.contains("parallel.zero_stage = 3"), "{found}");
        for sets in [&["method.kind=full", "train.memory_gib=0"][..], &["method.kind=full", "train.memory_gib=64"]] {
            check(&full, &recipe(sets), &Device::default()).unwrap();
        }
        check(&load(1 << 20, 1), &recipe(&["train.memory_gib=16"]), &Device::default()).unwrap();
    }

    #[test]
    fn stage_3_divides_no_blocks() {
        let load = load(1 << 20, 4);
        let frozen = |dtype: &str, stage: u8| {
            load.footprint(&recipe(&[&format!("model.dtype={dtype}"), &format!("parallel.zero_stage={stage}")]))
                .peak_memory()
                .frozen
        };
        assert_eq!(frozen("f32", 3), frozen("f32", 2).div_ceil(4));
        assert_eq!(frozen("packed", 3), frozen("packed", 2));
    }

    #[test]
    fn less_is_needed_where_less_is_kept() {
        let load = load(load(0, 1).parameters, 4);
        let total = |sets: &[&str]| load.footprint(&recipe(&[&["method.kind=full"], sets].concat())).peak_bytes();
        let stages = [0, 1, 2, 3].map(|stage| total(&[&format!("parallel.zero_stage={stage}")]));
        assert!(stages.windows(2).all(|pair| pair[1] < pair[0]), "{stages:?}");
        let files = ["parallel.offload_optimizer=nvme", "parallel.nvme_path=f"];
        assert!(total(&files) + 8 * load.trained - (1 << 20) < total(&[]), "moments are in a file");
        assert!(total(&["train.activation_checkpointing=full"]) < total(&[]));
        let every = |k: u64| total(&[&format!("train.activation_checkpointing={k}")]);
        let full = total(&["train.activation_checkpointing=full"]);
        assert!(full <= every(1) && every(1) < every(2) && every(2) < every(3) && every(3) < total(&[]));
        let unclipped = |more: &[&str]| total(&[&["train.max_grad_norm=0"], more].concat());
        let head = 4 * load.shape.vocabulary * load.shape.hidden;
        assert_eq!(unclipped(&[]) + 4 * load.trained - head, total(&[]), "gradients pass, the head's last");
        assert_eq!(unclipped(&["model.compute=f16"]), total(&[]), "a step may be skipped");
        let micros = ["train.gradient_accumulation=2"];
        assert_eq!(unclipped(&micros), total(&micros), "sums wait for the last micro-batch");
    }
}
