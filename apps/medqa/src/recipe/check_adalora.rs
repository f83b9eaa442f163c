//! Validates AdaLoRA's keys of a recipe.

use super::{
    AdaLoraOptions, LoraOptions, MethodConfig, MethodKind, Recipe,
    invalid_value::{InvalidValue, ensure, ensure_positive},
};
use burn_zero::{OffloadDevice, ZeroStage, optimizer::OptimizerKind};

/// Checks AdaLoRA's keys, and that the others go with them.
pub(super) fn check(recipe: &Recipe) -> Result<(), InvalidValue> {
    let MethodConfig { common, adalora, lora, targets, .. } = &recipe.method;
    if common.kind != MethodKind::AdaLora {
        return only_for_adalora(adalora, common.kind);
    }
    values(adalora)?;
    // A run in epochs learns its number of steps from the data; it is checked then.
    if let Some(steps) = recipe.train.steps.max_steps {
        adalora.check_steps(steps).map_err(|problem| ("method.tinit", problem))?;
    }
    let plain = LoraOptions { alpha: lora.alpha, ..LoraOptions::default() };
    ensure("method.r", lora.r == plain.r, "`method.init_r` instead with adalora", lora.r)?;
    let expected = "the default with adalora, as in PEFT";
    ensure("method.use_rslora", !lora.use_rslora, expected, "true")?;
    ensure("method.init_lora_weights", lora.init_lora_weights == plain.init_lora_weights, expected, "another start")?;
    let expected = "no pattern with adalora, which finds the ranks itself";
    ensure("method.rank_pattern", lora.rank_pattern.is_empty(), expected, "one")?;
    ensure("method.alpha_pattern", lora.alpha_pattern.is_empty(), expected, "one")?;
    ensure("method.new_tokens", targets.new_tokens.is_empty(), "no new tokens with adalora", "some")?;
    ensure("method.init", common.init.is_none(), "none with adalora, which starts a new adapter", "one")?;
    parallel(recipe)
}

/// Checks that a recipe for another method has no key of AdaLoRA, except with its default value.
fn only_for_adalora(adalora: &AdaLoraOptions, kind: MethodKind) -> Result<(), InvalidValue> {
    let AdaLoraOptions { init_r, target_r, tinit, tfinal, delta_t, beta1, beta2, orth_reg_weight } =
        AdaLoraOptions::default();
    let found = serde_json::to_string(&kind).unwrap_or_default();
    for (key, unset) in [
        ("method.init_r", adalora.init_r == init_r),
        ("method.target_r", adalora.target_r == target_r),
        ("method.tinit", adalora.tinit == tinit),
        ("method.tfinal", adalora.tfinal == tfinal),
        ("method.delta_t", adalora.delta_t == delta_t),
        ("method.beta1", adalora.beta1 == beta1),
        ("method.beta2", adalora.beta2 == beta2),
        ("method.orth_reg_weight", adalora.orth_reg_weight == orth_reg_weight),
    ] {
        ensure(key, unset, "`method.kind` to be \"adalora\"", &found)?;
    }
    Ok(())
}

fn values(adalora: &AdaLoraOptions) -> Result<(), InvalidValue> {
    let AdaLoraOptions { init_r, target_r, delta_t, beta1, beta2, orth_reg_weight, .. } = *adalora;
    ensure_positive("method.init_r", Some(init_r))?;
    let fits = (1..=init_r).contains(&target_r);
    ensure("method.target_r", fits, &format!("1 to `method.init_r`, which is {init_r}"), target_r)?;
    ensure_positive("method.delta_t", Some(delta_t))?;
    for (key, beta) in [("method.beta1", beta1), ("method.beta2", beta2)] {
        ensure(key, beta > 0.0 && beta < 1.0, "a number between 0 and 1", beta)?;
    }
    let weight = orth_reg_weight >= 0.0 && orth_reg_weight.is_finite();
    ensure("method.orth_reg_weight", weight, "a number, 0 or more", orth_reg_weight)
}

/// Refuses what keeps gradients or weights away from the process that allocates the ranks.
fn parallel(recipe: &Recipe) -> Result<(), InvalidValue> {
    let parallel = &recipe.parallel;
    let device = recipe.train.optimizer.optimizer != OptimizerKind::AdamW8bit;
    let expected = "another optimizer with adalora, which needs the gradients on the device";
    ensure("train.optimizer", device, expected, "\"adamw8bit\", whose moments are in host memory")?;
    let expected = "1 with adalora, which compares the ranks of all layers in one process";
    ensure("parallel.pipeline", parallel.pipeline.pipeline == 1, expected, parallel.pipeline.pipeline)?;
    let whole = parallel.sharding.zero_stage < ZeroStage::Weights;
    let expected = "at most 2 with adalora, which changes weights between the steps";
    ensure("parallel.zero_stage", whole, expected, 3)?;
    let device = parallel.offload.offload_optimizer == OffloadDevice::None;
    let expected = "\"none\" with adalora, which needs the gradients on the device";
    ensure("parallel.offload_optimizer", device, expected, "another place")
}
