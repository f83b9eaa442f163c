//! `zero_optimization`.

use super::{COUNT, Key, Kind, POSITIVE, flag, instead, number, read};

const DEVICE: Kind = Kind::Choice(&["none", "cpu", "nvme"]);
const FILES: &str = "files are read ahead and written behind through a few buffers of fixed size";
const PINNED: &str = "host buffers are ordinary memory";
const GATHER: &str = "a segment's weights are gathered by one all_gather per bucket";
const PLAIN: &str = "what is sent has the type it is kept in";

/// `offload_optimizer`.
const OFFLOAD_OPTIMIZER: &[Key] = &[
    read("device", DEVICE),
    read("nvme_path", Kind::Text),
    flag("pin_memory", false, PINNED),
    instead("buffer_count", COUNT, FILES),
    instead("pipeline_read", Kind::Flag, FILES),
    instead("pipeline_write", Kind::Flag, FILES),
    instead("fast_init", Kind::Flag, FILES),
    number("ratio", 1.0, "all optimizer states are offloaded"),
    flag("super_offload", false, "the optimizer's step runs on the host's cores"),
    instead("cpuadam_cores_perc", Kind::Number, "the step takes the threads that the process has"),
    flag("convert_grad_on_cpu", true, "gradients become f32 on the host"),
];

/// `offload_param`.
const OFFLOAD_PARAM: &[Key] = &[
    read("device", DEVICE),
    read("nvme_path", Kind::Text),
    flag("pin_memory", false, PINNED),
    instead("buffer_count", COUNT, FILES),
    instead("buffer_size", COUNT, FILES),
    instead("max_in_cpu", COUNT, FILES),
];

/// The block.
pub(super) const ZERO: &[Key] = &[
    read("stage", Kind::Whole(0, 3)),
    read("offload_optimizer", Kind::Block(OFFLOAD_OPTIMIZER)),
    read("offload_param", Kind::Block(OFFLOAD_PARAM)),
    read("reduce_bucket_size", POSITIVE),
    read("allgather_bucket_size", POSITIVE),
    read("overlap_comm", Kind::Flag),
    read("contiguous_gradients", Kind::Flag),
    read("sub_group_size", POSITIVE),
    read("stage3_max_live_parameters", COUNT),
    read("stage3_max_reuse_distance", COUNT),
    read("stage3_prefetch_bucket_size", COUNT),
    read("stage3_param_persistence_threshold", COUNT),
    read("stage3_model_persistence_threshold", COUNT),
    read("stage3_gather_16bit_weights_on_model_save", Kind::Flag),
    flag("reduce_scatter", true, "gradients are reduced by reduce_scatter"),
    flag("allgather_partitions", true, "weights are gathered by all_gather"),
    flag("use_multi_rank_bucket_allreduce", true, "a bucket holds the gradients of all ranks"),
    flag("load_from_fp32_weights", true, "checkpoints keep f32 weights"),
    flag("elastic_checkpoint", false, "checkpoints load at any number of ranks"),
    flag("round_robin_gradients", false, "a bucket's gradients go to their ranks at once"),
    flag("ignore_unused_parameters", true, "parameters without gradient stay as they are"),
    flag("compute_grad_norm", true, "the gradient norm is always computed and logged"),
    flag("parameter_alignment", true, "buckets are padded to the number of ranks"),
    flag("legacy_stage1", false, "there is one stage 1"),
    instead("cpu_offload_use_pin_memory", Kind::Flag, PINNED),
    instead("zenflow", Kind::Any, "every gradient is applied in its own step"),
    number("zero_hpz_partition_size", 1.0, "weights are divided among all ranks once"),
    flag("zero_quantized_weights", false, PLAIN),
    flag("zero_quantized_nontrainable_weights", false, "the recipe says how frozen weights are stored"),
    flag("zero_quantized_gradients", false, PLAIN),
    instead("zeropp_loco_param", Kind::Any, PLAIN),
    instead("mics_shard_size", Kind::Any, "weights are divided among all ranks once"),
    flag("mics_hierarchical_params_gather", false, "weights are divided among all ranks once"),
    flag("memory_efficient_linear", true, "a linear layer keeps its input and no copy of its weight"),
    flag("pipeline_loading_checkpoint", false, "every rank loads the whole model at the start and keeps its part"),
    flag("override_module_apply", true, "there is no module to override"),
    flag("log_trace_cache_warnings", false, "the order of segments is fixed; there is no trace"),
    flag("enable_sanity_checks", false, "shapes and types are always checked"),
    flag("save_muon_momentum_buffer_in_memory", false, "there is no Muon"),
    instead("leaf_module", Kind::Any, "weights are gathered segment by segment"),
    number("stage3_module_granularity_threshold", 0.0, "weights are gathered segment by segment"),
    flag("stage3_use_all_reduce_for_fetch_params", false, GATHER),
    flag("stage3_allgather_sequential", false, GATHER),
    number(
        "stage3_partition_stream_chunk_size",
        0.0,
        "every rank loads the whole model at the start and keeps its part",
    ),
];
