//! From the recipe's values to what a run is made of.

use super::freeze::freeze;
use crate::{
    adapter::{self, Adapter},
    data::{Encoded, Schema, encode, read},
    fetch,
    model::Loaded,
    recipe::{self, Checkpointing as Recompute, Compute, Data, MethodKind, OptimizerKind, Place, Recipe, Scheduler},
};
use anyhow::{Context, Result, bail};
use burn::backend::Autodiff;
use burn_llama::{Checkpoint, Example, Llama, Tokenizer, kernel::Kernels};
use burn_peft::{adapter::Rounding, config::InitLora, param};
use burn_zero::{
    Engine, Sharding, Tier,
    comm::Communicator,
    optimizer::{AdamW, Groups, Lamb, Lion, Optimizer, Sgd},
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
            let adapter = adapter::load(&mut model, adapter::NAME, directory)?;
            let fits = match &adapter {
                Adapter::Lora(config, _) if config.use_dora => choice.kind == MethodKind::Dora,
                Adapter::Lora(..) => matches!(choice.kind, MethodKind::Lora | MethodKind::QLora),
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

/// The start of a new adapter that takes more than the model: the weights before they were rounded, of which a few at a time are
/// read from the model's files. A run that goes on has its adapter.
pub fn start<B: Kernels>(model: &mut Llama<B>, recipe: &Recipe) -> Result<Option<Rounding>> {
    let (choice, lora) = (&recipe.method.choice, &recipe.method.lora);
    if lora.init_lora_weights != InitLora::Loftq || choice.init.is_some() {
        return Ok(None);
    }
    let checkpoint = Checkpoint::open(&fetch::resolve(&recipe.model.path)?)?;
    let original = |path: &str| checkpoint.weight(path);
    Ok(Some(burn_peft::adapter::replace_lora_weights_loftq(model, adapter::NAME, &original)?))
}

fn optimizer(recipe: &Recipe) -> Optimizer {
    let settings = &recipe.train.optimizer;
    let (betas, epsilon, weight_decay) = (settings.betas.into(), settings.epsilon, settings.weight_decay);
    let adam = AdamW { betas, epsilon, weight_decay };
    match settings.optimizer {
        OptimizerKind::AdamW => Optimizer::AdamW(adam),
        OptimizerKind::Adam => Optimizer::Adam(adam),
        OptimizerKind::AdamW8bit => Optimizer::AdamW8bit(adam),
        OptimizerKind::Lamb => Optimizer::Lamb(Lamb { betas, epsilon, weight_decay, ..Lamb::default() }),
        OptimizerKind::Lion => Optimizer::Lion(Lion { betas, weight_decay }),
        OptimizerKind::Sgd => Optimizer::Sgd(Sgd { momentum: betas.0, weight_decay, nesterov: false }),
    }
}

/// What takes a run's steps, as one of its ranks.
pub fn engine<B: Kernels>(recipe: &Recipe, communicator: Box<dyn Communicator>) -> Result<Engine<Autodiff<B>>> {
    let clip = Some(recipe.train.optimizer.max_grad_norm).filter(|&norm| norm > 0.0);
    let engine = Engine::new(optimizer(recipe), clip, checkpointing(recipe)).with_groups(groups(recipe));
    let engine = engine.in_world(communicator, sharding(recipe)).with_overlap(recipe.parallel.division.overlap);
    let engine = match recipe.model.compute {
        Compute::F16 => engine.with_loss_scaler(recipe::loss_scaler(recipe.train.schedule.fp16.as_ref())?),
        Compute::F32 | Compute::Bf16 => engine,
    };
    let offload = &recipe.parallel.offload;
    Ok(engine.with_weights_in(place(recipe, offload.offload_param)).with_states_in(&tier(recipe))?)
}

/// Which parameters learn how fast and decay.
fn groups(recipe: &Recipe) -> Groups {
    let optimizer = &recipe.train.optimizer;
    let mut groups = optimizer.loraplus_lr_ratio.map(Groups::lora_plus).unwrap_or_default();
    if let (Some(table), Some(all)) = (optimizer.loraplus_lr_embedding, optimizer.learning_rate) {
        groups.scales.push(("embed_tokens".to_owned(), table / all));
    }
    groups
}

/// What is divided among ranks.
fn sharding(recipe: &Recipe) -> Sharding {
    let recipe::Division { zero_stage: stage, bucket_size, .. } = recipe.parallel.division;
    Sharding { stage, bucket_size }
}

/// Where optimizer states are.
fn tier(recipe: &Recipe) -> Tier {
    match place(recipe, recipe.parallel.offload.offload_optimizer) {
        // 8-bit states are always the host's.
        Tier::Device if recipe.train.optimizer.optimizer == OptimizerKind::AdamW8bit => Tier::Host,
        tier => tier,
    }
}

fn place(recipe: &Recipe, place: Place) -> Tier {
    match (place, &recipe.parallel.offload.nvme_path) {
        (Place::Nvme, Some(folder)) => Tier::File(folder.into()),
        (Place::None, _) => Tier::Device,
        _ => Tier::Host,
    }
}

fn checkpointing(recipe: &Recipe) -> Checkpointing {
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

/// The learning rate of a step, counted from 0, of `total`.
///
/// # Errors
/// If DeepSpeed's scheduler cannot be in a run of so many steps.
pub fn learning_rate(recipe: &Recipe, step: usize, total: usize) -> Result<f64> {
    let train = &recipe.train;
    let (peak, warmup) = (train.optimizer.learning_rate.unwrap_or_default(), train.schedule.warmup.steps(total));
    if let Some(block) = &train.schedule.deepspeed_scheduler {
        let schedule = recipe::deepspeed_schedule(block, peak, (warmup, total));
        return Ok(schedule.context("`train.deepspeed_scheduler`")?.in_run(step as u64));
    }
    let kind = match train.schedule.scheduler {
        Scheduler::Constant => Kind::Constant,
        Scheduler::Linear => Kind::Linear,
        Scheduler::Cosine => Kind::Cosine,
        Scheduler::WarmupLR => Kind::WarmupLr,
        Scheduler::WarmupDecayLR => Kind::WarmupDecayLr,
        Scheduler::WarmupCosineLR => Kind::WarmupCosineLr,
    };
    Ok(Schedule { kind, peak, warmup, total }.at(step))
}
