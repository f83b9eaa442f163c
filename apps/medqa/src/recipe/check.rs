//! Validates a recipe: refuses values that cannot be run, by key.

use std::collections::BTreeSet;

use super::{
    AdapterTargets, DataConfig, EvalSaveConfig, LrScheduleConfig, MethodConfig, MethodKind, OptimizerConfig,
    ParallelConfig, Partition, Recipe, StepsConfig, TargetModules, ValidationRows, VirtualTokens, WeightDtype,
    check_adalora, deepspeed_schedule,
    invalid_value::{InvalidValue, ensure, ensure_given, ensure_positive},
    loss_scaler,
};
use burn_llama::ChatTemplate;
use burn_peft::config::InitLoraWeights;
use burn_zero::{
    OffloadDevice, ZeroStage,
    pipeline::{PipelineError, PipelineShape},
};

/// Checks all values of `recipe`; the error is the first invalid one.
pub(super) fn check(recipe: &Recipe) -> Result<(), InvalidValue> {
    ensure_given(
        "model.path",
        &recipe.model.path,
        "a model: a directory, a .gguf file, a hub id or `smollm2-135m-instruct`",
    )?;
    if let Some(file) = &recipe.model.chat_template {
        ensure_given("model.chat_template", file, "the file of a chat template")?;
    }
    data(&recipe.data)?;
    method(&recipe.method, recipe.model.dtype)?;
    loftq(recipe)?;
    check_adalora::check(recipe)?;
    steps(&recipe.train.steps)?;
    optimizer(&recipe.train.optimizer)?;
    schedule(&recipe.train.schedule)?;
    saving(&recipe.train.eval_save, recipe.data.valid.is_some())?;
    parallel(&recipe.parallel)?;
    pipeline(recipe)
}

fn data(data: &DataConfig) -> Result<(), InvalidValue> {
    if data.train.is_empty() {
        return Err(("data.train", "expected a file to train on, found none".to_string()));
    }
    data.schema(None).check().map_err(|problem| ("data.columns", problem))?;
    for source in &data.train {
        ensure_given("data.train", &source.path, "a file's path")?;
        // The order of an epoch is held in memory, so a weight has an upper limit too.
        let weight_fits = source.weight > 0.0 && source.weight <= 1000.0;
        let expected = format!("a weight above 0 and at most 1000 for {}", source.path);
        ensure("data.train", weight_fits, &expected, source.weight)?;
        let named = |problem| ("data.train", format!("columns for {}: {problem}", source.path));
        data.schema(Some(source)).check().map_err(named)?;
    }
    if let Some(token) = &data.end_token {
        ensure_given("data.end_token", token, "a token of the vocabulary")?;
    }
    let taken = data.template_arguments.keys().find(|name| ChatTemplate::VARIABLES.contains(&name.as_str()));
    if let Some(name) = taken {
        let problem = format!("expected other names than {}, found {name}", ChatTemplate::VARIABLES.join(", "));
        return Err(("data.template_arguments", problem));
    }
    match &data.valid {
        Some(ValidationRows::Path(path)) => ensure_given("data.valid", path, "a file's path, or a share such as 0.05")?,
        Some(ValidationRows::Share(share)) => {
            let possible = *share > 0.0 && *share <= 0.5;
            ensure("data.valid", possible, "a file's path, or a share above 0 and at most 0.5", share)?;
        }
        None => {}
    }
    if let Some(limit) = data.valid_limit {
        ensure("data.valid_limit", limit > 0, "at least 1 row", limit)?;
        ensure("data.valid_limit", data.valid.is_some(), "`data.valid` to be given too", "no `data.valid`")?;
    }
    let shuffled = data.shuffle || !data.group_by_length;
    ensure("data.group_by_length", shuffled, "`data.shuffle` to be true too", "false")?;
    ensure("data.max_length", data.max_length >= 2, "at least 2 tokens: one to see, one to predict", data.max_length)
}

fn method(method: &MethodConfig, dtype: Option<WeightDtype>) -> Result<(), InvalidValue> {
    let MethodConfig { common, lora, targets, virtual_tokens: tokens, .. } = method;
    if lora.r == 0 {
        // PEFT's own message.
        let problem = format!("`r` should be a positive integer value but the value passed is {}", lora.r);
        return Err(("method.r", problem));
    }
    ensure("method.alpha", lora.alpha > 0.0 && lora.alpha.is_finite(), "a number above 0", lora.alpha)?;
    ensure("method.dropout", (0.0..1.0).contains(&common.dropout), "a probability in [0, 1)", common.dropout)?;
    let found = serde_json::to_string(&common.kind).unwrap_or_default();
    let found = found.trim_matches('"');
    adapter_targets(targets, common.kind, found)?;
    if let Some(init) = &common.init {
        ensure_given("method.init", init, "an adapter's directory")?;
        let adapter = !matches!(common.kind, MethodKind::Full | MethodKind::Freeze);
        ensure("method.init", adapter, "`method.kind` to be that of an adapter", found)?;
    }
    if let Some(layers) = &common.layers {
        ensure("method.layers", common.kind == MethodKind::Freeze, "`method.kind` to be \"freeze\"", found)?;
        let expected = "the last n blocks as n, or the first n as -n";
        ensure("method.layers", layers.count != 0, expected, layers.count)?;
    }
    let packed = dtype.is_none_or(WeightDtype::is_packed) || common.kind != MethodKind::QLora;
    ensure("model.dtype", packed, "\"packed\" or \"nf4\" with qlora", "floats; remove it, or take lora")?;
    let learns = !matches!(common.kind, MethodKind::Full | MethodKind::Freeze);
    let floats = !dtype.is_some_and(WeightDtype::is_packed) || learns;
    ensure("model.dtype", floats, "f32, f16 or bf16, because quantized weights cannot be trained", "quantized blocks")?;
    virtual_tokens(tokens, common.kind, found)
}

fn adapter_targets(targets: &AdapterTargets, kind: MethodKind, found: &str) -> Result<(), InvalidValue> {
    for (key, modules) in [
        ("method.target_modules", &targets.target_modules),
        ("method.exclude_modules", &targets.exclude_modules),
        ("method.feedforward_modules", &targets.feedforward_modules),
    ] {
        let names = match modules {
            Some(TargetModules::Names(names)) => names.as_slice(),
            Some(TargetModules::Pattern(pattern)) => std::slice::from_ref(pattern),
            None => continue,
        };
        let named = !names.is_empty() && names.iter().all(|name| !name.trim().is_empty());
        ensure(key, named, "at least one module's name, and none empty", format!("{names:?}"))?;
    }
    let factors = targets.feedforward_modules.is_none() || kind == MethodKind::Ia3;
    ensure("method.feedforward_modules", factors, "`method.kind` to be \"ia3\"", found)?;
    if let (Some(TargetModules::Names(all)), Some(TargetModules::Names(some))) =
        (&targets.target_modules, &targets.feedforward_modules)
    {
        let within_all = some.iter().all(|name| all.contains(name));
        ensure("method.feedforward_modules", within_all, "some of `method.target_modules`", format!("{some:?}"))?;
    }
    let new = &targets.new_tokens;
    ensure("method.new_tokens", new.is_empty() || kind.is_lora(), "`method.kind` to be lora, qlora or dora", found)?;
    let distinct: BTreeSet<&String> = new.iter().filter(|token| !token.trim().is_empty()).collect();
    ensure("method.new_tokens", distinct.len() == new.len(), "different tokens, and none empty", format!("{new:?}"))?;
    let blocks = targets.layers_pattern.is_none() || targets.layers_to_transform.is_some();
    ensure("method.layers_pattern", blocks, "`method.layers_to_transform` to be given too", "none")
}

/// Checks LoftQ's keys. LoftQ starts from the quantization error, so the weights have to be quantized here.
fn loftq(recipe: &Recipe) -> Result<(), InvalidValue> {
    let MethodConfig { common: choice, lora, .. } = &recipe.method;
    if lora.init_lora_weights != InitLoraWeights::Loftq {
        let found = serde_json::to_string(&lora.init_lora_weights).unwrap_or_default();
        let expected = "`method.init_lora_weights` to be \"loftq\"";
        return ensure("method.loftq_iter", lora.loftq_iter.is_none(), expected, found);
    }
    let rounds = choice.kind == MethodKind::QLora;
    let expected =
        "`method.kind = \"qlora\"` with `model.dtype = \"nf4\"` for \"loftq\", which needs the quantization error";
    ensure("method.init_lora_weights", rounds, expected, serde_json::to_string(&choice.kind).unwrap_or_default())?;
    let nf4 = recipe.model.dtype.map_or(!recipe.is_gguf(), |dtype| dtype == WeightDtype::Nf4);
    let expected = "\"nf4\" with `method.init_lora_weights = \"loftq\"`";
    let found = "\"packed\": the weights that a file's own blocks were quantized from are not known";
    ensure("model.dtype", nf4, expected, found)?;
    let expected = "1: with more, the base would no longer be nf4 of the model's weights, and the adapter would fit no \
                    other copy of it (take `method.kind = \"lora\"` on the base and the adapter that PEFT's \
                    quantize_save_load.py writes)";
    let iterations = lora.loftq_iter.unwrap_or(1);
    ensure("method.loftq_iter", iterations == 1, expected, iterations)
}

fn virtual_tokens(tokens: &VirtualTokens, kind: MethodKind, found: &str) -> Result<(), InvalidValue> {
    ensure_positive("method.num_virtual_tokens", Some(tokens.num_virtual_tokens))?;
    ensure_positive("method.encoder_hidden_size", tokens.encoder_hidden_size)?;
    let of = |key, set: bool, kinds: &[MethodKind], words: &str| {
        ensure(key, !set || kinds.contains(&kind), &format!("`method.kind` to be {words}"), found)
    };
    let (prefix, prompt, encoded) = (MethodKind::PTuningV2, MethodKind::Prompt, MethodKind::PTuning);
    of("method.prefix_projection", tokens.prefix_projection, &[prefix], "\"p-tuning-v2\"")?;
    let words = "\"p-tuning-v2\" or \"p-tuning\"";
    of("method.encoder_hidden_size", tokens.encoder_hidden_size.is_some(), &[prefix, encoded], words)?;
    let words = "\"p-tuning-v2\" or \"prompt\"";
    of("method.init_text", tokens.init_text.is_some(), &[prefix, prompt], words)?;
    of("method.init_from_vocabulary", tokens.init_from_vocabulary, &[prompt], "\"prompt\"")?;
    of("method.init_weights", tokens.init_weights.is_some(), &[prefix], "\"p-tuning-v2\"")?;
    if let Some(weights) = &tokens.init_weights {
        ensure("method.init_weights", weights == "zero", "\"zero\", or nothing for random numbers", weights)?;
        ensure("method.init_weights", tokens.init_text.is_none(), "no `method.init_text` beside it", "it")?;
    }
    if let Some(text) = &tokens.init_text {
        ensure_given("method.init_text", text, "a text")?;
        let expected = "no `method.prefix_projection`, whose MLP has no inverse";
        ensure("method.init_text", !tokens.prefix_projection, expected, "it")?;
        ensure("method.init_text", !tokens.init_from_vocabulary, "no `method.init_from_vocabulary` beside it", "it")?;
    }
    Ok(())
}

fn steps(steps: &StepsConfig) -> Result<(), InvalidValue> {
    ensure_positive("train.batch_size", Some(steps.batch_size))?;
    ensure_positive("train.gradient_accumulation", Some(steps.gradient_accumulation))?;
    ensure_positive("train.max_steps", steps.max_steps)?;
    if let Some(epochs) = steps.epochs {
        ensure("train.epochs", epochs > 0.0 && epochs.is_finite(), "a number above 0", epochs)?;
        if let Some(max_steps) = steps.max_steps {
            let found = format!("epochs = {epochs} and max_steps = {max_steps}; remove one");
            ensure("train.max_steps", false, "either `train.epochs` or `train.max_steps`", found)?;
        }
    }
    Ok(())
}

fn optimizer(optimizer: &OptimizerConfig) -> Result<(), InvalidValue> {
    let above = |key, value: f64| ensure(key, value > 0.0 && value.is_finite(), "a number above 0", value);
    let not_below = |key, value: f64| ensure(key, value >= 0.0 && value.is_finite(), "a number, 0 or more", value);
    if let Some(learning_rate) = optimizer.learning_rate {
        above("train.learning_rate", learning_rate)?;
    }
    not_below("train.weight_decay", optimizer.weight_decay)?;
    let decays = optimizer.betas.iter().all(|beta| (0.0..1.0).contains(beta));
    ensure("train.betas", decays, "two numbers in [0, 1)", format!("{:?}", optimizer.betas))?;
    if let Some(ratio) = optimizer.loraplus_lr_ratio {
        above("train.loraplus_lr_ratio", ratio)?;
    }
    if let Some(rate) = optimizer.loraplus_lr_embedding {
        above("train.loraplus_lr_embedding", rate)?;
        let plus = optimizer.loraplus_lr_ratio.is_some();
        ensure("train.loraplus_lr_embedding", plus, "`train.loraplus_lr_ratio` to be given too", "none")?;
    }
    above("train.epsilon", optimizer.epsilon)?;
    not_below("train.max_grad_norm", optimizer.max_grad_norm)
}

fn saving(saving: &EvalSaveConfig, validates: bool) -> Result<(), InvalidValue> {
    ensure_positive("train.eval_every", saving.eval_every)?;
    ensure_positive("train.early_stopping", saving.early_stopping)?;
    let possible = saving.eval_every.is_some() || saving.early_stopping.is_none();
    ensure("train.early_stopping", possible, "`train.eval_every` to be given too", "no `train.eval_every`")?;
    ensure_positive("train.save_every", saving.save_every)?;
    ensure_positive("train.keep", Some(saving.keep))?;
    if let Some(gib) = saving.memory_gib {
        ensure("train.memory_gib", gib >= 0.0 && gib.is_finite(), "a number, 0 or more", gib)?;
    }
    let possible = validates || saving.eval_every.is_none();
    ensure("train.eval_every", possible, "`data.valid` to be given too", "no `data.valid`")?;
    let possible = validates || saving.keep_best.is_none();
    ensure("train.keep_best", possible, "`data.valid` to be given too", "no `data.valid`")?;
    let possible = validates || saving.eval_device.is_none();
    ensure("train.eval_device", possible, "`data.valid` to be given too", "no `data.valid`")
}

fn schedule(schedule: &LrScheduleConfig) -> Result<(), InvalidValue> {
    if let Some(block) = &schedule.fp16 {
        loss_scaler(Some(block)).map_err(|error| ("train.fp16", error.to_string()))?;
    }
    let Some(block) = &schedule.deepspeed_scheduler else { return Ok(()) };
    deepspeed_schedule(block, 1.0, 1, 1).map(drop).map_err(|error| ("train.deepspeed_scheduler", error.to_string()))
}

fn parallel(parallel: &ParallelConfig) -> Result<(), InvalidValue> {
    ensure_positive("parallel.bucket_size", Some(parallel.sharding.bucket_size))?;
    let offload = &parallel.offload;
    let nvme = [offload.offload_optimizer, offload.offload_param].contains(&OffloadDevice::Nvme);
    let expected = "a folder with `offload_optimizer = \"nvme\"` or `offload_param = \"nvme\"`, and only then";
    let found = offload.nvme_path.as_deref().unwrap_or("none");
    ensure("parallel.nvme_path", nvme == offload.nvme_path.is_some(), expected, found)?;
    let divided = parallel.sharding.zero_stage == ZeroStage::Weights || offload.offload_param == OffloadDevice::None;
    let found = format!("zero_stage = {}", u8::from(parallel.sharding.zero_stage));
    ensure("parallel.offload_param", divided, "\"none\", or `zero_stage = 3`", found)
}

/// Checks the keys of a pipeline, except those that depend on the number of ranks and on the model.
fn pipeline(recipe: &Recipe) -> Result<(), InvalidValue> {
    let pipeline = &recipe.parallel.pipeline;
    let (ranks, chunks) = (pipeline.pipeline, pipeline.chunks());
    ensure_positive("parallel.pipeline", Some(ranks))?;
    ensure_positive("parallel.data", pipeline.data)?;
    ensure_positive("parallel.chunks", Some(chunks))?;
    if let Partition::Explicit(sizes) = &pipeline.partition {
        let fits = sizes.len() == ranks * chunks && !sizes.contains(&0);
        let expected = format!("a number above 0 for each of the {ranks} · {chunks} stages");
        ensure("parallel.partition", fits, &expected, format!("{sizes:?}"))?;
    }
    if ranks == 1 {
        return Ok(());
    }
    let shape = PipelineShape::new(ranks, chunks, recipe.train.steps.gradient_accumulation);
    let shape = shape.map(|shape| shape.with_placement(pipeline.schedule.placement()));
    match shape.and_then(|shape| pipeline.schedule.check(shape)) {
        Err(PipelineError::Setting { field: "micro_batches", expected, found }) => {
            return Err(("train.gradient_accumulation", format!("expected {expected}, found {found}")));
        }
        Err(PipelineError::Setting { expected, found, .. }) => {
            return Err(("parallel.chunks", format!("expected {expected}, found {found}")));
        }
        Err(other) => return Err(("parallel.schedule", other.to_string())),
        Ok(()) => {}
    }
    let whole = recipe.parallel.sharding.zero_stage < ZeroStage::Weights;
    let expected = "0, 1 or 2 with a pipeline: its micro-batches in flight would keep the gathered weights of stage 3";
    ensure("parallel.zero_stage", whole, expected, 3)?;
    let here = recipe.train.eval_save.eval_device.is_none();
    ensure("train.eval_device", here, "none with a pipeline, where no rank has the whole model", "a device")?;
    pipeline_start(&recipe.method)
}

/// Refuses initial values of adapters that a rank of a pipeline cannot compute from its own stage.
fn pipeline_start(method: &MethodConfig) -> Result<(), InvalidValue> {
    let expected = "another start with a pipeline, where no rank has the whole model: make the adapter with one process \
                    and `train.max_steps = 1`, and name it in `method.init`";
    let MethodConfig { lora, virtual_tokens, .. } = method;
    ensure("method.init_text", virtual_tokens.init_text.is_none(), expected, "a text")?;
    let start = &lora.init_lora_weights;
    let own = !matches!(start, InitLoraWeights::Pissa { .. } | InitLoraWeights::Olora | InitLoraWeights::Loftq);
    ensure("method.init_lora_weights", own, expected, serde_json::to_string(start).unwrap_or_default())
}
