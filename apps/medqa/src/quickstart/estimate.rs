//! How much memory the run will need, before it starts.

use crate::{
    data::{encode, read},
    model,
    recipe::{Dtype, Recipe},
};
use anyhow::Result;
use burn_llama::LlamaConfig;
use burn_zero::estimate::{Recompute, Shape};
use std::{fmt, path::Path};

/// What AdamW holds of a trained f32 weight: weight, gradient and two moments.
const BYTES_PER_TRAINED: u64 = 16;

/// Bytes by kind, of a LoRA run on every linear layer that recomputes nothing.
pub struct Estimate {
    /// The model's weights.
    parameters: u64,
    /// The adapters' weights.
    trained: u64,
    /// Bytes of the model's weights.
    frozen: u64,
    /// Tokens of the largest batch that an epoch could hold: its longest rows together.
    tokens: u64,
    /// Bytes kept of that batch for the backward pass.
    activations: u64,
}

impl Estimate {
    /// Reads the model's sizes and the rows; loads no weights.
    pub fn of(recipe: &Recipe) -> Result<Self> {
        let (checkpoint, tokenizer) = model::open(&recipe.model.path, None)?;
        let (config, data, mut lengths) = (checkpoint.config(), &recipe.data, Vec::new());
        for source in &data.train {
            let rows = read(Path::new(&source.path), &data.schema(Some(source)))?;
            let encoded = encode(&tokenizer, &rows, data.max_length, data.on_too_long)?;
            lengths.extend(encoded.examples.iter().map(|row| row.ids.len() as u64));
        }
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        let tokens = lengths.iter().take(recipe.train.steps.batch_size).sum();
        let shape = shape(config);
        let parameters = shape.parameters(config.tie_word_embeddings);
        let bytes = if recipe.model.dtype == Dtype::F32 { 4 } else { 2 };
        Ok(Self {
            parameters,
            trained: adapters(&shape, recipe.method.lora.r as u64),
            frozen: parameters * bytes,
            tokens,
            activations: shape.activations(tokens, 4, Recompute::None).total(),
        })
    }

    /// All bytes.
    pub fn total(&self) -> u64 {
        self.frozen + self.trained * BYTES_PER_TRAINED + self.activations
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let states = self.trained * BYTES_PER_TRAINED;
        writeln!(f, "memory, estimated")?;
        writeln!(f, "  {:>9}  {} frozen weights", size(self.frozen), count(self.parameters))?;
        let adapters = "adapter weights with their gradients and AdamW's two moments";
        writeln!(f, "  {:>9}  {} {adapters}", size(states), count(self.trained))?;
        writeln!(f, "  {:>9}  kept for the backward pass, {} tokens at most", size(self.activations), self.tokens)?;
        writeln!(f, "  {:>9}  in all, besides the program itself", size(self.total()))
    }
}

/// Adapters of rank `r` on the seven linear layers of every block: `A [r, in]` and `B [out, r]`.
fn adapters(shape: &Shape, r: u64) -> u64 {
    let (hidden, wide, narrow) = (shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let attention = 2 * (hidden + wide) + 2 * (hidden + narrow);
    shape.layers * r * (attention + 3 * (hidden + shape.intermediate))
}

fn shape(config: &LlamaConfig) -> Shape {
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

/// Bytes for people, in MiB.
pub fn size(bytes: u64) -> String {
    format!("{} MiB", (bytes as f64 / f64::from(1 << 20)).round())
}

/// A number of weights for people.
pub fn count(weights: u64) -> String {
    format!("{:.1} M", weights as f64 / 1e6)
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
