//! The top-level keys of a ds_config.json and its precision blocks.

use super::typed::{OPTIMIZERS, SCHEDULERS};
use super::zero::ZERO;
use super::{
    FixedValue, KeyHandling, KeySpec, NON_NEGATIVE, POSITIVE, PYTHON, ValueKind, fixed_flag, fixed_number,
    not_honoured, read,
};

const LOGGING: &str = "the run writes its own logs, as the recipe configures them";
const BATCH: &str = "the batch keys decide";
const DENSE: &str = "attention stays dense and causal";
const MEAN: &str = "gradients are divided once, by the number of target tokens of the step";
const ORDER: &str = "the recipe decides how the data is ordered and truncated";

/// The `fp16` block.
const FP16: &[KeySpec] = &[
    read("enabled", ValueKind::Flag),
    read("loss_scale", ValueKind::Number),
    read("initial_scale_power", ValueKind::Integer(0, 127)),
    read("loss_scale_window", POSITIVE),
    read("hysteresis", POSITIVE),
    read("consecutive_hysteresis", ValueKind::Flag),
    read("min_loss_scale", ValueKind::Number),
    fixed_flag("auto_cast", false, "the inputs are token ids; nothing is cast"),
    fixed_flag("fp16_master_weights_and_grads", false, "the optimizer keeps its weights and moments in f32"),
    not_honoured("fused_mode", ValueKind::Flag, "there is one optimizer step, and it is fused"),
];

/// The `bf16` block.
const BF16: &[KeySpec] = &[
    read("enabled", ValueKind::Flag),
    not_honoured("immediate_grad_update", ValueKind::Flag, "gradients are passed on as soon as they are computed"),
    fixed_flag(
        "check_grad_overflow",
        true,
        "a gradient norm that is not finite always stops the run or skips the step",
    ),
    fixed_flag("bf16_master_weights_and_grads", false, "the optimizer keeps its weights in f32"),
    fixed_flag("bf16_optimizer_states", false, "the optimizer keeps its moments in f32"),
];

const MODULE: &str = "DeepSpeed takes it from the arguments of PipelineModule, not from this file";

/// The `pipeline` block.
const PIPELINE: &[KeySpec] = &[
    read("stages", POSITIVE),
    not_honoured("partition", ValueKind::Text, MODULE),
    fixed_flag("seed_layers", false, "random numbers depend on step, row and layer, not on the rank"),
    fixed_number("activation_checkpoint_interval", 0.0, "the recipe decides which layers are recomputed"),
    not_honoured("pipe_partitioned", ValueKind::Flag, "whole activations are sent from stage to stage"),
    not_honoured("grad_partitioned", ValueKind::Flag, "whole gradients are sent from stage to stage"),
];

/// The top level.
pub(crate) const DEEPSPEED: &[KeySpec] = &[
    read("train_batch_size", NON_NEGATIVE),
    read("train_micro_batch_size_per_gpu", NON_NEGATIVE),
    read("gradient_accumulation_steps", NON_NEGATIVE),
    read("gradient_clipping", ValueKind::Number),
    read("steps_per_print", POSITIVE),
    read("optimizer", ValueKind::Typed(&OPTIMIZERS)),
    read("scheduler", ValueKind::Typed(&SCHEDULERS)),
    read("fp16", ValueKind::Block(FP16)),
    read("bf16", ValueKind::Block(BF16)),
    read("zero_optimization", ValueKind::Block(ZERO)),
    // Communication.
    KeySpec {
        name: "communication_data_type",
        kind: ValueKind::Choice(&["fp32", "fp16", "bf16"]),
        handling: KeyHandling::Fixed(FixedValue::Text("fp32"), "gradients are reduced in f32"),
    },
    not_honoured("seq_parallel_comm_data_type", ValueKind::Text, "sequences are not sharded among ranks"),
    not_honoured("sequence_parallel_size", ValueKind::Any, "sequences are not sharded among ranks"),
    not_honoured("gradient_allreduce_op", ValueKind::Choice(&["mean", "sum"]), MEAN),
    fixed_flag("fp32_allreduce", true, "gradients are reduced in f32"),
    fixed_flag("prescale_gradients", false, MEAN),
    fixed_number("gradient_predivide_factor", 1.0, MEAN),
    fixed_flag("sparse_gradients", false, "the embedding's gradient is dense"),
    fixed_flag("disable_allgather", false, "weights are gathered after the step"),
    fixed_flag("managed_gradient_accumulation", true, "the engine counts the micro-batches of a step"),
    // ZeRO, outside its block.
    not_honoured("zero_allow_untested_optimizer", ValueKind::Flag, "every optimizer works with every stage"),
    not_honoured("zero_force_ds_cpu_optimizer", ValueKind::Flag, "an offloaded optimizer always runs on the host"),
    fixed_number("allgather_size", 5e8, "zero_optimization.allgather_bucket_size decides"),
    not_honoured("aio", ValueKind::Any, "files are read ahead and written behind through a few buffers of fixed size"),
    // Precision, outside its blocks.
    not_honoured("amp", ValueKind::Any, "the fp16 and bf16 blocks decide"),
    not_honoured("torch_autocast", ValueKind::Any, "the fp16 and bf16 blocks decide"),
    not_honoured("data_types", ValueKind::Any, "gradients are summed in f32"),
    // Logs.
    fixed_flag("wall_clock_breakdown", false, LOGGING),
    fixed_flag("memory_breakdown", false, LOGGING),
    fixed_flag("dump_state", false, LOGGING),
    not_honoured("log_level", ValueKind::Text, LOGGING),
    not_honoured("tensorboard", ValueKind::Any, LOGGING),
    not_honoured("wandb", ValueKind::Any, LOGGING),
    not_honoured("comet", ValueKind::Any, LOGGING),
    not_honoured("csv_monitor", ValueKind::Any, LOGGING),
    not_honoured("flops_profiler", ValueKind::Any, LOGGING),
    not_honoured("comms_logger", ValueKind::Any, LOGGING),
    not_honoured("timers", ValueKind::Any, LOGGING),
    // Model, data and run.
    not_honoured("activation_checkpointing", ValueKind::Any, "the recipe decides which layers are recomputed"),
    not_honoured("checkpoint", ValueKind::Any, "checkpoints are kept per parameter and load at any number of ranks"),
    not_honoured("nebula", ValueKind::Any, "checkpoints are files"),
    not_honoured("datastates", ValueKind::Any, "checkpoints are files"),
    read("pipeline", ValueKind::Block(PIPELINE)),
    not_honoured(
        "tensor_parallel",
        ValueKind::Any,
        "every rank computes whole layers; zero_optimization shards the model states",
    ),
    not_honoured("expert_parallel", ValueKind::Any, "the models have no experts"),
    fixed_flag("use_data_before_expert_parallelism", false, "the models have no experts"),
    not_honoured("sparse_attention", ValueKind::Any, DENSE),
    not_honoured("progressive_layer_drop", ValueKind::Any, "every layer runs in every step"),
    not_honoured("eigenvalue", ValueKind::Any, "nothing is quantised while it is trained"),
    not_honoured("quantize_training", ValueKind::Any, "nothing is quantised while it is trained"),
    not_honoured("compression_training", ValueKind::Any, "nothing is compressed while it is trained"),
    not_honoured("weight_quantization", ValueKind::Any, "the recipe decides how frozen weights are stored"),
    not_honoured("data_efficiency", ValueKind::Any, ORDER),
    not_honoured("curriculum_learning", ValueKind::Any, ORDER),
    fixed_flag("dataloader_drop_last", false, ORDER),
    not_honoured("elasticity", ValueKind::Any, BATCH),
    not_honoured("autotuning", ValueKind::Any, BATCH),
    not_honoured("vocabulary_size", NON_NEGATIVE, "the tokenizer decides"),
    not_honoured("hybrid_engine", ValueKind::Any, PYTHON),
    not_honoured("compile", ValueKind::Any, PYTHON),
    fixed_flag("graph_harvesting", false, PYTHON),
];
