//! The command `estimate`: the memory that a run would need, for every ZeRO stage and offload setting.

use crate::{cli::EstimateArgs, fetch, recipe::MethodKind};
use anyhow::Result;
use burn_llama::{Checkpoint, LlamaConfig};
use burn_peft::{LoraConfig, TargetModules};
use burn_zero::{
    ds_config::ZeroStage,
    estimate::{
        Cluster, CpuOffload, DeepSpeedEstimate, LlamaShape, MemoryEstimate, ModelSize, Recompute, StatePlacement,
        TrainingPrecision, model_states, zero2, zero3,
    },
};

mod measure;

/// Runs the command `estimate`: prints a table on stdout. Only the model's configuration is read, no weights.
pub fn estimate(args: &EstimateArgs) -> Result<()> {
    if args.measure {
        return measure::measure(args);
    }
    let config = match &args.config {
        Some(path) => LlamaConfig::load(path)?,
        None => Checkpoint::open(&fetch::resolve(&args.model)?)?.config().clone(),
    };
    let shape = model_shape(&config);
    let all = shape.parameters(config.tie_word_embeddings);
    let trained = if args.method == MethodKind::Full { all } else { count_lora_params(&shape, &lora_from_args(args))? };
    println!(
        "{:.1} M parameters, {:.1} M trainable; {} rank{}, {} tokens per micro-batch; GiB per rank, device + host",
        all as f64 / 1e6,
        trained as f64 / 1e6,
        args.world,
        if args.world.get() == 1 { "" } else { "s" },
        args.tokens
    );
    println!("\n{:<10}{:<20}{:>24}{:>24}", "stage", "optimizer", "f32", "bf16, f32 master weights");
    for stage in [ZeroStage::Disabled, ZeroStage::OptimizerStates, ZeroStage::Gradients, ZeroStage::Weights] {
        for (place, offload) in OFFLOAD_SETTINGS {
            if offload == OffloadSetting::All && stage != ZeroStage::Weights {
                continue;
            }
            let cell = |numbers: TrainingPrecision| {
                let frozen_bytes = if trained == all { 0 } else { all * numbers.bytes_per_weight() };
                let largest_segment_bytes = shape.largest_segment() * numbers.bytes_per_weight();
                let weights = ModelSize { trained, frozen_bytes, largest_segment_bytes, bucket_size: 4 << 20 };
                let (offload_optimizer, offload_param) =
                    (offload != OffloadSetting::None, offload == OffloadSetting::All);
                let (world, early_updates) = (args.world.get(), args.max_grad_norm == 0.0);
                let placement = StatePlacement {
                    stage,
                    world_size: world,
                    offload_optimizer,
                    offload_param,
                    optimizer_in_backward: early_updates,
                };
                let recompute = if args.recompute { Recompute::Full } else { Recompute::None };
                let mut memory = model_states_with_f32_gradients(weights, numbers, placement);
                memory.activations = shape.activations(args.tokens, numbers.bytes_per_weight(), recompute).total();
                if trained == all {
                    memory.activations = peak_transient_bytes(memory.activations, &shape, placement);
                }
                if offload == OffloadSetting::File {
                    memory.host -= moment_bytes(trained, placement);
                }
                format!("{:.2} + {:.2}", gib(memory.device()), gib(memory.host))
            };
            println!(
                "{:<10}{place:<20}{:>24}{:>24}",
                u8::from(stage),
                cell(TrainingPrecision::F32),
                cell(TrainingPrecision::Mixed)
            );
        }
    }
    if trained == all {
        print_deepspeed_estimates(all, shape.vocabulary * shape.hidden, args.world.get());
    }
    Ok(())
}

/// Returns the LoRA configuration that the arguments describe.
fn lora_from_args(args: &EstimateArgs) -> LoraConfig {
    let names = args.target_modules.clone();
    let target_modules = match names.as_slice() {
        [all] if all == "all-linear" => TargetModules::Pattern(all.clone()),
        _ => TargetModules::Suffixes(names),
    };
    LoraConfig { r: args.r as usize, target_modules, ..LoraConfig::default() }
}

/// Model states that are kept off the device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OffloadSetting {
    None,
    Optimizer,
    /// Optimizer states in host memory, their moments in a file.
    File,
    /// Optimizer states and this rank's parameter shard in host memory.
    All,
}

const OFFLOAD_SETTINGS: [(&str, OffloadSetting); 4] = [
    ("device", OffloadSetting::None),
    ("host", OffloadSetting::Optimizer),
    ("file", OffloadSetting::File),
    ("host, weights too", OffloadSetting::All),
];

/// Prints what DeepSpeed's own memory estimators give for full fine-tuning on one node.
fn print_deepspeed_estimates(all: u64, largest_layer: u64, devices: u64) {
    let nodes = Cluster { nodes: 1, devices_per_node: devices };
    println!(
        "\nDeepSpeed's formulas (16-bit weights, f32 master weights, its buffers, no activations; stage 3 with zero.Init)"
    );
    let row = |stage: u8, place: &str, DeepSpeedEstimate { device, host }: DeepSpeedEstimate| {
        println!("{stage:<10}{place:<20}{:>48}", format!("{:.2} + {:.2}", gib(device), gib(host / devices)));
    };
    row(2, "device", zero2(all, nodes, false));
    row(2, "host", zero2(all, nodes, true));
    for (place, offload) in
        [("device", CpuOffload::None), ("host", CpuOffload::Optimizer), (OFFLOAD_SETTINGS[3].0, CpuOffload::All)]
    {
        row(3, place, zero3(all, largest_layer, nodes, offload, true));
    }
}

/// Returns the memory of a rank's model states: [`model_states`] with gradients in f32, in which this engine accumulates them
/// whatever the model computes in.
pub fn model_states_with_f32_gradients(
    weights: ModelSize,
    numbers: TrainingPrecision,
    placement: StatePlacement,
) -> MemoryEstimate {
    let memory = model_states(weights, numbers, placement);
    MemoryEstimate { gradients: memory.gradients * 4 / numbers.bytes_per_weight(), ..memory }
}

/// Returns the bytes of this rank's two Adam moments.
pub fn moment_bytes(trained: u64, placement: StatePlacement) -> u64 {
    8 * if placement.stage >= ZeroStage::OptimizerStates { trained.div_ceil(placement.world_size) } else { trained }
}

/// Returns the peak of the transient memory: the activations, or the gradient of a trained embedding, the largest
/// tensor. When the backward pass reaches the embedding, the layers' activations have been freed; the gradient gets a
/// buffer of its own and is added to that of the tied output head, and with sharded gradients it is whole until then.
/// If the optimizer steps during the backward pass, the output head's gradient waits for the whole pass.
pub fn peak_transient_bytes(activations: u64, shape: &LlamaShape, placement: StatePlacement) -> u64 {
    let bytes = 4 * shape.vocabulary * shape.hidden;
    let whole = if placement.stage >= ZeroStage::Gradients { bytes - bytes / placement.world_size } else { 0 };
    let waits = if placement.optimizer_in_backward { bytes } else { 0 };
    activations.max(bytes + whole) + waits
}

pub fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Returns the number of parameters that LoRA with this configuration trains on a model of this shape.
///
/// # Errors
/// If the configuration is invalid.
pub fn count_lora_params(shape: &LlamaShape, lora: &LoraConfig) -> Result<u64> {
    let layers = linear_layers(shape);
    Ok(lora.count_trainable(layers.iter().map(|(path, shape)| (path.as_str(), *shape)))? as u64)
}

/// Returns the paths and shapes `[out, in]` of the linear layers.
fn linear_layers(shape: &LlamaShape) -> Vec<(String, [usize; 2])> {
    let (wide, narrow) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let (hidden, mlp) = (shape.hidden, shape.intermediate);
    let block = [
        ("self_attn.q_proj", [wide, hidden]),
        ("self_attn.k_proj", [narrow, hidden]),
        ("self_attn.v_proj", [narrow, hidden]),
        ("self_attn.o_proj", [hidden, wide]),
        ("mlp.gate_proj", [mlp, hidden]),
        ("mlp.up_proj", [mlp, hidden]),
        ("mlp.down_proj", [hidden, mlp]),
    ];
    let blocks = (0..shape.layers).flat_map(|index| {
        block.map(|(name, sizes)| (format!("model.layers.{index}.{name}"), sizes.map(|size| size as usize)))
    });
    let head = ("lm_head".to_owned(), [shape.vocabulary as usize, hidden as usize]);
    blocks.chain([head]).collect()
}

/// Returns the dimensions of a model that an estimate needs.
pub fn model_shape(config: &LlamaConfig) -> LlamaShape {
    LlamaShape {
        layers: config.num_hidden_layers as u64,
        hidden: config.hidden_size as u64,
        intermediate: config.intermediate_size as u64,
        heads: config.num_attention_heads as u64,
        kv_heads: config.num_key_value_heads as u64,
        head_dim: config.head_dim as u64,
        vocabulary: config.vocab_size as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SmolLM2-135M: PEFT counts 2,442,240 for rank 8 on all linear layers, the published checkpoint has 134,515,008.
    #[test]
    fn the_counts_are_those_of_the_published_model() {
        let (layers, hidden, intermediate, vocabulary) = (30, 576, 1536, 49152);
        let shape = LlamaShape { layers, hidden, intermediate, heads: 9, kv_heads: 3, head_dim: 64, vocabulary };
        assert_eq!(shape.parameters(true), 134_515_008);
        let count = |target_modules| {
            count_lora_params(&shape, &LoraConfig { target_modules, ..LoraConfig::default() }).unwrap()
        };
        assert_eq!(count(TargetModules::Pattern("all-linear".to_owned())), 2_442_240);
        assert_eq!(count(TargetModules::default()), 460_800);
        let head = TargetModules::Suffixes(vec!["lm_head".to_owned()]);
        assert_eq!(count(head), 8 * (49152 + 576));
    }
}
