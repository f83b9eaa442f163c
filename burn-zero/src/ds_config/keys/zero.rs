//! The keys of `zero_optimization`.

use super::{
    DEVICE, KeySpec, NON_NEGATIVE, POSITIVE, SEGMENTS, ValueKind, fixed_flag, fixed_number, not_honoured, read,
};

const FILES: &str = "files are read ahead and written behind through a few buffers of fixed size";
const PINNED: &str = "host buffers are pageable memory";
const GATHER: &str = "a segment's weights are gathered by one all_gather per bucket";
const PLAIN: &str = "values are sent in the data type in which they are stored";

/// The `offload_optimizer` block.
const OFFLOAD_OPTIMIZER: &[KeySpec] = &[
    read("device", DEVICE),
    read("nvme_path", ValueKind::Text),
    fixed_flag("pin_memory", false, PINNED),
    not_honoured("buffer_count", NON_NEGATIVE, FILES),
    not_honoured("pipeline_read", ValueKind::Flag, FILES),
    not_honoured("pipeline_write", ValueKind::Flag, FILES),
    not_honoured("fast_init", ValueKind::Flag, FILES),
    fixed_number("ratio", 1.0, "all optimizer states are offloaded"),
    fixed_flag("super_offload", false, "the optimizer's step runs on the host's cores"),
    not_honoured("cpuadam_cores_perc", ValueKind::Number, "the step takes the threads that the process has"),
    fixed_flag("convert_grad_on_cpu", true, "gradients become f32 on the host"),
];

/// The `offload_param` block.
const OFFLOAD_PARAM: &[KeySpec] = &[
    read("device", DEVICE),
    read("nvme_path", ValueKind::Text),
    fixed_flag("pin_memory", false, PINNED),
    not_honoured("buffer_count", NON_NEGATIVE, FILES),
    not_honoured("buffer_size", NON_NEGATIVE, FILES),
    not_honoured("max_in_cpu", NON_NEGATIVE, FILES),
];

/// The `zero_optimization` block.
pub(super) const ZERO: &[KeySpec] = &[
    read("stage", ValueKind::Integer(0, 3)),
    read("offload_optimizer", ValueKind::Block(OFFLOAD_OPTIMIZER)),
    read("offload_param", ValueKind::Block(OFFLOAD_PARAM)),
    read("reduce_bucket_size", POSITIVE),
    read("allgather_bucket_size", POSITIVE),
    read("overlap_comm", ValueKind::Flag),
    read("contiguous_gradients", ValueKind::Flag),
    read("sub_group_size", POSITIVE),
    read("stage3_max_live_parameters", NON_NEGATIVE),
    read("stage3_max_reuse_distance", NON_NEGATIVE),
    read("stage3_prefetch_bucket_size", NON_NEGATIVE),
    read("stage3_param_persistence_threshold", NON_NEGATIVE),
    read("stage3_model_persistence_threshold", NON_NEGATIVE),
    read("stage3_gather_16bit_weights_on_model_save", ValueKind::Flag),
    fixed_flag("reduce_scatter", true, "gradients are reduced by reduce_scatter"),
    fixed_flag("allgather_partitions", true, "weights are gathered by all_gather"),
    fixed_flag("use_multi_rank_bucket_allreduce", true, "a bucket holds the gradients of all ranks"),
    fixed_flag("load_from_fp32_weights", true, "checkpoints keep f32 weights"),
    fixed_flag("elastic_checkpoint", false, "checkpoints load at any number of ranks"),
    fixed_flag("round_robin_gradients", false, "the gradients of a bucket are sent to all ranks at once"),
    fixed_flag("ignore_unused_parameters", true, "parameters without a gradient are not updated"),
    fixed_flag("compute_grad_norm", true, "the gradient norm is always computed and logged"),
    fixed_flag("parameter_alignment", true, "buckets are padded to the number of ranks"),
    fixed_flag("legacy_stage1", false, "there is one stage 1"),
    not_honoured("cpu_offload_use_pin_memory", ValueKind::Flag, PINNED),
    not_honoured("zenflow", ValueKind::Any, "every gradient is applied in its own step"),
    fixed_number("zero_hpz_partition_size", 1.0, "weights are sharded among all ranks, without secondary partitions"),
    fixed_flag("zero_quantized_weights", false, PLAIN),
    fixed_flag("zero_quantized_nontrainable_weights", false, "the recipe decides how frozen weights are stored"),
    fixed_flag("zero_quantized_gradients", false, PLAIN),
    not_honoured("zeropp_loco_param", ValueKind::Any, PLAIN),
    not_honoured(
        "mics_shard_size",
        ValueKind::Any,
        "weights are sharded among all ranks, without secondary partitions",
    ),
    fixed_flag(
        "mics_hierarchical_params_gather",
        false,
        "weights are sharded among all ranks, without secondary partitions",
    ),
    fixed_flag("memory_efficient_linear", true, "a linear layer saves its input and no copy of its weight"),
    fixed_flag(
        "pipeline_loading_checkpoint",
        false,
        "in stage 3 every rank reads the model part by part and keeps its shards",
    ),
    fixed_flag("override_module_apply", true, "there is no module to override"),
    fixed_flag("log_trace_cache_warnings", false, "the order of segments is fixed; there is no trace"),
    fixed_flag("enable_sanity_checks", false, "shapes and types are always checked"),
    fixed_flag("save_muon_momentum_buffer_in_memory", false, "there is no Muon"),
    not_honoured("leaf_module", ValueKind::Any, SEGMENTS),
    fixed_number("stage3_module_granularity_threshold", 0.0, SEGMENTS),
    fixed_flag("stage3_use_all_reduce_for_fetch_params", false, GATHER),
    fixed_flag("stage3_allgather_sequential", false, GATHER),
    fixed_number(
        "stage3_partition_stream_chunk_size",
        0.0,
        "in stage 3 every rank reads the model part by part and keeps its shards",
    ),
];
