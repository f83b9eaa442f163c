//! The command `estimate`: the memory that a run would need, for every ZeRO stage and offload setting.

use crate::{cli::EstimateArgs, fetch, recipe::MethodKind};
use anyhow::Result;
use burn_llama::{Checkpoint, LlamaConfig};
use burn_peft::{LoraConfig, TargetModules};
use burn_zero::{
    OffloadDevice, ZeroStage,
    estimate::{
        BaseModel, Cluster, CpuOffload, DeepSpeedEstimate, LlamaShape, MicroBatch, RunFootprint, StatePlacement,
        TrainedWeights, TrainingPrecision, WeightStorage, zero2, zero3,
    },
    segment::Checkpointing,
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
        for setting in OFFLOAD_SETTINGS {
            if setting.weights != OffloadDevice::None && stage != ZeroStage::Weights {
                continue;
            }
            let place = setting.name;
            let cell = |precision: TrainingPrecision| {
                let storage = match precision {
                    TrainingPrecision::F32 => WeightStorage::F32,
                    TrainingPrecision::Mixed => WeightStorage::Half,
                };
                let run = RunFootprint {
                    base: BaseModel { shape, weights: all, storage },
                    trained_weights: if trained == all { TrainedWeights::All } else { TrainedWeights::Adapters },
                    trained,
                    precision,
                    placement: StatePlacement {
                        stage,
                        world_size: args.world.get(),
                        offload_optimizer: setting.optimizer,
                        offload_param: setting.weights,
                        optimizer_in_backward: args.max_grad_norm == 0.0,
                    },
                    bucket_size: 4 << 20,
                    micro_batch: MicroBatch {
                        tokens: args.tokens,
                        value_bytes: precision.bytes_per_weight(),
                        checkpointing: if args.recompute { Checkpointing::Full } else { Checkpointing::None },
                        first_layer: 0,
                    },
                };
                let memory = run.peak_memory();
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

/// The places of the model states in one row of the table.
#[derive(Clone, Copy)]
struct OffloadSetting {
    name: &'static str,
    /// The place of the optimizer states.
    optimizer: OffloadDevice,
    /// The place of this rank's parameter shard.
    weights: OffloadDevice,
}

const HOST_WITH_WEIGHTS: &str = "host, weights too";

const OFFLOAD_SETTINGS: [OffloadSetting; 4] = [
    OffloadSetting { name: "device", optimizer: OffloadDevice::None, weights: OffloadDevice::None },
    OffloadSetting { name: "host", optimizer: OffloadDevice::Cpu, weights: OffloadDevice::None },
    OffloadSetting { name: "file", optimizer: OffloadDevice::Nvme, weights: OffloadDevice::None },
    OffloadSetting { name: HOST_WITH_WEIGHTS, optimizer: OffloadDevice::Cpu, weights: OffloadDevice::Cpu },
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
        [("device", CpuOffload::None), ("host", CpuOffload::Optimizer), (HOST_WITH_WEIGHTS, CpuOffload::All)]
    {
        row(3, place, zero3(all, largest_layer, nodes, offload, true));
    }
}

/// Converts bytes to GiB.
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
