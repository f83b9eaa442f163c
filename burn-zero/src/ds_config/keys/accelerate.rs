//! The YAML that `accelerate config` writes.

use super::{Fixed, Key, Kind, POSITIVE, Usage, flag, instead, number, read};

const LAUNCHER: &str = "MPI starts and connects the processes";
const SEGMENTS: &str = "weights are gathered segment by segment";
const PYTHON: &str = "it concerns Python's runtime; nothing is done";
const DEVICE: Kind = Kind::Choice(&["none", "cpu", "nvme"]);

/// What `accelerate config` writes unasked, which needs no note.
const fn usual(name: &'static str, value: &'static str, what: &'static str) -> Key {
    Key { name, kind: Kind::Any, usage: Usage::Fixed(Fixed::Text(value), what) }
}

/// `deepspeed_config`.
const DEEPSPEED: &[Key] = &[
    read("deepspeed_config_file", Kind::Text),
    read("zero_stage", Kind::Whole(0, 3)),
    read("offload_optimizer_device", DEVICE),
    read("offload_optimizer_nvme_path", Kind::Text),
    read("offload_param_device", DEVICE),
    read("offload_param_nvme_path", Kind::Text),
    read("gradient_accumulation_steps", POSITIVE),
    read("gradient_clipping", Kind::Number),
    read("zero3_save_16bit_model", Kind::Flag),
    instead("zero3_init_flag", Kind::Flag, "every rank loads the whole model at the start and keeps its part"),
    instead("deepspeed_moe_layer_cls_names", Kind::Any, "the models have no experts"),
    instead("deepspeed_multinode_launcher", Kind::Text, LAUNCHER),
    instead("deepspeed_hostfile", Kind::Text, LAUNCHER),
    instead("deepspeed_exclusion_filter", Kind::Text, LAUNCHER),
    instead("deepspeed_inclusion_filter", Kind::Text, LAUNCHER),
];

/// `fsdp_config`.
const FSDP: &[Key] = &[
    read("fsdp_sharding_strategy", Kind::Any),
    read("fsdp_reshard_after_forward", Kind::Any),
    read("fsdp_offload_params", Kind::Flag),
    read("fsdp_activation_checkpointing", Kind::Flag),
    instead("fsdp_version", Kind::Whole(1, 2), "versions 1 and 2 are read alike"),
    instead("fsdp_auto_wrap_policy", Kind::Text, SEGMENTS),
    instead("fsdp_transformer_layer_cls_to_wrap", Kind::Any, SEGMENTS),
    instead("fsdp_min_num_params", Kind::Any, SEGMENTS),
    instead("fsdp_backward_prefetch", Kind::Text, SEGMENTS),
    instead("fsdp_backward_prefetch_policy", Kind::Text, SEGMENTS),
    instead("fsdp_forward_prefetch", Kind::Flag, SEGMENTS),
    instead("fsdp_limit_all_gathers", Kind::Flag, SEGMENTS),
    instead("fsdp_state_dict_type", Kind::Text, "checkpoints are kept per parameter and load at any number of ranks"),
    instead("fsdp_cpu_ram_efficient_loading", Kind::Flag, "every rank loads the whole model at the start"),
    instead("fsdp_sync_module_states", Kind::Flag, "every rank reads the same checkpoint"),
    instead("fsdp_use_orig_params", Kind::Flag, "parameters keep their names and shapes"),
];

/// The top block.
pub(crate) const ACCELERATE: &[Key] = &[
    read("distributed_type", Kind::Text),
    read("mixed_precision", Kind::Choice(&["no", "fp16", "bf16", "fp8"])),
    read("num_processes", POSITIVE),
    read("num_machines", POSITIVE),
    read("deepspeed_config", Kind::Block(DEEPSPEED)),
    read("fsdp_config", Kind::Block(FSDP)),
    flag("debug", false, "shapes and types are always checked"),
    flag("use_cpu", false, "`--device` decides"),
    flag("tpu_use_cluster", false, "there is no TPU backend"),
    flag("tpu_use_sudo", false, "there is no TPU backend"),
    instead("tpu_env", Kind::Any, "there is no TPU backend"),
    instead("tpu_name", Kind::Any, "there is no TPU backend"),
    instead("tpu_zone", Kind::Any, "there is no TPU backend"),
    instead("tpu_vm", Kind::Any, "there is no TPU backend"),
    usual("compute_environment", "LOCAL_MACHINE", LAUNCHER),
    number("machine_rank", 0.0, LAUNCHER),
    instead("main_process_ip", Kind::Any, LAUNCHER),
    instead("main_process_port", Kind::Any, LAUNCHER),
    usual("main_training_function", "main", LAUNCHER),
    usual("rdzv_backend", "static", LAUNCHER),
    flag("same_network", true, LAUNCHER),
    usual("gpu_ids", "all", LAUNCHER),
    instead("enable_cpu_affinity", Kind::Flag, LAUNCHER),
    instead("mpirun_config", Kind::Any, LAUNCHER),
    instead("commands", Kind::Any, LAUNCHER),
    instead("command_file", Kind::Any, LAUNCHER),
    usual("downcast_bf16", "no", "`mixed_precision` decides"),
    instead("fp8_config", Kind::Any, "`mixed_precision` decides"),
    instead("dynamo_config", Kind::Any, PYTHON),
    instead("dynamo_backend", Kind::Any, PYTHON),
    instead("ipex_config", Kind::Any, PYTHON),
    instead("tp_config", Kind::Any, "every rank computes whole layers, all of them"),
    instead("megatron_lm_config", Kind::Any, "every rank computes whole layers, all of them"),
    instead("parallelism_config", Kind::Any, "every rank computes whole layers, all of them"),
];
