//! Tests of Accelerate's files and FSDP's sharding strategies.

use super::*;

fn parse(text: &str) -> Result<AccelerateConfig, ConfigError> {
    AccelerateConfig::from_yaml(text)
}

fn config(text: &str) -> DsConfig {
    let auto = AutoValues { micro_batch: 2, accumulation: 3, gradient_clipping: 0.7, ..Default::default() };
    match parse(text).unwrap().source {
        DsConfigSource::Inline(document) => document.resolve(4, &auto).unwrap(),
        DsConfigSource::File(file) => panic!("{}", file.display()),
    }
}

#[test]
fn a_deepspeed_block_is_a_ds_config() {
    let text = "
compute_environment: LOCAL_MACHINE
debug: false
deepspeed_config:
  gradient_accumulation_steps: 5
  gradient_clipping: 0.3
  offload_optimizer_device: cpu
  offload_param_device: none
  zero3_init_flag: true
  zero3_save_16bit_model: true
  zero_stage: 3
distributed_type: DEEPSPEED
downcast_bf16: 'no'
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 2
num_processes: 4
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
use_cpu: false
";
    let accelerate = parse(text).unwrap();
    assert_eq!((accelerate.num_processes, accelerate.num_machines), (Some(4), 2));
    assert_eq!(accelerate.activation_checkpointing, None);
    let config = config(text);
    assert_eq!(config.batch, BatchSizes { train: 40, micro: 2, accumulation: 5 });
    assert_eq!(config.gradient_clipping, 0.3);
    assert_eq!(config.precision, Precision::Bf16);
    assert_eq!(config.zero.stage, ZeroStage::Weights);
    assert_eq!(
        (config.zero.offload_optimizer.device, config.zero.offload_param.device),
        (OffloadDevice::Cpu, OffloadDevice::None)
    );
    assert!(config.zero.stage3.gather_16bit_weights_on_model_save);
    let notes: Vec<_> = accelerate.unhonoured.iter().map(|it| it.key.as_str()).collect();
    assert_eq!(notes, ["deepspeed_config.zero3_init_flag"]);
    assert!(config.unhonoured.is_empty());
}

#[test]
fn what_a_deepspeed_block_does_not_say_is_the_callers() {
    for accumulation in ["", "gradient_accumulation_steps: auto", "gradient_clipping: auto"] {
        let config =
            config(&format!("distributed_type: DEEPSPEED\ndeepspeed_config: {{zero_stage: 1, {accumulation}}}"));
        assert_eq!(config.batch, BatchSizes { train: 24, micro: 2, accumulation: 3 });
        assert_eq!(config.gradient_clipping, 0.7);
        assert_eq!(config.zero.stage, ZeroStage::OptimizerStates);
    }
    assert_eq!(config("distributed_type: DEEPSPEED").zero.stage, ZeroStage::Gradients);
    let files = config(
        "distributed_type: DEEPSPEED
deepspeed_config: {zero_stage: 2, offload_optimizer_device: nvme, offload_optimizer_nvme_path: /scratch}",
    );
    assert_eq!(files.zero.offload_optimizer.nvme_path.unwrap().to_str(), Some("/scratch"));
}

#[test]
fn a_deepspeed_file_is_found_beside_the_yaml() {
    let folder = std::env::temp_dir().join(format!("burn-zero-accelerate-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let yaml = folder.join("accelerate.yaml");
    let text = "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: zero-by-test.json}";
    assert_eq!(parse(text).unwrap().source, DsConfigSource::File("zero-by-test.json".into()));
    std::fs::write(&yaml, text).unwrap();
    let missing = message(AccelerateConfig::read(&yaml));
    assert!(missing.contains("zero-by-test.json: cannot be read"), "{missing}");
    let json = r#"{"train_batch_size": 4, "zero_optimization": {"stage": 2}}"#;
    std::fs::write(folder.join("zero-by-test.json"), json).unwrap();
    let read = AccelerateConfig::read(&yaml).unwrap();
    assert_eq!(read.source, DsConfigSource::Inline(RawDsConfig::from_hjson(json).unwrap()));
    std::fs::write(&yaml, "distributed_type: [").unwrap();
    let broken = message(AccelerateConfig::read(&yaml));
    assert!(broken.starts_with(&format!("{}: not readable as YAML: ", yaml.display())), "{broken}");
    std::fs::remove_dir_all(&folder).unwrap();

    let both = format!("{}\n", text.replace("json}", "json, zero_stage: 2}"));
    let expected = "`deepspeed_config.zero_stage`: expected nothing, because zero-by-test.json sets it, found 2";
    assert_eq!(message(parse(&both)), expected);
}

#[test]
fn an_fsdp_block_is_a_stage() {
    // The table: (fsdp_config, stage, offload devices of optimizer and weights).
    let table = [
        ("{}", ZeroStage::Weights, [OffloadDevice::None; 2]),
        ("{fsdp_sharding_strategy: FULL_SHARD}", ZeroStage::Weights, [OffloadDevice::None; 2]),
        ("{fsdp_sharding_strategy: 1, fsdp_offload_params: true}", ZeroStage::Weights, [OffloadDevice::Cpu; 2]),
        ("{fsdp_sharding_strategy: SHARD_GRAD_OP}", ZeroStage::Gradients, [OffloadDevice::None; 2]),
        (
            "{fsdp_sharding_strategy: 2, fsdp_offload_params: true}",
            ZeroStage::Gradients,
            [OffloadDevice::Cpu, OffloadDevice::None],
        ),
        ("{fsdp_sharding_strategy: NO_SHARD}", ZeroStage::Disabled, [OffloadDevice::None; 2]),
        ("{fsdp_version: 2, fsdp_reshard_after_forward: true}", ZeroStage::Weights, [OffloadDevice::None; 2]),
        ("{fsdp_version: 2, fsdp_reshard_after_forward: false}", ZeroStage::Gradients, [OffloadDevice::None; 2]),
        ("{fsdp_reshard_after_forward: SHARD_GRAD_OP}", ZeroStage::Gradients, [OffloadDevice::None; 2]),
        ("{fsdp_reshard_after_forward: 'false'}", ZeroStage::Gradients, [OffloadDevice::None; 2]),
    ];
    for (block, stage, devices) in table {
        let text = format!("distributed_type: FSDP\nmixed_precision: fp16\nfsdp_config: {block}");
        let config = config(&text);
        assert_eq!(config.zero.stage, stage, "{block}");
        assert_eq!([config.zero.offload_optimizer.device, config.zero.offload_param.device], devices, "{block}");
        assert!(matches!(config.precision, Precision::F16 { .. }));
    }
    let text = "distributed_type: FSDP\nfsdp_config: {fsdp_activation_checkpointing: true}";
    let key = "fsdp_config.fsdp_activation_checkpointing";
    assert_eq!(parse(text).unwrap().activation_checkpointing, Some(key));
}

#[test]
fn a_megatron_lm_block_is_a_pipeline() {
    let text = "
distributed_type: MEGATRON_LM
megatron_lm_config:
  megatron_lm_gradient_clipping: 0.5
  megatron_lm_num_micro_batches: 6
  megatron_lm_pp_degree: 2
  megatron_lm_recompute_activations: true
  megatron_lm_sequence_parallelism: false
  megatron_lm_tp_degree: 1
  megatron_lm_use_distributed_optimizer: true
num_processes: 4
";
    let accelerate = parse(text).unwrap();
    let key = "megatron_lm_config.megatron_lm_recompute_activations";
    assert_eq!((accelerate.activation_checkpointing, accelerate.unhonoured), (Some(key), vec![]));
    let DsConfigSource::Inline(document) = accelerate.source else { panic!("the block is in the file") };
    assert_eq!(document.get("pipeline.stages"), Some(&2.into()));
    let read = config(text);
    // Four ranks are two pipelines.
    assert_eq!(read.batch, BatchSizes { train: 24, micro: 2, accumulation: 6 });
    assert_eq!((read.gradient_clipping, read.zero.stage), (0.5, ZeroStage::OptimizerStates));
    let plain = config("distributed_type: MEGATRON_LM");
    assert_eq!((plain.batch.train, plain.zero.stage), (24, ZeroStage::Disabled));
    let part = message(parse("distributed_type: MEGATRON_LM\nmegatron_lm_config: {megatron_lm_tp_degree: 2}"));
    assert_eq!(part, "`megatron_lm_config.megatron_lm_tp_degree`: expected 1, found 2");
}

#[test]
fn fsdp_names_are_read_and_hybrid_ones_refused() {
    assert_eq!(fsdp_stage("full_shard").unwrap(), ZeroStage::Weights);
    for name in ["HYBRID_SHARD", "HYBRID_SHARD_ZERO2", "4"] {
        let found = message(fsdp_stage(name));
        assert!(found.starts_with(&format!("`fsdp_sharding_strategy`: {name} is not supported, because it shards")));
        assert!(found.ends_with("write FULL_SHARD"), "{found}");
    }
    let expected = "`fsdp_sharding_strategy`: expected FULL_SHARD, SHARD_GRAD_OP or NO_SHARD, found SHARD";
    assert_eq!(message(fsdp_stage("SHARD")), expected);
}

#[test]
fn plain_runs_divide_nothing() {
    for text in ["{}", "distributed_type: 'NO'", "distributed_type: MULTI_GPU\nmixed_precision: 'no'"] {
        let config = config(text);
        assert_eq!((config.zero.stage, config.precision), (ZeroStage::Disabled, Precision::F32), "{text}");
    }
}

#[test]
fn a_block_that_nothing_reads_is_noted() {
    let notes = |text: &str| -> Vec<String> { parse(text).unwrap().unhonoured.into_iter().map(|it| it.key).collect() };
    let blocks = "deepspeed_config: {zero_stage: 3}\nfsdp_config: {fsdp_activation_checkpointing: true}";
    assert_eq!(notes(&format!("distributed_type: FSDP\n{blocks}")), ["deepspeed_config"]);
    assert_eq!(notes(&format!("distributed_type: DEEPSPEED\n{blocks}")), ["fsdp_config"]);
    let plain = format!("distributed_type: MULTI_GPU\n{blocks}");
    assert_eq!(notes(&plain), ["deepspeed_config", "fsdp_config"]);
    assert_eq!(parse(&plain).unwrap().activation_checkpointing, None);
    let file = "distributed_type: DEEPSPEED\nmixed_precision: fp16\ndeepspeed_config: {deepspeed_config_file: a.json}";
    assert_eq!(notes(file), ["mixed_precision"]);
}

#[test]
fn what_is_not_here_is_refused() {
    let table = [
        ("distributed_type: TP", "`distributed_type`: TP is not supported, because"),
        ("distributed_type: XLA", "`distributed_type`: XLA is not supported, because"),
        (
            "distributed_type: MULTI",
            "`distributed_type`: expected NO, MULTI_CPU, MULTI_GPU, DEEPSPEED, FSDP or MEGATRON_LM",
        ),
        ("mixed_precision: fp8", "`mixed_precision`: fp8 is not supported, because"),
        ("mixed_precision: f16", "`mixed_precision`: expected no, fp16, bf16, fp8"),
        ("mixed_precision: auto", "`mixed_precision`: expected no, fp16, bf16, fp8, found \"auto\""),
        ("num_process: 2", "`num_process` is not a key of the top level; did you mean `num_processes`?"),
        ("num_processes: two", "`num_processes`: expected a whole number, 1 or above, found \"two\""),
        ("deepspeed_config: {zero_stages: 2}", "`deepspeed_config.zero_stages` is not a key of `deepspeed_config`"),
        ("num_machines: 1\nnum_machines: 2", "not readable as YAML: the key `num_machines` appears twice"),
        ("deepspeed_config: {gradient_clipping: .inf}", "not readable as YAML: "),
        ("- 1", "`the file`: expected keys and values, found [1]"),
    ];
    for (text, expected) in table {
        let found = message(parse(text));
        assert!(found.starts_with(expected), "{text}: {found}");
    }
}
