//! The keys of the YAML that `accelerate config` writes.

use super::{
    DEVICE, FixedValue, KeyHandling, KeySpec, POSITIVE, PYTHON, SEGMENTS, ValueKind, fixed_flag, fixed_number,
    not_honoured, read,
};

const LAUNCHER: &str = "MPI starts and connects the processes";

/// Returns a key whose default value `accelerate config` always writes; the default is not reported as not honoured.
const fn fixed_text(name: &'static str, value: &'static str, what: &'static str) -> KeySpec {
    KeySpec { name, kind: ValueKind::Any, handling: KeyHandling::Fixed(FixedValue::Text(value), what) }
}

/// The `deepspeed_config` block.
const DEEPSPEED: &[KeySpec] = &[
    read("deepspeed_config_file", ValueKind::Text),
    read("zero_stage", ValueKind::Integer(0, 3)),
    read("offload_optimizer_device", DEVICE),
    read("offload_optimizer_nvme_path", ValueKind::Text),
    read("offload_param_device", DEVICE),
    read("offload_param_nvme_path", ValueKind::Text),
    read("gradient_accumulation_steps", POSITIVE),
    read("gradient_clipping", ValueKind::Number),
    read("zero3_save_16bit_model", ValueKind::Flag),
    not_honoured(
        "zero3_init_flag",
        ValueKind::Flag,
        "in stage 3 every rank reads the model part by part and keeps its shards",
    ),
    not_honoured("deepspeed_moe_layer_cls_names", ValueKind::Any, "the models have no experts"),
    not_honoured("deepspeed_multinode_launcher", ValueKind::Text, LAUNCHER),
    not_honoured("deepspeed_hostfile", ValueKind::Text, LAUNCHER),
    not_honoured("deepspeed_exclusion_filter", ValueKind::Text, LAUNCHER),
    not_honoured("deepspeed_inclusion_filter", ValueKind::Text, LAUNCHER),
];

/// The `fsdp_config` block.
const FSDP: &[KeySpec] = &[
    read("fsdp_sharding_strategy", ValueKind::Any),
    read("fsdp_reshard_after_forward", ValueKind::Any),
    read("fsdp_offload_params", ValueKind::Flag),
    read("fsdp_activation_checkpointing", ValueKind::Flag),
    not_honoured("fsdp_version", ValueKind::Integer(1, 2), "versions 1 and 2 are read alike"),
    not_honoured("fsdp_auto_wrap_policy", ValueKind::Text, SEGMENTS),
    not_honoured("fsdp_transformer_layer_cls_to_wrap", ValueKind::Any, SEGMENTS),
    not_honoured("fsdp_min_num_params", ValueKind::Any, SEGMENTS),
    not_honoured("fsdp_backward_prefetch", ValueKind::Text, SEGMENTS),
    not_honoured("fsdp_backward_prefetch_policy", ValueKind::Text, SEGMENTS),
    not_honoured("fsdp_forward_prefetch", ValueKind::Flag, SEGMENTS),
    not_honoured("fsdp_limit_all_gathers", ValueKind::Flag, SEGMENTS),
    not_honoured(
        "fsdp_state_dict_type",
        ValueKind::Text,
        "checkpoints are kept per parameter and load at any number of ranks",
    ),
    not_honoured("fsdp_cpu_ram_efficient_loading", ValueKind::Flag, "a sharded model is read part by part"),
    not_honoured("fsdp_sync_module_states", ValueKind::Flag, "every rank reads the same checkpoint"),
    not_honoured("fsdp_use_orig_params", ValueKind::Flag, "parameters keep their names and shapes"),
];

/// The `megatron_lm_config` block.
const MEGATRON: &[KeySpec] = &[
    read("megatron_lm_pp_degree", POSITIVE),
    read("megatron_lm_tp_degree", ValueKind::Integer(1, 1)),
    read("megatron_lm_num_micro_batches", POSITIVE),
    read("megatron_lm_gradient_clipping", ValueKind::Number),
    read("megatron_lm_recompute_activations", ValueKind::Flag),
    read("megatron_lm_use_distributed_optimizer", ValueKind::Flag),
    fixed_flag("megatron_lm_sequence_parallelism", false, "it divides what tensor parallelism leaves whole"),
];

/// The top level.
pub(crate) const ACCELERATE: &[KeySpec] = &[
    read("distributed_type", ValueKind::Text),
    read("mixed_precision", ValueKind::Choice(&["no", "fp16", "bf16", "fp8"])),
    read("num_processes", POSITIVE),
    read("num_machines", POSITIVE),
    read("deepspeed_config", ValueKind::Block(DEEPSPEED)),
    read("fsdp_config", ValueKind::Block(FSDP)),
    fixed_flag("debug", false, "shapes and types are always checked"),
    fixed_flag("use_cpu", false, "`--device` decides"),
    fixed_flag("tpu_use_cluster", false, "there is no TPU backend"),
    fixed_flag("tpu_use_sudo", false, "there is no TPU backend"),
    not_honoured("tpu_env", ValueKind::Any, "there is no TPU backend"),
    not_honoured("tpu_name", ValueKind::Any, "there is no TPU backend"),
    not_honoured("tpu_zone", ValueKind::Any, "there is no TPU backend"),
    not_honoured("tpu_vm", ValueKind::Any, "there is no TPU backend"),
    fixed_text("compute_environment", "LOCAL_MACHINE", LAUNCHER),
    fixed_number("machine_rank", 0.0, LAUNCHER),
    not_honoured("main_process_ip", ValueKind::Any, LAUNCHER),
    not_honoured("main_process_port", ValueKind::Any, LAUNCHER),
    fixed_text("main_training_function", "main", LAUNCHER),
    fixed_text("rdzv_backend", "static", LAUNCHER),
    fixed_flag("same_network", true, LAUNCHER),
    fixed_text("gpu_ids", "all", LAUNCHER),
    not_honoured("enable_cpu_affinity", ValueKind::Flag, LAUNCHER),
    not_honoured("mpirun_config", ValueKind::Any, LAUNCHER),
    not_honoured("commands", ValueKind::Any, LAUNCHER),
    not_honoured("command_file", ValueKind::Any, LAUNCHER),
    fixed_text("downcast_bf16", "no", "`mixed_precision` decides"),
    not_honoured("fp8_config", ValueKind::Any, "`mixed_precision` decides"),
    not_honoured("dynamo_config", ValueKind::Any, PYTHON),
    not_honoured("dynamo_backend", ValueKind::Any, PYTHON),
    not_honoured("ipex_config", ValueKind::Any, PYTHON),
    not_honoured("tp_config", ValueKind::Any, "every rank computes whole layers"),
    read("megatron_lm_config", ValueKind::Block(MEGATRON)),
    not_honoured("parallelism_config", ValueKind::Any, "`distributed_type` and its block decide"),
];
