//! Sizes that the memory of a run follows from: the dimensions of a model and its numbers of parameters.

use anyhow::Result;
use burn_llama::LlamaConfig;
use burn_peft::LoraConfig;
use burn_zero::estimate::LlamaShape;

/// Converts bytes to GiB.
pub(crate) fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Returns the number of parameters that LoRA with this configuration trains on a model of this shape.
///
/// # Errors
/// If the configuration is invalid.
pub(crate) fn count_lora_params(shape: &LlamaShape, lora: &LoraConfig) -> Result<u64> {
    let mut layers = linear_layers(shape);
    if lora.selects_embedding("model.embed_tokens")? {
        layers.push(("model.embed_tokens".to_owned(), [shape.vocabulary as usize, shape.hidden as usize]));
    }
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
pub(crate) fn model_shape(config: &LlamaConfig) -> LlamaShape {
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
    use burn_peft::TargetModules;

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
