//! Checks before a run that it fits into this machine's memory, and suggests settings that do.

use crate::{
    backend::Device,
    estimate,
    method_adapter::lora_config,
    process,
    recipe::{ActivationCheckpointing, ComputeDtype, MethodKind, OffloadDevice, Recipe, WeightDtype},
};
use anyhow::{Result, bail};
use burn_llama::LlamaConfig;
use burn_zero::{
    ds_config::ZeroStage,
    estimate::{LlamaShape, MemoryEstimate, ModelSize, Recompute, StatePlacement, TrainingPrecision},
};
use std::fs;

const GIB: f64 = (1u64 << 30) as f64;

/// The sizes that the memory of a run depends on, besides its recipe.
#[derive(Debug, Clone, Copy)]
pub struct RunFootprint {
    pub shape: LlamaShape,
    /// Parameters of the base model, without adapters.
    pub parameters: u64,
    /// Trainable parameters.
    pub trained: u64,
    /// Tokens of the largest micro-batch.
    pub tokens: u64,
    /// The number of ranks.
    pub world: u64,
}

impl RunFootprint {
    /// Returns the lower bound that is known before anything is loaded: the parameters of the base model, all of them
    /// trainable with full fine-tuning, else none.
    pub fn lower_bound(config: &LlamaConfig, recipe: &Recipe, world: u64) -> Self {
        let shape = estimate::model_shape(config);
        let parameters = shape.parameters(config.tie_word_embeddings);
        let trained = if recipe.method.common.kind == MethodKind::Full { parameters } else { 0 };
        Self { shape, parameters, trained, tokens: 0, world }
    }

    /// Returns the peak memory of one rank, in bytes.
    pub fn peak_memory(&self, recipe: &Recipe) -> MemoryEstimate {
        let full = recipe.method.common.kind == MethodKind::Full;
        let dtype = recipe.model.dtype.unwrap_or_default();
        let numbers = if full && dtype != WeightDtype::F32 { TrainingPrecision::Mixed } else { TrainingPrecision::F32 };
        let frozen = if full {
            0
        } else {
            weight_bytes(dtype, self.parameters.saturating_sub(self.trained * u64::from(self.is_freeze(recipe))))
        };
        // Quantized blocks are not float parameters: every rank keeps all of them on the device, in every stage.
        let packed = matches!(dtype, WeightDtype::Packed | WeightDtype::Nf4);
        let (frozen, blocks) = if packed { (0, frozen) } else { (frozen, 0) };
        let largest_segment_bytes = if packed { 0 } else { weight_bytes(dtype, self.shape.largest_segment()) };
        let bucket = recipe.parallel.sharding.bucket_size as u64;
        let weights =
            ModelSize { trained: self.trained, frozen_bytes: frozen, largest_segment_bytes, bucket_size: bucket };
        let (division, offload) = (&recipe.parallel.sharding, &recipe.parallel.offload);
        let placement = StatePlacement {
            stage: division.zero_stage,
            world_size: self.world,
            offload_optimizer: offload.offload_optimizer != OffloadDevice::None,
            offload_param: offload.offload_param != OffloadDevice::None,
            // Gradient accumulation keeps the gradients until the last micro-batch.
            optimizer_in_backward: steps_in_backward(recipe) && recipe.train.steps.gradient_accumulation == 1,
        };
        let mut memory = estimate::model_states_with_f32_gradients(weights, numbers, placement);
        memory.frozen += blocks;
        if offload.offload_optimizer == OffloadDevice::Nvme {
            memory.host -= estimate::moment_bytes(self.trained, placement).min(memory.host);
        }
        if offload.offload_param == OffloadDevice::Nvme {
            let own = (weight_bytes(dtype, self.trained) + frozen) / self.world;
            memory.host -= own.min(memory.host);
        }
        let recompute = match recipe.train.steps.activation_checkpointing {
            ActivationCheckpointing::Full => Recompute::Full,
            _ => Recompute::None,
        };
        memory.activations = if self.tokens == 0 {
            0
        } else {
            self.activation_shape(recipe).activations(self.tokens, 4, recompute).total()
        };
        if full {
            memory.activations = estimate::peak_transient_bytes(memory.activations, &self.shape, placement);
        }
        memory
    }

    fn is_freeze(&self, recipe: &Recipe) -> bool {
        recipe.method.common.kind == MethodKind::Freeze
    }

    /// Returns the shape of the part of the model that keeps activations: only the last blocks if `freeze` trains
    /// these.
    fn activation_shape(&self, recipe: &Recipe) -> LlamaShape {
        let layers = recipe.method.common.layers.as_ref().filter(|layers| self.is_freeze(recipe) && layers.count > 0);
        let layers = layers.filter(|layers| layers.extra_modules.is_empty());
        LlamaShape {
            layers: layers.map_or(self.shape.layers, |layers| self.shape.layers.min(layers.count as u64)),
            ..self.shape
        }
    }

    /// Returns the bytes that one rank needs: for training, or for the whole model, which it loads first, whichever is
    /// more.
    fn total_bytes(&self, recipe: &Recipe) -> u64 {
        self.peak_memory(recipe).total().max(weight_bytes(recipe.model.dtype.unwrap_or_default(), self.parameters))
    }
}

/// Returns whether the optimizer steps during the backward pass: gradients are not clipped, and no overflow can skip
/// the step.
fn steps_in_backward(recipe: &Recipe) -> bool {
    recipe.train.optimizer.max_grad_norm == 0.0 && recipe.model.compute != ComputeDtype::F16
}

/// Returns the bytes of this many weights, approximately for quantized blocks.
fn weight_bytes(dtype: WeightDtype, weights: u64) -> u64 {
    match dtype {
        WeightDtype::F32 => 4 * weights,
        WeightDtype::F16 | WeightDtype::Bf16 => 2 * weights,
        WeightDtype::Packed | WeightDtype::Nf4 => weights * 5 / 8,
    }
}

/// Refuses a run that does not fit into the memory that the recipe allows, or that this machine has available for a
/// rank. The memory of a GPU is not checked.
///
/// # Errors
/// One line with what is needed, what there is, and what would fit.
pub fn check(footprint: &RunFootprint, recipe: &Recipe, device: &Device) -> Result<()> {
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
    let needed = footprint.total_bytes(recipe);
    if needed <= available_bytes {
        return Ok(());
    }
    let fits: Vec<String> = alternatives(footprint, recipe)
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
    footprint: RunFootprint,
}

impl Candidate {
    fn total_bytes(&self) -> u64 {
        self.footprint.total_bytes(&self.recipe)
    }
}

/// A change to the recipe, and the bytes that a rank needs after it.
struct Alternative {
    change: String,
    bytes: u64,
}

/// Returns changes to the recipe that need less memory, each alone and all together.
fn alternatives(footprint: &RunFootprint, recipe: &Recipe) -> Vec<Alternative> {
    let before = Candidate { recipe: recipe.clone(), footprint: *footprint };
    let (mut all, mut together) = (Vec::new(), before.clone());
    let mut offer = |name: &str, change: &dyn Fn(&mut Candidate)| {
        let mut alone = before.clone();
        change(&mut alone);
        change(&mut together);
        all.push(Alternative { change: name.to_owned(), bytes: alone.total_bytes() });
    };
    let steps = &recipe.train.steps;
    if steps.activation_checkpointing != ActivationCheckpointing::Full && footprint.tokens > 0 {
        offer("train.activation_checkpointing = \"full\"", &|run| {
            run.recipe.train.steps.activation_checkpointing = ActivationCheckpointing::Full;
        });
    }
    if steps.batch_size > 1 && footprint.tokens > 0 {
        let (rows, batch) = (steps.batch_size * steps.gradient_accumulation, steps.batch_size as u64);
        offer(&format!("train.batch_size = 1 with gradient_accumulation = {rows}"), &|run| {
            run.footprint.tokens = run.footprint.tokens.div_ceil(batch);
        });
    }
    if footprint.world > 1 && recipe.parallel.sharding.zero_stage < ZeroStage::Weights {
        offer("parallel.zero_stage = 3", &|run| run.recipe.parallel.sharding.zero_stage = ZeroStage::Weights);
    }
    if recipe.parallel.offload.offload_optimizer != OffloadDevice::Nvme && footprint.trained > 0 {
        offer("parallel.offload_optimizer = \"nvme\"", &|run| {
            run.recipe.parallel.offload.offload_optimizer = OffloadDevice::Nvme;
        });
    }
    if recipe.method.common.kind == MethodKind::Full {
        offer("method.kind = \"lora\"", &|run| {
            run.recipe.method.common.kind = MethodKind::Lora;
            // A recipe that is invalid with LoRA is refused when it is run.
            let shape = &run.footprint.shape;
            run.footprint.trained = estimate::count_lora_params(shape, &lora_config(&run.recipe)).unwrap_or(0);
        });
    }
    if all.len() > 1 {
        let changes: Vec<&str> = all.iter().map(|alternative| alternative.change.as_str()).collect();
        let change = format!("all of these: {}", changes.join(", "));
        all.push(Alternative { change, bytes: together.total_bytes() });
    }
    all
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
pub fn rss_anon_bytes() -> u64 {
    read_proc_kib("/proc/self/status", "RssAnon:").unwrap_or(0) * 1024
}

/// Returns the peak resident memory of this process in bytes, pages of files included; 0 if the system does not report
/// it.
pub fn peak_rss_bytes() -> u64 {
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

    /// Returns the footprint of a model of a billion weights with 4096 tokens per micro-batch.
    fn load(trained: u64, world: u64) -> RunFootprint {
        let shape = LlamaShape {
            layers: 16,
            hidden: 2048,
            intermediate: 8192,
            heads: 32,
            kv_heads: 8,
            head_dim: 64,
            vocabulary: 128_256,
        };
        RunFootprint { shape, parameters: shape.parameters(true), trained, tokens: 4096, world }
    }

    fn refusal(load: &RunFootprint, recipe: &Recipe) -> String {
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
        let ranks = RunFootprint { world: 4, ..full };
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
            load.peak_memory(&recipe(&[&format!("model.dtype={dtype}"), &format!("parallel.zero_stage={stage}")]))
                .frozen
        };
        assert_eq!(frozen("f32", 3), frozen("f32", 2).div_ceil(4));
        assert_eq!(frozen("packed", 3), frozen("packed", 2));
    }

    #[test]
    fn less_is_needed_where_less_is_kept() {
        let load = load(load(0, 1).parameters, 4);
        let total = |sets: &[&str]| load.total_bytes(&recipe(&[&["method.kind=full"], sets].concat()));
        let stages = [0, 1, 2, 3].map(|stage| total(&[&format!("parallel.zero_stage={stage}")]));
        assert!(stages.windows(2).all(|pair| pair[1] < pair[0]), "{stages:?}");
        let files = ["parallel.offload_optimizer=nvme", "parallel.nvme_path=f"];
        assert!(total(&files) + 8 * load.trained - (1 << 20) < total(&[]), "moments are in a file");
        assert!(total(&["train.activation_checkpointing=full"]) < total(&[]));
        let unclipped = |more: &[&str]| total(&[&["train.max_grad_norm=0"], more].concat());
        let head = 4 * load.shape.vocabulary * load.shape.hidden;
        assert_eq!(unclipped(&[]) + 4 * load.trained - head, total(&[]), "gradients pass, the head's last");
        assert_eq!(unclipped(&["model.compute=f16"]), total(&[]), "a step may be skipped");
        let micros = ["train.gradient_accumulation=2"];
        assert_eq!(unclipped(&micros), total(&micros), "sums wait for the last micro-batch");
    }
}
