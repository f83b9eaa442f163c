//! The top of a ds_config.json, and its precision blocks.

use super::typed::{OPTIMIZERS, SCHEDULERS};
use super::zero::ZERO;
use super::{COUNT, Fixed, Key, Kind, POSITIVE, Usage, flag, instead, number, read};

const LOGGING: &str = "the run writes its own logs, as the recipe says";
const BATCH: &str = "the batch keys decide";
const DENSE: &str = "attention stays dense and causal";
const MEAN: &str = "gradients are divided once, by the number of target tokens of the step";
const ORDER: &str = "the recipe decides how the data is ordered and cut";
const PYTHON: &str = "it concerns Python's runtime; nothing is done";

/// `fp16`.
const FP16: &[Key] = &[
    read("enabled", Kind::Flag),
    read("loss_scale", Kind::Number),
    read("initial_scale_power", Kind::Whole(0, 127)),
    read("loss_scale_window", POSITIVE),
    read("hysteresis", POSITIVE),
    read("consecutive_hysteresis", Kind::Flag),
    read("min_loss_scale", Kind::Number),
    flag("auto_cast", false, "the inputs are token ids; nothing is cast"),
    flag("fp16_master_weights_and_grads", false, "the optimizer keeps its weights and moments in f32"),
    instead("fused_mode", Kind::Flag, "there is one optimizer step, and it is fused"),
];

/// `bf16`.
const BF16: &[Key] = &[
    read("enabled", Kind::Flag),
    instead("immediate_grad_update", Kind::Flag, "gradients are handed over as soon as they are made"),
    flag("check_grad_overflow", true, "a gradient norm that is no number always stops or skips the step"),
    flag("bf16_master_weights_and_grads", false, "the optimizer keeps its weights in f32"),
    flag("bf16_optimizer_states", false, "the optimizer keeps its moments in f32"),
];

/// The top block.
pub(crate) const DEEPSPEED: &[Key] = &[
    read("train_batch_size", COUNT),
    read("train_micro_batch_size_per_gpu", COUNT),
    read("gradient_accumulation_steps", COUNT),
    read("gradient_clipping", Kind::Number),
    read("steps_per_print", POSITIVE),
    read("optimizer", Kind::Typed(&OPTIMIZERS)),
    read("scheduler", Kind::Typed(&SCHEDULERS)),
    read("fp16", Kind::Block(FP16)),
    read("bf16", Kind::Block(BF16)),
    read("zero_optimization", Kind::Block(ZERO)),
    // Communication.
    Key {
        name: "communication_data_type",
        kind: Kind::Choice(&["fp32", "fp16", "bf16"]),
        usage: Usage::Fixed(Fixed::Text("fp32"), "gradients are reduced in f32"),
    },
    instead("seq_parallel_comm_data_type", Kind::Text, "sequences are not divided among ranks"),
    instead("sequence_parallel_size", Kind::Any, "sequences are not divided among ranks"),
    instead("gradient_allreduce_op", Kind::Choice(&["mean", "sum"]), MEAN),
    flag("fp32_allreduce", true, "gradients are reduced in f32"),
    flag("prescale_gradients", false, MEAN),
    number("gradient_predivide_factor", 1.0, MEAN),
    flag("sparse_gradients", false, "the embedding's gradient is dense"),
    flag("disable_allgather", false, "weights are gathered after the step"),
    flag("managed_gradient_accumulation", true, "the engine counts the micro-batches of a step"),
    // ZeRO, outside its block.
    instead("zero_allow_untested_optimizer", Kind::Flag, "every optimizer works with every stage"),
    instead("zero_force_ds_cpu_optimizer", Kind::Flag, "an offloaded optimizer always runs on the host"),
    number("allgather_size", 5e8, "zero_optimization.allgather_bucket_size decides"),
    instead("aio", Kind::Any, "files are read ahead and written behind through a few buffers of fixed size"),
    // Precision, outside its blocks.
    instead("amp", Kind::Any, "the fp16 and bf16 blocks decide"),
    instead("torch_autocast", Kind::Any, "the fp16 and bf16 blocks decide"),
    instead("data_types", Kind::Any, "gradients are summed in f32"),
    // Logs.
    flag("wall_clock_breakdown", false, LOGGING),
    flag("memory_breakdown", false, LOGGING),
    flag("dump_state", false, LOGGING),
    instead("log_level", Kind::Text, LOGGING),
    instead("tensorboard", Kind::Any, LOGGING),
    instead("wandb", Kind::Any, LOGGING),
    instead("comet", Kind::Any, LOGGING),
    instead("csv_monitor", Kind::Any, LOGGING),
    instead("flops_profiler", Kind::Any, LOGGING),
    instead("comms_logger", Kind::Any, LOGGING),
    instead("timers", Kind::Any, LOGGING),
    // Model, data and run.
    instead("activation_checkpointing", Kind::Any, "the recipe says which layers run again"),
    instead("checkpoint", Kind::Any, "checkpoints are kept per parameter and load at any number of ranks"),
    instead("nebula", Kind::Any, "checkpoints are files"),
    instead("datastates", Kind::Any, "checkpoints are files"),
    instead("pipeline", Kind::Any, "every rank runs all layers; there is no pipeline"),
    instead("tensor_parallel", Kind::Any, "every rank computes whole layers; zero_optimization divides what is stored"),
    instead("expert_parallel", Kind::Any, "the models have no experts"),
    flag("use_data_before_expert_parallelism", false, "the models have no experts"),
    instead("sparse_attention", Kind::Any, DENSE),
    instead("progressive_layer_drop", Kind::Any, "every layer runs in every step"),
    instead("eigenvalue", Kind::Any, "nothing is quantised while it is trained"),
    instead("quantize_training", Kind::Any, "nothing is quantised while it is trained"),
    instead("compression_training", Kind::Any, "nothing is compressed while it is trained"),
    instead("weight_quantization", Kind::Any, "the recipe says how frozen weights are stored"),
    instead("data_efficiency", Kind::Any, ORDER),
    instead("curriculum_learning", Kind::Any, ORDER),
    flag("dataloader_drop_last", false, ORDER),
    instead("elasticity", Kind::Any, BATCH),
    instead("autotuning", Kind::Any, BATCH),
    instead("vocabulary_size", COUNT, "the tokenizer decides"),
    instead("hybrid_engine", Kind::Any, PYTHON),
    instead("compile", Kind::Any, PYTHON),
    flag("graph_harvesting", false, PYTHON),
];
