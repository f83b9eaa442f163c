//! Whether a run fits this machine's memory, and what would.

use crate::{
    adapter::lora_config,
    backend::Device,
    estimate, process,
    recipe::{Checkpointing, Compute, Dtype, MethodKind, Place, Recipe},
};
use anyhow::{Result, bail};
use burn_llama::LlamaConfig;
use burn_zero::{
    ds_config::Stage,
    estimate::{Memory, Numbers, Placement, Recompute, Shape, Weights},
};
use std::fs;

const GIB: f64 = (1u64 << 30) as f64;

/// What the memory of a run depends on besides its recipe.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub shape: Shape,
    /// The model's weights, adapters aside.
    pub parameters: u64,
    /// Weights that learn.
    pub trained: u64,
    /// Tokens of the largest micro-batch.
    pub tokens: u64,
    /// Ranks.
    pub world: u64,
}

impl Load {
    /// What is known before anything is loaded: the model's weights alone, and those that learn where all do.
    pub fn least(config: &LlamaConfig, recipe: &Recipe, world: u64) -> Self {
        let shape = estimate::shape(config);
        let parameters = shape.parameters(config.tie_word_embeddings);
        let trained = if recipe.method.choice.kind == MethodKind::Full { parameters } else { 0 };
        Self { shape, parameters, trained, tokens: 0, world }
    }

    /// The bytes of one rank at the run's highest.
    pub fn memory(&self, recipe: &Recipe) -> Memory {
        let full = recipe.method.choice.kind == MethodKind::Full;
        let dtype = recipe.model.dtype.unwrap_or_default();
        let numbers = if full && dtype != Dtype::F32 { Numbers::Mixed } else { Numbers::F32 };
        let frozen = if full {
            0
        } else {
            bytes(dtype, self.parameters.saturating_sub(self.trained * u64::from(self.freezes(recipe))))
        };
        // Blocks are no float parameters: every rank keeps all of them in every stage, on the device.
        let packed = matches!(dtype, Dtype::Packed | Dtype::Nf4);
        let (frozen, blocks) = if packed { (0, frozen) } else { (frozen, 0) };
        let largest_segment_bytes = if packed { 0 } else { bytes(dtype, self.shape.largest_segment()) };
        let bucket = recipe.parallel.division.bucket_size as u64;
        let weights = Weights { trained: self.trained, frozen_bytes: frozen, largest_segment_bytes, bucket };
        let (division, offload) = (&recipe.parallel.division, &recipe.parallel.offload);
        let placement = Placement {
            stage: division.zero_stage,
            world: self.world,
            offload_optimizer: offload.offload_optimizer != Place::None,
            offload_param: offload.offload_param != Place::None,
            // A step of several micro-batches keeps their sums.
            early_updates: updates_early(recipe) && recipe.train.steps.gradient_accumulation == 1,
        };
        let mut memory = estimate::kept(weights, numbers, placement);
        memory.frozen += blocks;
        if offload.offload_optimizer == Place::Nvme {
            memory.host -= estimate::moments(self.trained, placement).min(memory.host);
        }
        if offload.offload_param == Place::Nvme {
            let own = (bytes(dtype, self.trained) + frozen) / self.world;
            memory.host -= own.min(memory.host);
        }
        let recompute = match recipe.train.steps.activation_checkpointing {
            Checkpointing::Full => Recompute::Full,
            _ => Recompute::None,
        };
        memory.activations =
            if self.tokens == 0 { 0 } else { self.kept(recipe).activations(self.tokens, 4, recompute).total() };
        if full {
            memory.activations = estimate::passing(memory.activations, &self.shape, placement);
        }
        memory
    }

    fn freezes(&self, recipe: &Recipe) -> bool {
        recipe.method.choice.kind == MethodKind::Freeze
    }

    /// The part of the model that keeps activations: with `freeze` on the last blocks, those.
    fn kept(&self, recipe: &Recipe) -> Shape {
        let layers = recipe.method.choice.layers.as_ref().filter(|layers| self.freezes(recipe) && layers.count > 0);
        let layers = layers.filter(|layers| layers.extra_modules.is_empty());
        Shape {
            layers: layers.map_or(self.shape.layers, |layers| self.shape.layers.min(layers.count as u64)),
            ..self.shape
        }
    }

    /// The bytes that one rank needs: for training, or for the whole model that it loads first.
    fn total(&self, recipe: &Recipe) -> u64 {
        self.memory(recipe).total().max(bytes(recipe.model.dtype.unwrap_or_default(), self.parameters))
    }
}

/// Whether the engine updates during the backward pass: nothing is clipped, and no overflow may undo the step.
fn updates_early(recipe: &Recipe) -> bool {
    recipe.train.optimizer.max_grad_norm == 0.0 && recipe.model.compute != Compute::F16
}

/// Bytes of so many weights, about for those in blocks.
fn bytes(dtype: Dtype, weights: u64) -> u64 {
    match dtype {
        Dtype::F32 => 4 * weights,
        Dtype::F16 | Dtype::Bf16 => 2 * weights,
        Dtype::Packed | Dtype::Nf4 => weights * 5 / 8,
    }
}

/// Refuses a run that cannot fit the memory that the recipe allows, or this machine has left for a rank. A device with memory of
/// its own is not looked at.
///
/// # Errors
/// One line with what is needed, what there is, and what would fit.
pub fn check(load: &Load, recipe: &Recipe, device: &Device) -> Result<()> {
    if !["cpu", "tch"].contains(&device.to_string().as_str()) {
        return Ok(());
    }
    let there = match recipe.train.saving.memory_gib {
        Some(0.0) => return Ok(()),
        Some(gib) => (gib * GIB) as u64 / ranks_here(),
        None => match available() {
            Some(bytes) => bytes,
            None => return Ok(()),
        },
    };
    let needed = load.total(recipe);
    if needed <= there {
        return Ok(());
    }
    let fits: Vec<String> = alternatives(load, recipe)
        .into_iter()
        .filter(|(_, bytes)| *bytes <= there)
        .map(|(words, bytes)| format!("{words} ({:.2} GiB)", bytes as f64 / GIB))
        .collect();
    let advice = if fits.is_empty() {
        "no setting is enough; take a smaller model, or more ranks on more machines".to_owned()
    } else {
        format!("enough would be {}", fits.join(", or "))
    };
    bail!(
        "the run needs about {:.2} GiB of memory for each rank and has {:.2} GiB: {advice}; `train.memory_gib` sets what a \
         machine has, 0 does not ask",
        needed as f64 / GIB,
        there as f64 / GIB
    )
}

/// Ways to need less, each alone and all together, with the bytes of a rank.
fn alternatives(load: &Load, recipe: &Recipe) -> Vec<(String, u64)> {
    let mut all = Vec::new();
    let (mut together, mut words) = ((recipe.clone(), *load), Vec::new());
    let mut offer = |name: &str, change: &dyn Fn(&mut Recipe, &mut Load)| {
        let mut alone = (recipe.clone(), *load);
        change(&mut alone.0, &mut alone.1);
        change(&mut together.0, &mut together.1);
        all.push((name.to_owned(), alone.1.total(&alone.0)));
        words.push(name.to_owned());
    };
    let steps = &recipe.train.steps;
    if steps.activation_checkpointing != Checkpointing::Full && load.tokens > 0 {
        offer("train.activation_checkpointing = \"full\"", &|recipe, _| {
            recipe.train.steps.activation_checkpointing = Checkpointing::Full;
        });
    }
    if steps.batch_size > 1 && load.tokens > 0 {
        let (name, batch) = (
            format!(
                "train.batch_size = 1 with gradient_accumulation = {}",
                steps.batch_size * steps.gradient_accumulation
            ),
            steps.batch_size as u64,
        );
        offer(&name, &|_, load| load.tokens = load.tokens.div_ceil(batch));
    }
    if load.world > 1 && recipe.parallel.division.zero_stage < Stage::Weights {
        offer("parallel.zero_stage = 3", &|recipe, _| recipe.parallel.division.zero_stage = Stage::Weights);
    }
    if recipe.parallel.offload.offload_optimizer != Place::Nvme && load.trained > 0 {
        offer("parallel.offload_optimizer = \"nvme\"", &|recipe, _| {
            recipe.parallel.offload.offload_optimizer = Place::Nvme;
        });
    }
    if recipe.method.choice.kind == MethodKind::Full {
        offer("method.kind = \"lora\"", &|recipe, load| {
            recipe.method.choice.kind = MethodKind::Lora;
            // A recipe that is impossible as LoRA is refused when it is tried.
            load.trained = estimate::adapters(&load.shape, &lora_config(recipe)).unwrap_or(0);
        });
    }
    let bytes = together.1.total(&together.0);
    if words.len() > 1 {
        all.push((format!("all of these: {}", words.join(", ")), bytes));
    }
    all
}

fn ranks_here() -> u64 {
    process::ranks_here() as u64
}

/// What a rank may still take and what it holds: the machine's or the container's memory, shared alike by its ranks.
fn available() -> Option<u64> {
    let free = kibibytes("/proc/meminfo", "MemAvailable:")? * 1024;
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let group = number("/sys/fs/cgroup/memory.max").zip(number("/sys/fs/cgroup/memory.current"));
    let free = group.map_or(free, |(most, now)| free.min(most.saturating_sub(now)));
    Some(free / ranks_here() + held())
}

/// Bytes of memory that this process holds by itself, no pages of files; 0 where the system does not say.
pub fn held() -> u64 {
    kibibytes("/proc/self/status", "RssAnon:").unwrap_or(0) * 1024
}

/// The most bytes of memory that this process has held, pages of files included; 0 where the system does not say.
pub fn most_held() -> u64 {
    kibibytes("/proc/self/status", "VmHWM:").unwrap_or(0) * 1024
}

fn kibibytes(path: &str, name: &str) -> Option<u64> {
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

    /// A model of a billion weights, 4096 tokens at a time.
    fn load(trained: u64, world: u64) -> Load {
        let shape = Shape {
            layers: 16,
            hidden: 2048,
            intermediate: 8192,
            heads: 32,
            kv_heads: 8,
            head_dim: 64,
            vocabulary: 128_256,
        };
        Load { shape, parameters: shape.parameters(true), trained, tokens: 4096, world }
    }

    fn refusal(load: &Load, recipe: &Recipe) -> String {
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
        let ranks = Load { world: 4, ..full };
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
            load.memory(&recipe(&[&format!("model.dtype={dtype}"), &format!("parallel.zero_stage={stage}")])).frozen
        };
        assert_eq!(frozen("f32", 3), frozen("f32", 2).div_ceil(4));
        assert_eq!(frozen("packed", 3), frozen("packed", 2));
    }

    #[test]
    fn less_is_needed_where_less_is_kept() {
        let load = load(load(0, 1).parameters, 4);
        let total = |sets: &[&str]| load.total(&recipe(&[&["method.kind=full"], sets].concat()));
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
