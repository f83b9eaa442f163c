//! The estimate of a run's memory, made before it starts.

use crate::{
    data::{encode_rows, read_rows},
    footprint::{count_lora_params, model_shape},
    method_adapter::lora_config,
    model,
    recipe::{Recipe, WeightDtype},
};
use anyhow::Result;
use burn_zero::estimate::Recompute;
use std::{fmt, path::Path};

/// Bytes of a trainable f32 parameter with AdamW: weight, gradient and two moments.
const BYTES_PER_TRAINED: u64 = 16;

/// The memory of a LoRA run on every linear layer, without activation checkpointing.
pub struct MemoryEstimate {
    /// Parameters of the base model.
    parameters: u64,
    /// Parameters of the adapters.
    trained: u64,
    /// Bytes of the base model's weights.
    frozen: u64,
    /// Tokens of the largest batch that an epoch could hold: its longest rows together.
    tokens: u64,
    /// Bytes of that batch's activations, kept for the backward pass.
    activations: u64,
}

impl MemoryEstimate {
    /// Computes the estimate from the model's configuration and the rows; loads no weights.
    pub fn for_recipe(recipe: &Recipe) -> Result<Self> {
        let (checkpoint, tokenizer) = model::open_checkpoint(&recipe.model.path, None)?;
        let (config, data, mut lengths) = (checkpoint.config(), &recipe.data, Vec::new());
        for source in &data.train {
            let rows = read_rows(Path::new(&source.path), &data.schema(Some(source)))?;
            let encoded = encode_rows(&tokenizer, &rows, data.max_length, data.on_too_long)?;
            lengths.extend(encoded.examples.iter().map(|row| row.ids.len() as u64));
        }
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        let tokens = lengths.iter().take(recipe.train.steps.batch_size).sum();
        let shape = model_shape(config);
        let parameters = shape.parameters(config.tie_word_embeddings);
        let bytes = if recipe.model.dtype == Some(WeightDtype::F32) { 4 } else { 2 };
        Ok(Self {
            parameters,
            trained: count_lora_params(&shape, &lora_config(recipe))?,
            frozen: parameters * bytes,
            tokens,
            activations: shape.activations(tokens, 4, Recompute::None).total(),
        })
    }

    /// Returns the bytes in total.
    pub fn total(&self) -> u64 {
        self.frozen + self.trained * BYTES_PER_TRAINED + self.activations
    }
}

impl fmt::Display for MemoryEstimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let states = self.trained * BYTES_PER_TRAINED;
        writeln!(f, "memory, estimated")?;
        writeln!(f, "  {:>9}  {} frozen weights", format_mib(self.frozen), format_millions(self.parameters))?;
        let adapters = "adapter weights with their gradients and AdamW's two moments";
        writeln!(f, "  {:>9}  {} {adapters}", format_mib(states), format_millions(self.trained))?;
        writeln!(
            f,
            "  {:>9}  kept for the backward pass, {} tokens at most",
            format_mib(self.activations),
            self.tokens
        )?;
        writeln!(f, "  {:>9}  in all, besides the program itself", format_mib(self.total()))
    }
}

/// Formats bytes in MiB.
pub fn format_mib(bytes: u64) -> String {
    format!("{} MiB", (bytes as f64 / f64::from(1 << 20)).round())
}

/// Formats a number of parameters in millions.
pub fn format_millions(weights: u64) -> String {
    format!("{:.1} M", weights as f64 / 1e6)
}
