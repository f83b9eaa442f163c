//! From the recipe's values to what a run is made of.

use super::freeze::freeze;
use crate::{
    adapter::{self, Adapter},
    data::{Encoded, Schema, encode, read},
    model::Loaded,
    recipe::{Checkpointing as Recompute, Data, Dtype, MethodKind, Recipe, Scheduler},
};
use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use burn_llama::{Example, Llama, Tokenizer, kernel::Kernels};
use burn_peft::param;
use burn_zero::{
    optimizer::AdamW,
    schedule::{Kind, Schedule},
    segment::Checkpointing,
};
use std::path::Path;

/// Puts the method onto the model and freezes the rest; `None` where the model's own weights learn and nothing else.
pub fn adapt<B: Kernels>(
    mut model: Llama<B>,
    tokenizer: &Tokenizer,
    recipe: &Recipe,
) -> Result<(Llama<B>, Option<Adapter>)> {
    let choice = &recipe.method.choice;
    match choice.kind {
        MethodKind::Full => return Ok((model, None)),
        MethodKind::Freeze => return Ok((freeze(model, &choice.layers.clone().unwrap_or_default())?, None)),
        _ => {}
    }
    let adapter = match choice.init.as_deref().map(Path::new).filter(|init| !init.is_file()) {
        Some(directory) => {
            let adapter = adapter::load(&mut model, directory)?;
            let fits = match &adapter {
                Adapter::Lora(config, _) if config.use_dora => choice.kind == MethodKind::Dora,
                Adapter::Lora(..) => choice.kind == MethodKind::Lora,
                Adapter::Ia3(_) => choice.kind == MethodKind::Ia3,
                Adapter::Prompt => choice.kind.is_prompt(),
            };
            if !fits {
                bail!(
                    "`method.init`: {}: expected an adapter of `method.kind`, found another kind",
                    directory.display()
                );
            }
            adapter
        }
        None => adapter::attach(&mut model, tokenizer, recipe)?,
    };
    let model = match &adapter {
        Adapter::Lora(config, _) => burn_peft::adapter::train_only(model, config)?,
        _ => param::train_only(model, burn_peft::adapter::is_adapter),
    };
    Ok((model, Some(adapter)))
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
