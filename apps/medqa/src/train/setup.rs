//! Builds the parts of a run from a recipe.

use crate::{
    data::{EncodedRows, Row, RowContent, encode_rows, read_rows},
    fetch, identify, method_adapter,
    model::LoadedModel,
    prepare::{Fingerprint, Nearness, SplitPart, SplitShares},
    recipe::{self, ComputeDtype, DataConfig, MethodKind, Recipe, ValidationRows},
    schema::SchemaRequest,
};
use anyhow::{Context, Result, anyhow, bail};
use burn_llama::{Example, Llama, kernel::Kernels};
use burn_peft::{adapter::QuantizationResidual, config::InitLoraWeights};
use burn_zero::{
    EngineConfig, MemoryTier, OffloadDevice, Sharding,
    comm::Communicator,
    lr_schedule::LrSchedule,
    optimizer::{AdamW, NamedLrScale, Optimizer, ParamGroups},
};
use std::path::Path;

/// Returns the recipe with the number of steps of its run, on which the schedule of AdaLoRA depends.
///
/// # Errors
/// If the run has too few steps for that schedule.
pub(super) fn with_max_steps(recipe: &Recipe, steps: usize) -> Result<Recipe> {
    let mut recipe = recipe.clone();
    recipe.train.steps.max_steps = Some(steps);
    if recipe.method.common.kind == MethodKind::AdaLora {
        recipe.method.adalora.check_steps(steps).map_err(|problem| anyhow!("`method.tinit`: {problem}"))?;
    }
    Ok(recipe)
}

/// Initializes new adapters by LoftQ, which needs the weights before quantization; these are read from the model's
/// files, a few at a time. A resumed run has its adapters already.
pub(super) fn init_loftq<B: Kernels>(model: &mut Llama<B>, recipe: &Recipe) -> Result<Option<QuantizationResidual>> {
    let (choice, lora) = (&recipe.method.common, &recipe.method.lora);
    if lora.init_lora_weights != InitLoraWeights::Loftq || choice.init.is_some() {
        return Ok(None);
    }
    let checkpoint = fetch::open_checkpoint(&recipe.model.path)?;
    let original = |path: &str| checkpoint.weight(path);
    Ok(Some(burn_peft::adapter::replace_lora_weights_loftq(model, method_adapter::ADAPTER_NAME, &original)?))
}

fn optimizer(recipe: &Recipe) -> Optimizer {
    let settings = &recipe.train.optimizer;
    let (betas, epsilon, weight_decay) = (settings.betas.into(), settings.epsilon, settings.weight_decay);
    settings.optimizer.with_settings(AdamW { betas, epsilon, weight_decay })
}

/// Returns the settings of the engine that computes the steps of a run on this rank.
pub(crate) fn engine_config(recipe: &Recipe, communicator: Box<dyn Communicator>) -> Result<EngineConfig> {
    let offload = &recipe.parallel.offload;
    let config = EngineConfig::new(optimizer(recipe))
        .with_max_grad_norm(Some(recipe.train.optimizer.max_grad_norm).filter(|&norm| norm > 0.0))
        .with_checkpointing(recipe.train.steps.activation_checkpointing)
        .with_param_groups(param_groups(recipe))
        .with_communicator(communicator)
        .with_sharding(sharding(recipe))
        .with_overlap(recipe.parallel.sharding.overlap)
        .with_weights_in(memory_tier(recipe, offload.offload_param))
        .with_optimizer_states_in(memory_tier(recipe, offload.offload_optimizer));
    Ok(match recipe.model.compute {
        ComputeDtype::F16 => config.with_loss_scaler(recipe::loss_scaler(recipe.train.schedule.fp16.as_ref())?),
        ComputeDtype::F32 | ComputeDtype::Bf16 => config,
    })
}

/// Returns the parameter groups, with the scales of their learning rates.
fn param_groups(recipe: &Recipe) -> ParamGroups {
    let optimizer = &recipe.train.optimizer;
    let mut groups = optimizer.loraplus_lr_ratio.map(ParamGroups::lora_plus).unwrap_or_default();
    if let (Some(table), Some(all)) = (optimizer.loraplus_lr_embedding, optimizer.learning_rate) {
        groups.lr_scales.push(NamedLrScale { name: "embed_tokens".to_owned(), lr_scale: table / all });
    }
    groups
}

/// Returns the sharding among ranks.
fn sharding(recipe: &Recipe) -> Sharding {
    let recipe::ShardingConfig { zero_stage: stage, bucket_size, .. } = recipe.parallel.sharding;
    Sharding { stage, bucket_size }
}

fn memory_tier(recipe: &Recipe, device: OffloadDevice) -> MemoryTier {
    device.tier(recipe.parallel.offload.nvme_path.as_deref().map(Path::new))
}

/// The encoded rows of a run.
pub(super) struct RunRows {
    /// The training rows, by source.
    pub train: Vec<Vec<Example>>,
    /// The validation rows; none if the recipe asks for none.
    pub valid: Vec<Example>,
}

impl RunRows {
    /// Reads and tokenizes all rows. A share for validation is taken from the sources, by groups of near questions.
    pub(super) fn load<B: Kernels>(loaded: &LoadedModel<B>, data: &DataConfig) -> Result<Self> {
        let read = |path: &str, request: &SchemaRequest| read_rows(Path::new(path), request);
        // A file that cannot be read does not hide those behind it.
        let sources = identify::all(data.train.iter().map(|source| read(&source.path, &data.schema(Some(source)))))?;
        let (sources, valid) = match &data.valid {
            None => (sources, Vec::new()),
            Some(ValidationRows::Path(path)) => (sources, read(path, &data.schema(None))?),
            Some(ValidationRows::Share(share)) => take_share(sources, *share)?,
        };
        let named = data.train.iter().map(|source| source.path.as_str()).zip(&sources);
        let train = identify::all(named.map(|(path, rows)| examples(loaded, data, path, rows)))?;
        let path = match &data.valid {
            Some(ValidationRows::Path(path)) => path.as_str(),
            _ => "validation rows",
        };
        let mut valid = if valid.is_empty() { Vec::new() } else { examples(loaded, data, path, &valid)? };
        valid.truncate(data.valid_limit.unwrap_or(usize::MAX));
        Ok(Self { train, valid })
    }
}

/// Takes the share of the rows for validation. Rows that are near to rows of both parts go to neither.
fn take_share(sources: Vec<Vec<Row>>, share: f64) -> Result<(Vec<Vec<Row>>, Vec<Row>)> {
    let nearness = Nearness::questions();
    let fingerprint = |row: &Row| {
        let long = matches!(row.content, RowContent::Text(_));
        Fingerprint::new(&row.content.question(), Nearness { long, ..nearness })
    };
    let all: Vec<Fingerprint> = sources.iter().flatten().map(fingerprint).collect();
    let shares = SplitShares { valid: share, test: 0.0, seed: nearness.seed };
    let mut parts = shares.by_question(&all, nearness).into_iter();
    let (mut train, mut valid, mut between) = (Vec::new(), Vec::new(), 0);
    for source in sources {
        let mut kept = Vec::new();
        for (row, part) in source.into_iter().zip(parts.by_ref()) {
            match part {
                SplitPart::Valid => valid.push(row),
                SplitPart::Between => between += 1,
                SplitPart::Train | SplitPart::Test => kept.push(row),
            }
        }
        train.push(kept);
    }
    let total = all.len();
    if valid.is_empty() || train.iter().any(Vec::is_empty) {
        bail!(
            "`data.valid`: a share of {share} of {total} rows leaves a part without rows; raise it, or name a file with \
             validation rows"
        );
    }
    eprintln!(
        "validation: {} of {total} rows, a share of {share}; {between} are near to rows of both parts and left out",
        valid.len()
    );
    Ok((train, valid))
}

/// Tokenizes the rows of a file.
fn examples<B: Kernels>(loaded: &LoadedModel<B>, data: &DataConfig, path: &str, rows: &[Row]) -> Result<Vec<Example>> {
    let encoded = encode_rows(&loaded.tokenizer, rows, data.into())?;
    encoded.require_examples(data.max_length).with_context(|| path.to_owned())?;
    report_rows(path, &encoded);
    if let Some(problem) = encoded.beyond_positions(loaded.model.config().position_limit()) {
        eprintln!("warning: {path}: {problem}");
    }
    loaded.model.check_examples(&encoded.examples).with_context(|| path.to_owned())?;
    Ok(encoded.examples)
}

fn report_rows(path: &str, encoded: &EncodedRows) {
    let EncodedRows { examples, truncated, dropped, without_target, omitted, empty_thoughts } = encoded;
    eprintln!(
        "{}: {} rows, {truncated} truncated, {dropped} dropped as too long, {without_target} without a token to learn",
        path,
        examples.len()
    );
    if *omitted > 0 {
        eprintln!("{path}: the chat template leaves {omitted} texts of earlier turns out of the prompts");
    }
    if *empty_thoughts > 0 {
        eprintln!(
            "{path}: {empty_thoughts} answers have no thought, but the prompt opens one: an empty one is learned, closed at \
             once, and then the answer"
        );
    }
}

/// Returns the learning rate of a step, counted from 0, in a run of `total` steps.
///
/// # Errors
/// If DeepSpeed's scheduler is not possible in a run of `total` steps.
pub(super) fn learning_rate(recipe: &Recipe, step: usize, total: usize) -> Result<f64> {
    let train = &recipe.train;
    let (peak, warmup) =
        (train.optimizer.learning_rate.unwrap_or_default(), train.schedule.warmup.unwrap_or_default().steps(total));
    if let Some(block) = &train.schedule.deepspeed_scheduler {
        let schedule = recipe::deepspeed_schedule(block, peak, warmup, total);
        return Ok(schedule.context("`train.deepspeed_scheduler`")?.applied_at(step as u64));
    }
    let kind = train.schedule.scheduler;
    Ok(LrSchedule { kind, peak, warmup, total }.at(step))
}
