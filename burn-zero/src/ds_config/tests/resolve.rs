//! Tests of `"auto"`, defaults, round trips, deprecated keys and files.

use super::*;

/// A typical file of a run that the Trainer of Hugging Face starts: stage 3 with everything offloaded.
const AUTO: &str = r#"{
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 12},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "adamw", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupDecayLR", "params": {
        "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": true},
        "offload_param": {"device": "cpu", "pin_memory": true},
        "contiguous_gradients": true,
        "sub_group_size": 1e8,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 2e9,
        "round_robin_gradients": "auto"
    },
    "steps_per_print": 50
}"#;

fn values() -> AutoValues {
    AutoValues {
        micro_batch: 4,
        accumulation: 8,
        gradient_clipping: 0.5,
        pipeline_stages: 1,
        adam: AdamParams { lr: 2e-4, betas: (0.8, 0.95), eps: 1e-6, weight_decay: 0.1 },
        warmup_steps: 10,
        total_steps: 110,
        precision: AutoPrecision::Bf16,
        hidden_size: Some(1000),
    }
}

#[test]
fn auto_stands_for_the_callers_values() {
    let document = RawDsConfig::from_hjson(AUTO).unwrap();
    assert_eq!(document.auto_keys().len(), 18);
    assert_eq!(document.auto_keys()[0], "train_batch_size");
    let config = document.resolve(2, &values()).unwrap();
    assert_eq!(config.batch, BatchSizes { train: 64, micro: 4, accumulation: 8 });
    assert_eq!(config.gradient_clipping, 0.5);
    assert_eq!(config.precision, Precision::Bf16);
    assert_eq!(config.optimizer, Some(OptimizerConfig::AdamW(values().adam)));
    let schedule = config.lr_schedule().unwrap();
    assert_eq!((schedule.at(0), schedule.at(10), schedule.at(60), schedule.at(110)), (0.0, 2e-4, 1e-4, 0.0));
    assert_eq!(config.steps_per_print, Some(50));
    let cpu = OffloadConfig { device: OffloadDevice::Cpu, nvme_path: None };
    let expected = ZeroConfig {
        stage: ZeroStage::Weights,
        offload_optimizer: cpu.clone(),
        offload_param: cpu,
        reduce_bucket_size: 1_000_000,
        overlap_comm: true,
        stage3: ZeroStage3Config {
            sub_group_size: 100_000_000,
            max_live_parameters: 2_000_000_000,
            prefetch_bucket_size: 900_000,
            param_persistence_threshold: 10_000,
            ..ZeroStage3Config::default()
        },
        ..ZeroConfig::default()
    };
    assert_eq!(config.zero, expected);
    let pinned = ["zero_optimization.offload_optimizer.pin_memory", "zero_optimization.offload_param.pin_memory"];
    assert_eq!(keys(&config), pinned);
}

#[test]
fn the_train_batch_follows_from_what_the_file_says() {
    let table = [
        (r#"{"train_batch_size": "auto"}"#, [64, 4, 8]),
        (r#"{"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 3}"#, [48, 3, 8]),
        (r#"{"train_batch_size": "auto", "gradient_accumulation_steps": 2}"#, [16, 4, 2]),
        (r#"{"train_batch_size": 24, "train_micro_batch_size_per_gpu": "auto"}"#, [24, 4, 3]),
        (r#"{"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 1}"#, [8, 4, 1]),
    ];
    for (text, expected) in table {
        let batch = RawDsConfig::from_hjson(text).unwrap().resolve(2, &values()).unwrap().batch;
        assert_eq!([batch.train, batch.micro, batch.accumulation], expected, "{text}");
    }
    let text =
        r#"{"train_batch_size": 24, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}"#;
    let found = message(RawDsConfig::from_hjson(text).unwrap().resolve(2, &values()));
    assert!(found.ends_with("24 != 4 * 8 * 2"), "{found}");
}

#[test]
fn auto_where_nobody_knows_better_is_an_error() {
    let table = [
        (r#"{"zero_optimization": {"reduce_bucket_size": "auto"}}"#, "`zero_optimization.reduce_bucket_size`"),
        (r#"{"zero_optimization": {"stage": "auto"}}"#, "`zero_optimization.stage`"),
        (
            r#"{"scheduler": {"type": "OneCycle", "params": {"cycle_max_lr": "auto"}}}"#,
            "`scheduler.params.cycle_max_lr`",
        ),
    ];
    for (text, key) in table {
        let found = message(with_batch(text));
        assert!(found.starts_with(key) && found.contains("\"auto\", which has no value for this key"), "{found}");
    }
}

#[test]
fn what_is_not_said_has_deepspeeds_value() {
    let config = with_batch("{}").unwrap();
    let expected = DsConfig {
        batch: BatchSizes { train: 2, micro: 1, accumulation: 1 },
        zero: ZeroConfig {
            stage: ZeroStage::Disabled,
            offload_optimizer: OffloadConfig { device: OffloadDevice::None, nvme_path: None },
            offload_param: OffloadConfig { device: OffloadDevice::None, nvme_path: None },
            reduce_bucket_size: 500_000_000,
            allgather_bucket_size: 500_000_000,
            overlap_comm: false,
            contiguous_gradients: true,
            stage3: ZeroStage3Config {
                sub_group_size: 1_000_000_000,
                max_live_parameters: 1_000_000_000,
                max_reuse_distance: 1_000_000_000,
                prefetch_bucket_size: 50_000_000,
                param_persistence_threshold: 100_000,
                model_persistence_threshold: 9_223_372_036_854_775_807,
                gather_16bit_weights_on_model_save: false,
            },
        },
        precision: Precision::F32,
        gradient_clipping: 1.0,
        optimizer: None,
        scheduler: None,
        steps_per_print: None,
        unhonoured: Vec::new(),
    };
    assert_eq!(config, expected);
}

#[test]
fn a_configuration_written_and_read_is_the_same() {
    let blocks = [
        r#""optimizer": {"type": "Adam", "params": {"adam_w_mode": false, "betas": [0.8, 0.9], "weight_decay": 3e-7}}"#,
        r#""optimizer": {"type": "Adam"}, "fp16": {"enabled": true, "hysteresis": 3, "min_loss_scale": 0.25}"#,
        r#""optimizer": {"type": "Lamb", "params": {"max_coeff": 0.3}}, "bf16": {"enabled": true}"#,
        r#""optimizer": {"type": "Lion", "params": {"lr": 1e-5}}, "fp16": {"enabled": true, "loss_scale": 128}"#,
        r#""optimizer": {"type": "SGD", "params": {"momentum": 0.9, "nesterov": true}}, "gradient_clipping": 0"#,
        r#""scheduler": {"type": "WarmupLR"}, "zero_optimization": {"stage": 1, "overlap_comm": true}"#,
        r#""scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_type": "linear"}}"#,
        r#""scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 10, "warmup_min_lr": 1e-7}}"#,
        r#""scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 10, "warmup_min_ratio": 0.1}}"#,
        r#""scheduler": {"type": "LRRangeTest", "params": {"lr_range_test_staircase": true}}"#,
        r#""zero_optimization": {"stage": 3, "overlap_comm": false, "stage3_max_reuse_distance": 5,
            "offload_optimizer": {"device": "nvme", "nvme_path": "/scratch"}, "offload_param": {"device": "cpu"}}"#,
    ];
    for block in blocks {
        let config = with_batch(&format!("{{{block}}}")).unwrap();
        assert!(config.unhonoured.is_empty(), "{block}");
        let written = config.to_json();
        let again = resolve(&written.to_string()).unwrap();
        assert_eq!(again, config, "{written}");
        assert_eq!(again.to_json(), written);
    }
    let cycle = r#"{"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.3,
        "cycle_second_step_size": 7, "cycle_momentum": false}}}"#;
    let config = with_batch(cycle).unwrap();
    assert_eq!(resolve(&config.to_json().to_string()).unwrap().scheduler, config.scheduler);
}

#[test]
fn old_spellings_are_read_as_the_new_ones() {
    let table = [
        (r#"{"bfloat16": {"enabled": true}}"#, r#"{"bf16": {"enabled": true}}"#),
        (r#"{"zero_optimization": true}"#, r#"{"zero_optimization": {"stage": 1}}"#),
        (r#"{"zero_optimization": false}"#, r#"{"zero_optimization": {"stage": 0}}"#),
        (
            r#"{"zero_optimization": {"stage": 3, "cpu_offload": true, "cpu_offload_param": true}}"#,
            r#"{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}"#,
        ),
        (r#"{"zero_optimization": {"stage": 2, "cpu_offload": false}}"#, r#"{"zero_optimization": {"stage": 2}}"#),
        (
            r#"{"zero_optimization": {"stage3_gather_fp16_weights_on_model_save": true, "max_live_parameters": 7}}"#,
            r#"{"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": true, "stage3_max_live_parameters": 7}}"#,
        ),
    ];
    for (old, new) in table {
        assert_eq!(with_batch(old).unwrap(), with_batch(new).unwrap(), "{old}");
    }
    let both = r#"{"bfloat16": {"enabled": true}, "bf16": {"enabled": false}}"#;
    assert_eq!(message(with_batch(both)), "`bfloat16`: expected only its new spelling `bf16`, found both");
    let wrong = r#"{"zero_optimization": {"cpu_offload": "cpu"}}"#;
    assert_eq!(message(with_batch(wrong)), r#"`zero_optimization.cpu_offload`: expected true or false, found "cpu""#);
}

#[test]
fn batch_sizes_of_a_file_are_completed_or_refused() {
    assert_eq!(
        resolve(r#"{"train_batch_size": 16}"#).unwrap().batch,
        BatchSizes { train: 16, micro: 8, accumulation: 1 }
    );
    let table = [
        ("{}", "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided"),
        (r#"{"gradient_accumulation_steps": 2}"#, "Either train_batch_size or train_micro_batch_size_per_gpu"),
        (r#"{"train_batch_size": 1}"#, "Micro batch size per gpu: 0 has to be greater than 0"),
        (r#"{"train_batch_size": 16, "train_micro_batch_size_per_gpu": 3}"#, "Check batch related parameters."),
    ];
    for (text, expected) in table {
        let found = message(resolve(text));
        assert!(found.starts_with(expected), "{found}");
    }
}

#[test]
fn what_is_wrong_with_a_file_names_the_file() {
    let folder = std::env::temp_dir().join(format!("burn-zero-ds-config-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("ds_config.json");
    let missing = message(RawDsConfig::read(&file));
    assert!(missing.starts_with(&format!("{}: cannot be read: ", file.display())), "{missing}");
    std::fs::write(&file, "{").unwrap();
    let broken = message(RawDsConfig::read(&file));
    assert!(broken.starts_with(&format!("{}: not readable as Hjson: ", file.display())), "{broken}");
    std::fs::write(&file, AUTO).unwrap();
    assert_eq!(RawDsConfig::read(&file).unwrap(), RawDsConfig::from_hjson(AUTO).unwrap());
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn the_ranks_of_a_pipeline_count_as_one_for_the_batch() {
    let resolve = |stages: &str, auto: u64, world| {
        let text = format!(r#"{{"train_micro_batch_size_per_gpu": 3, "pipeline": {{{stages}}}}}"#);
        let auto = AutoValues { pipeline_stages: auto, ..AutoValues::default() };
        RawDsConfig::from_hjson(&text).unwrap().resolve(world, &auto)
    };
    let train = |stages, auto| resolve(stages, auto, 8).unwrap().batch.train;
    assert_eq!(train(r#""stages": 4"#, 1), 6);
    assert_eq!((train(r#""stages": "auto""#, 2), train("", 2), train("", 1)), (12, 12, 24));
    let expected = "`pipeline.stages`: expected a divisor of the 6 ranks, found 4";
    assert_eq!(message(resolve(r#""stages": 4"#, 1, 6)), expected);
    let read = resolve(r#""partition": "best", "seed_layers": false"#, 1, 1).unwrap();
    assert_eq!(read.unhonoured.iter().map(|it| it.key.as_str()).collect::<Vec<_>>(), ["pipeline.partition"]);
}
