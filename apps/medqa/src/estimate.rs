//! How much memory a run would need, for every way to divide and to place it.

use crate::{cli::EstimateArgs, fetch, recipe::MethodKind};
use anyhow::Result;
use burn_llama::{Checkpoint, LlamaConfig};
use burn_peft::{LoraConfig, TargetModules};
use burn_zero::{
    ds_config::Stage,
    estimate::{Estimate, Memory, Nodes, Numbers, Offload, Placement, Recompute, Shape, Weights, states, zero2, zero3},
};

mod measure;

/// The verb `estimate`: a table on stdout. Nothing is loaded but the model's sizes.
pub fn estimate(args: &EstimateArgs) -> Result<()> {
    if args.measure {
        return measure::measure(args);
    }
    let config = match &args.config {
        Some(path) => LlamaConfig::load(path)?,
        None => Checkpoint::open(&fetch::resolve(&args.model)?)?.config().clone(),
    };
    let shape = shape(&config);
    let all = shape.parameters(config.tie_word_embeddings);
    let trained = if args.method == MethodKind::Full { all } else { adapters(&shape, &lora(args))? };
    println!(
        "{:.1} M weights, {:.1} M learn; {} rank{}, {} tokens in a micro-batch; GiB of each rank, device + host",
        all as f64 / 1e6,
        trained as f64 / 1e6,
        args.world,
        if args.world.get() == 1 { "" } else { "s" },
        args.tokens
    );
    println!("\n{:<10}{:<20}{:>24}{:>24}", "stage", "optimizer", "f32", "bf16, f32 masters");
    for stage in [Stage::Replicated, Stage::States, Stage::Gradients, Stage::Weights] {
        for (place, offload) in PLACES {
            if offload == Off::All && stage != Stage::Weights {
                continue;
            }
            let cell = |numbers: Numbers| {
                let frozen_bytes = if trained == all { 0 } else { all * numbers.bytes() };
                let largest_segment_bytes = shape.largest_segment() * numbers.bytes();
                let weights = Weights { trained, frozen_bytes, largest_segment_bytes, bucket: 4 << 20 };
                let (offload_optimizer, offload_param) = (offload != Off::None, offload == Off::All);
                let (world, early_updates) = (args.world.get(), args.max_grad_norm == 0.0);
                let placement = Placement { stage, world, offload_optimizer, offload_param, early_updates };
                let recompute = if args.recompute { Recompute::Full } else { Recompute::None };
                let mut memory = kept(weights, numbers, placement);
                memory.activations = shape.activations(args.tokens, numbers.bytes(), recompute).total();
                if trained == all {
                    memory.activations = passing(memory.activations, &shape, placement);
                }
                if offload == Off::File {
                    memory.host -= moments(trained, placement);
                }
                format!("{:.2} + {:.2}", gib(memory.device()), gib(memory.host))
            };
            println!("{:<10}{place:<20}{:>24}{:>24}", u8::from(stage), cell(Numbers::F32), cell(Numbers::Mixed));
        }
    }
    if trained == all {
        deepspeed(all, shape.vocabulary * shape.hidden, args.world.get());
    }
    Ok(())
}

/// The adapters that the arguments name.
fn lora(args: &EstimateArgs) -> LoraConfig {
    let names = args.target_modules.clone();
    let target_modules = match names.as_slice() {
        [all] if all == "all-linear" => TargetModules::Pattern(all.clone()),
        _ => TargetModules::Suffixes(names),
    };
    LoraConfig { r: args.r as usize, target_modules, ..LoraConfig::default() }
}

/// What is not on the device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Off {
    None,
    Optimizer,
    /// Moments in a file.
    File,
    /// The optimizer and this rank's weights, on the host.
    All,
}

const PLACES: [(&str, Off); 4] =
    [("device", Off::None), ("host", Off::Optimizer), ("file", Off::File), ("host, weights too", Off::All)];

/// What DeepSpeed's own estimators say of full fine-tuning on one machine.
fn deepspeed(all: u64, largest_layer: u64, devices: u64) {
    let nodes = Nodes { nodes: 1, devices };
    println!(
        "\nDeepSpeed's formulas (16-bit weights, f32 masters, its buffers, no activations; stage 3 with zero.Init)"
    );
    let row = |stage: u8, place: &str, Estimate { device, host }: Estimate| {
        println!("{stage:<10}{place:<20}{:>48}", format!("{:.2} + {:.2}", gib(device), gib(host / devices)));
    };
    row(2, "device", zero2(all, nodes, false));
    row(2, "host", zero2(all, nodes, true));
    for (place, offload) in [("device", Offload::None), ("host", Offload::Optimizer), (PLACES[3].0, Offload::All)] {
        row(3, place, zero3(all, largest_layer, nodes, offload, true));
    }
}

/// [`states`] of this engine, which sums gradients in f32 whatever the model computes in.
pub fn kept(weights: Weights, numbers: Numbers, placement: Placement) -> Memory {
    let memory = states(weights, numbers, placement);
    Memory { gradients: memory.gradients * 4 / numbers.bytes(), ..memory }
}

/// Bytes of this rank's two moments.
pub fn moments(trained: u64, placement: Placement) -> u64 {
    8 * if placement.stage >= Stage::States { trained.div_ceil(placement.world) } else { trained }
}

/// What passes at the highest, of so many bytes of activations and of an embedding that learns, the largest tensor. When the
/// backward pass reaches it, what layers keep is gone; its gradient is made in a buffer of its own and summed with that of the
/// output it is tied to, and where gradients are divided it is whole until then. Where gradients are updated with on the way,
/// the output's is the one that waits all along.
pub fn passing(activations: u64, shape: &Shape, placement: Placement) -> u64 {
    let bytes = 4 * shape.vocabulary * shape.hidden;
    let whole = if placement.stage >= Stage::Gradients { bytes - bytes / placement.world } else { 0 };
    let waits = if placement.early_updates { bytes } else { 0 };
    activations.max(bytes + whole) + waits
}

pub fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// What adapters of this configuration train on a model of this shape.
///
/// # Errors
/// If the configuration is not possible.
pub fn adapters(shape: &Shape, lora: &LoraConfig) -> Result<u64> {
    let layers = linears(shape);
    Ok(lora.count_trainable(layers.iter().map(|(path, shape)| (path.as_str(), *shape)))? as u64)
}

/// Paths and shapes `[out, in]` of the linear layers.
fn linears(shape: &Shape) -> Vec<(String, [usize; 2])> {
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

/// What an estimate has to know of a model.
pub fn shape(config: &LlamaConfig) -> Shape {
    Shape {
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
        let shape = Shape { layers, hidden, intermediate, heads: 9, kv_heads: 3, head_dim: 64, vocabulary };
        assert_eq!(shape.parameters(true), 134_515_008);
        let count = |target_modules| adapters(&shape, &LoraConfig { target_modules, ..LoraConfig::default() }).unwrap();
        assert_eq!(count(TargetModules::Pattern("all-linear".to_owned())), 2_442_240);
        assert_eq!(count(TargetModules::default()), 460_800);
        let head = TargetModules::Suffixes(vec!["lm_head".to_owned()]);
        assert_eq!(count(head), 8 * (49152 + 576));
    }
}
