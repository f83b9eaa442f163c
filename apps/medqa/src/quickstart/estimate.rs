//! How much memory the run will need, before it starts.

use crate::{
    adapter::lora_config,
    data::{encode, read},
    estimate::{adapters, shape},
    model,
    recipe::{Dtype, Recipe},
};
use anyhow::Result;
use burn_zero::estimate::Recompute;
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
        let bytes = if recipe.model.dtype == Some(Dtype::F32) { 4 } else { 2 };
        Ok(Self {
            parameters,
            trained: adapters(&shape, &lora_config(recipe))?,
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

/// Bytes for people, in MiB.
pub fn size(bytes: u64) -> String {
    format!("{} MiB", (bytes as f64 / f64::from(1 << 20)).round())
}

/// A number of weights for people.
pub fn count(weights: u64) -> String {
    format!("{:.1} M", weights as f64 / 1e6)
}
