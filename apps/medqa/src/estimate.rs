//! How much memory a run would need, for every way to divide and to place it.

use crate::{cli::EstimateArgs, fetch, recipe::MethodKind};
use anyhow::Result;
use burn_llama::{Checkpoint, LlamaConfig};
use burn_zero::{
    ds_config::Stage,
    estimate::{Numbers, Placement, Recompute, Shape, Weights, states},
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
    let trained = if args.method == MethodKind::Full { all } else { adapters(&shape, args.r) };
    println!(
        "{:.1} M weights, {:.1} M learn; {} rank{}, {} tokens in a micro-batch; GiB of each rank, device + host",
        all as f64 / 1e6,
        trained as f64 / 1e6,
        args.world,
        if args.world.get() == 1 { "" } else { "s" },
        args.tokens
    );
    println!("\n{:<10}{:<10}{:>24}{:>24}", "stage", "optimizer", "f32", "bf16, f32 masters");
    for stage in [Stage::Replicated, Stage::States, Stage::Gradients, Stage::Weights] {
        for offload_optimizer in [false, true] {
            let cell = |numbers: Numbers| {
                let frozen_bytes = if trained == all { 0 } else { all * numbers.bytes() };
                let largest_segment_bytes = shape.largest_segment() * numbers.bytes();
                let weights = Weights { trained, frozen_bytes, largest_segment_bytes, bucket: 4 << 20 };
                let placement = Placement { stage, world: args.world.get(), offload_optimizer, offload_param: false };
                let recompute = if args.recompute { Recompute::Full } else { Recompute::None };
                let kept = shape.activations(args.tokens, numbers.bytes(), recompute).total();
                let memory = states(weights, numbers, placement);
                format!("{:.2} + {:.2}", gib(memory.device() + kept), gib(memory.host))
            };
            let place = if offload_optimizer { "host" } else { "device" };
            println!("{:<10}{place:<10}{:>24}{:>24}", u8::from(stage), cell(Numbers::F32), cell(Numbers::Mixed));
        }
    }
    Ok(())
}

pub fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Adapters of rank `r` on the seven linear layers of every block: `A [r, in]` and `B [out, r]`.
pub fn adapters(shape: &Shape, r: u64) -> u64 {
    let (hidden, wide, narrow) = (shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let attention = 2 * (hidden + wide) + 2 * (hidden + narrow);
    shape.layers * r * (attention + 3 * (hidden + shape.intermediate))
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
        assert_eq!(adapters(&shape, 8), 2_442_240);
    }
}
