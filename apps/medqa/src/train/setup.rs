//! From the recipe's values to what a run is made of.

use super::freeze::freeze;
use crate::{
    data::{Encoded, Schema, encode, read},
    model::{self, Loaded},
    recipe::{Checkpointing as Recompute, Data, Dtype, MethodKind, Recipe, Scheduler, TargetModules as Targets},
};
use anyhow::{Context, Result};
use burn::tensor::DType;
use burn_llama::{Example, Llama, kernel::Kernels};
use burn_peft::{LoraConfig, TargetModules, adapter, param};
use burn_zero::{
    optimizer::AdamW,
    schedule::{Kind, Schedule},
    segment::Checkpointing,
};
use std::path::Path;

/// The name of the adapter that is trained, as PEFT has it.
pub const ADAPTER: &str = "default";

/// Puts the method onto the model and freezes the rest.
pub fn adapt<B: Kernels>(mut model: Llama<B>, recipe: &Recipe) -> Result<(Llama<B>, Option<LoraConfig>)> {
    match recipe.method.kind {
        MethodKind::Full => return Ok((model, None)),
        MethodKind::Freeze => {
            return Ok((freeze(model, &recipe.method.layers.clone().unwrap_or_default())?, None));
        }
        MethodKind::Lora => {}
    }
    let config = match &recipe.method.init {
        Some(directory) => {
            let (config, unknown) = adapter::load(&mut model, ADAPTER, Path::new(directory))?;
            model::warn_unknown(Path::new(directory), &unknown);
            config
        }
        None => {
            let config = lora(recipe);
            adapter::attach(&mut model, ADAPTER, &config, recipe.train.steps.seed)?;
            config
        }
    };
    Ok((param::train_only(model, adapter::is_adapter), Some(config)))
}

pub fn stored(dtype: Dtype) -> DType {
    match dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::Bf16 => DType::BF16,
    }
}

pub fn optimizer(recipe: &Recipe) -> AdamW {
    let optimizer = &recipe.train.optimizer;
    AdamW { betas: optimizer.betas.into(), epsilon: optimizer.epsilon, weight_decay: optimizer.weight_decay }
}

pub fn checkpointing(recipe: &Recipe) -> Checkpointing {
    match recipe.train.steps.activation_checkpointing {
        Recompute::None => Checkpointing::None,
        Recompute::Full => Checkpointing::Full,
        Recompute::Every(k) => Checkpointing::Every(k),
    }
}

fn lora(recipe: &Recipe) -> LoraConfig {
    let method = &recipe.method;
    LoraConfig {
        r: method.r,
        lora_alpha: method.alpha,
        lora_dropout: method.dropout,
        use_rslora: method.use_rslora,
        target_modules: match &method.target_modules {
            Targets::Names(names) => TargetModules::Suffixes(names.clone()),
            Targets::Pattern(pattern) => TargetModules::Pattern(pattern.clone()),
        },
        base_model_name_or_path: Some(recipe.model.path.clone()),
    }
}

/// The examples of a file.
pub fn rows<B: Kernels>(loaded: &Loaded<B>, data: &Data, path: &str, schema: &Schema) -> Result<Vec<Example>> {
    let rows = read(Path::new(path), schema)?;
    let encoded = encode(&loaded.tokenizer, &rows, data.max_length, data.on_too_long);
    let encoded = encoded.with_context(|| path.to_owned())?;
    report(path, &encoded);
    loaded.model.accepts(&encoded.examples).with_context(|| path.to_owned())?;
    Ok(encoded.examples)
}

fn report(path: &str, encoded: &Encoded) {
    let Encoded { examples, truncated, dropped, without_target } = encoded;
    eprintln!(
        "{}: {} rows, {truncated} truncated, {dropped} dropped as too long, {without_target} without a token to learn",
        path,
        examples.len()
    );
}

/// The learning rate over `total` steps.
pub fn schedule(recipe: &Recipe, total: usize) -> Schedule {
    let train = &recipe.train;
    let kind = match train.schedule.scheduler {
        Scheduler::Constant => Kind::Constant,
        Scheduler::Linear => Kind::Linear,
        Scheduler::Cosine => Kind::Cosine,
        Scheduler::WarmupLR => Kind::WarmupLr,
        Scheduler::WarmupDecayLR => Kind::WarmupDecayLr,
        Scheduler::WarmupCosineLR => Kind::WarmupCosineLr,
    };
    let peak = train.optimizer.learning_rate.unwrap_or_default();
    Schedule { kind, peak, warmup: train.schedule.warmup.steps(total), total }
}
