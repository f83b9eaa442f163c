//! Tests of the blocks for precision, ZeRO, optimizer and scheduler.

use super::*;
use crate::{
    Sharding,
    optimizer::{AdamW, Lamb, Optimizer, Sgd},
    precision::DynamicScale,
};

#[test]
fn one_precision_is_on() {
    let scale = |text: &str| with_batch(text).unwrap().precision.loss_scaler().unwrap().scale();
    assert_eq!(scale("{}"), 1.0);
    assert_eq!(scale(r#"{"bf16": {"enabled": true}}"#), 1.0);
    assert_eq!(scale(r#"{"fp16": {"enabled": false, "loss_scale": 8}}"#), 1.0);
    assert_eq!(scale(r#"{"fp16": {"enabled": true}}"#), 65536.0);
    assert_eq!(scale(r#"{"fp16": {"enabled": true, "loss_scale": 128, "initial_scale_power": 3}}"#), 128.0);
    let text = r#"{"fp16": {"enabled": true, "loss_scale": 0, "initial_scale_power": 8, "loss_scale_window": 2,
        "hysteresis": 1, "consecutive_hysteresis": true, "min_loss_scale": 0.25}}"#;
    let dynamic = DynamicScale {
        initial_scale_power: 8,
        loss_scale_window: 2,
        hysteresis: 1,
        consecutive_hysteresis: true,
        min_loss_scale: 0.25,
        stop_at_minimum: true,
    };
    assert_eq!(with_batch(text).unwrap().precision, Precision::F16 { loss_scale: 0.0, dynamic });
}

#[test]
fn impossible_precisions_are_refused() {
    let table = [
        (r#"{"fp16": {"enabled": true}, "bf16": {"enabled": true}}"#, "`bf16.enabled`: expected false, because fp16"),
        (
            r#"{"fp16": {"enabled": true, "loss_scale": true}}"#,
            "`fp16.loss_scale`: expected a finite number, 0 or above",
        ),
        (r#"{"fp16": {"enabled": true, "loss_scale": -1}}"#, "`fp16.loss_scale`: expected a finite number, 0 or above"),
        (
            r#"{"fp16": {"enabled": true, "min_loss_scale": 0}}"#,
            "`fp16.min_loss_scale`: expected a finite number above 0",
        ),
        (r#"{"fp16": {"loss_scale_window": 0}}"#, "`fp16.loss_scale_window`: expected a whole number, 1 or above"),
        (
            r#"{"fp16": {"initial_scale_power": 200}}"#,
            "`fp16.initial_scale_power`: expected a whole number from 0 to 127",
        ),
    ];
    for (text, expected) in table {
        let found = message(with_batch(text));
        assert!(found.starts_with(expected), "{found}");
    }
}

#[test]
fn offload_needs_its_stage_and_files_a_folder() {
    let zero = |block: &str| with_batch(&format!(r#"{{"zero_optimization": {{{block}}}}}"#));
    let optimizer = r#""offload_optimizer": {"device": "cpu"}"#;
    let params = r#""offload_param": {"device": "cpu"}"#;
    for stage in 1..4 {
        assert_eq!(
            zero(&format!("\"stage\": {stage}, {optimizer}")).unwrap().zero.offload_optimizer.device,
            OffloadDevice::Cpu
        );
    }
    assert_eq!(zero(&format!("\"stage\": 3, {params}")).unwrap().zero.offload_param.device, OffloadDevice::Cpu);
    assert!(zero(r#""stage": 0, "offload_optimizer": {"device": "none"}, "offload_param": null"#).is_ok());
    let table = [
        (
            optimizer.to_owned(),
            "`zero_optimization.offload_optimizer.device`: expected none, or stage 1, 2 or 3, found cpu with stage 0",
        ),
        (
            format!("\"stage\": 2, {params}"),
            "`zero_optimization.offload_param.device`: expected none, or stage 3, found cpu with stage 2",
        ),
        (
            r#""stage": 3, "offload_param": {"device": "nvme"}"#.to_owned(),
            "`zero_optimization.offload_param.nvme_path`: expected a folder, because device is nvme, found nothing",
        ),
    ];
    for (block, expected) in table {
        assert_eq!(message(zero(&block)), expected);
    }
}

#[test]
fn communication_overlaps_by_default_in_stage_3() {
    for (stage, expected) in [(0, false), (1, false), (2, false), (3, true)] {
        let config = with_batch(&format!(r#"{{"zero_optimization": {{"stage": {stage}}}}}"#)).unwrap();
        assert_eq!(config.zero.overlap_comm, expected, "stage {stage}");
        assert_eq!(u8::from(config.zero.stage), stage);
    }
}

#[test]
fn optimizers_have_deepspeeds_types_and_defaults() {
    let adam = AdamParams { lr: 1e-3, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0 };
    let lamb =
        LambParams { lr: 1e-3, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0, max_coeff: 10.0, min_coeff: 0.01 };
    let table = [
        (r#""AdamW""#, "{}", OptimizerConfig::AdamW(adam)),
        (r#""adam""#, "{}", OptimizerConfig::AdamW(adam)),
        (r#""Adam""#, r#"{"adam_w_mode": true}"#, OptimizerConfig::AdamW(adam)),
        (r#""Adam""#, r#"{"adam_w_mode": false}"#, OptimizerConfig::Adam(adam)),
        (r#""AdamW""#, r#"{"adam_w_mode": false}"#, OptimizerConfig::AdamW(adam)),
        // The default weight decay of torch's AdamW is 0.01.
        (r#""AdamW""#, r#"{"torch_adam": true}"#, OptimizerConfig::AdamW(AdamParams { weight_decay: 0.01, ..adam })),
        (r#""AdamW""#, r#"{"torch_adam": true, "weight_decay": 0}"#, OptimizerConfig::AdamW(adam)),
        (r#""Adam""#, r#"{"torch_adam": true, "adam_w_mode": false}"#, OptimizerConfig::Adam(adam)),
        (r#""Lamb""#, "{}", OptimizerConfig::Lamb(lamb)),
        (r#""lion""#, "{}", OptimizerConfig::Lion(LionParams { lr: 1e-3, betas: (0.9, 0.999), weight_decay: 0.0 })),
        (
            r#""sgd""#,
            r#"{"lr": 0.1, "momentum": 0.9}"#,
            OptimizerConfig::Sgd(SgdParams { lr: 0.1, momentum: 0.9, weight_decay: 0.0, nesterov: false }),
        ),
    ];
    for (name, params, expected) in table {
        let text = format!(r#"{{"optimizer": {{"type": {name}, "params": {params}}}}}"#);
        assert_eq!(with_batch(&text).unwrap().optimizer, Some(expected), "{text}");
    }
}

#[test]
fn optimizers_that_are_not_here_are_refused_with_a_way_out() {
    let of = |name: &str| message(with_batch(&format!(r#"{{"optimizer": {{"type": {name}}}}}"#)));
    for name in ["OneBitAdam", "zerooneadam", "OneBitLamb", "MuAdam", "Adagrad", "Muon"] {
        let found = of(&format!("\"{name}\""));
        assert!(found.starts_with("`optimizer.type`: ") && found.contains("is not supported, because"), "{found}");
        assert!(found.contains("; write "), "{found}");
    }
    let found = of(r#""AdamX""#);
    assert!(found.contains("expected Adam, AdamW, Lamb, Lion, SGD (did you mean Adam?), found AdamX"), "{found}");
    assert_eq!(of("3"), "`optimizer.type`: expected Adam, AdamW, Lamb, Lion, SGD, found 3");
    let missing = message(with_batch(r#"{"optimizer": {"params": {}}}"#));
    assert_eq!(missing, "`optimizer.type`: expected Adam, AdamW, Lamb, Lion, SGD, found null");
}

fn check(text: &str, values: &[(u64, f64)]) {
    let schedule = with_batch(text).unwrap().lr_schedule().unwrap();
    for (step, expected) in values {
        let found = schedule.at(*step);
        assert!((found - expected).abs() < 5e-9, "{text} at {step}: expected {expected}, found {found}");
    }
}

/// Compares the schedules of ds_config files with DeepSpeed's golden values.
#[test]
fn schedulers_of_a_file_have_deepspeeds_values() {
    let of = |name: &str, params: &str| {
        let optimizer = r#""optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}"#;
        format!(r#"{{{optimizer}, "scheduler": {{"type": "{name}", "params": {{{params}}}}}}}"#)
    };
    let log = [(0, 0.0), (1, 0.30103e-3), (4, 0.69897e-3), (9, 1e-3), (10, 1e-3), (50, 1e-3)];
    check(&of("WarmupLR", r#""warmup_num_steps": 10"#), &log);
    let linear = [(0, 0.0), (1, 1e-4), (5, 5e-4), (9, 9e-4), (10, 1e-3)];
    check(&of("WarmupLR", r#""warmup_num_steps": 10, "warmup_type": "linear", "warmup_max_lr": 1e-3"#), &linear);
    let decay = [(9, 1e-3), (10, 1e-3), (60, 5e-4), (109, 1e-5), (110, 0.0), (200, 0.0)];
    check(&of("WarmupDecayLR", r#""warmup_num_steps": 10, "total_num_steps": 110"#), &decay);
    let cosine = [(0, 0.0), (9, 1e-3), (59, 5.0005e-4), (108, 3.47e-7), (109, 1e-7), (200, 1e-7)];
    check(&of("WarmupCosineLR", r#""warmup_num_steps": 10, "total_num_steps": 110"#), &cosine);
    let cycle = r#""cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 4, "decay_step_size": 10,
        "decay_lr_rate": 1, "cycle_momentum": false"#;
    check(&of("OneCycle", cycle), &[(3, 0.5), (5, 0.3), (7, 0.1), (17, 0.05)]);
    let test = r#""lr_range_test_step_size": 4, "lr_range_test_step_rate": 2"#;
    check(&of("LRRangeTest", test), &[(0, 1.5e-3), (3, 3e-3)]);
    // The defaults: a warm-up of a thousand steps to the optimizer's learning rate, or to 1e-3 without an optimizer.
    check(r#"{"scheduler": {"type": "WarmupLR"}}"#, &[(0, 0.0), (999, 1e-3), (1000, 1e-3)]);
}

#[test]
fn schedulers_that_cannot_be_are_refused() {
    let of = |name: &str, params: &str| {
        message(with_batch(&format!(r#"{{"scheduler": {{"type": "{name}", "params": {{{params}}}}}}}"#)))
    };
    let missing = of("WarmupDecayLR", "");
    let expected =
        "`scheduler.params.total_num_steps`: expected a whole number, 1 or above, or \"auto\", found nothing";
    assert_eq!(missing, expected);
    assert!(of("OneCycle", r#""cycle_min_lr": 1"#).starts_with("`scheduler.params.cycle_max_lr`: "));
    let steps = of("WarmupLR", r#""warmup_num_steps": 0"#);
    assert_eq!(steps, "`scheduler.params.warmup_num_steps`: expected a whole number, 1 or above, found 0");
    let form = of("WarmupLR", r#""warmup_type": "cosine""#);
    assert_eq!(form, r#"`scheduler.params.warmup_type`: expected log, linear, found "cosine""#);
    let other = of("WarmupLR", r#""total_num_steps": 3"#);
    assert!(other.contains("is not a key of `scheduler.params`; did you mean `scheduler.params."), "{other}");
    assert!(of("warmuplr", "").contains("(did you mean WarmupLR?), found warmuplr"));
}

#[test]
fn one_cycle_says_that_it_leaves_the_momentum_alone() {
    let of = |momentum: &str| {
        let params = format!(r#"{{"cycle_min_lr": 0.1, "cycle_max_lr": 0.5{momentum}}}"#);
        with_batch(&format!(r#"{{"scheduler": {{"type": "OneCycle", "params": {params}}}}}"#)).unwrap()
    };
    assert_eq!(keys(&of("")), ["scheduler.params.cycle_momentum"]);
    assert_eq!(keys(&of(r#", "cycle_momentum": true"#)), ["scheduler.params.cycle_momentum"]);
    assert_eq!(keys(&of(r#", "cycle_momentum": false"#)), [""; 0]);
}

#[test]
fn a_ds_config_s_optimizer_is_taken_over() {
    let adam = AdamParams { lr: 1.0, betas: (0.8, 0.9), eps: 1e-7, weight_decay: 0.3 };
    let expected = AdamW { betas: (0.8, 0.9), epsilon: 1e-7, weight_decay: 0.3 };
    assert_eq!(Optimizer::from(OptimizerConfig::AdamW(adam)), Optimizer::AdamW(expected));
    assert_eq!(Optimizer::from(OptimizerConfig::Adam(adam)), Optimizer::Adam(expected));
    let lion = Optimizer::from(OptimizerConfig::Lion(LionParams::default()));
    assert_eq!(lion.slot_names(), ["exp_avg"]);
    assert_eq!(Optimizer::from(OptimizerConfig::Lamb(LambParams::default())), Optimizer::Lamb(Lamb::default()));
    assert_eq!(Optimizer::from(OptimizerConfig::Sgd(SgdParams::default())), Optimizer::Sgd(Sgd::default()));
}

#[test]
fn deepspeed_s_settings_are_taken_over() {
    let zero = ZeroConfig { stage: ZeroStage::Gradients, reduce_bucket_size: 1000, ..ZeroConfig::default() };
    assert_eq!(Sharding::from(&zero), Sharding { stage: ZeroStage::Gradients, bucket_size: 1000 });
}
