//! The estimate of a run's memory, made before it starts.

use crate::{
    data::{encode_rows, read_rows},
    footprint::{count_lora_params, model_shape},
    method_adapter::lora_config,
    model,
    recipe::{Recipe, WeightDtype},
};
use anyhow::Result;
use burn_zero::estimate::{
    BaseModel, MicroBatch, RunFootprint, StatePlacement, TrainedWeights, TrainingPrecision, WeightStorage,
};
use std::{fmt, path::Path};

/// The memory of a LoRA run on every linear layer, without activation checkpointing.
pub(super) struct MemoryEstimate {
    run: RunFootprint,
    memory: burn_zero::estimate::MemoryEstimate,
}

impl MemoryEstimate {
    /// Computes the estimate from the model's configuration and the rows; loads no weights.
    pub(super) fn for_recipe(recipe: &Recipe) -> Result<Self> {
        let (checkpoint, tokenizer) = model::open_checkpoint(&recipe.model.path, None)?;
        let (config, data, mut lengths) = (checkpoint.config(), &recipe.data, Vec::new());
        for source in &data.train {
            let rows = read_rows(Path::new(&source.path), &data.schema(Some(source)))?;
            let encoded = encode_rows(&tokenizer, &rows, data.into())?;
            lengths.extend(encoded.examples.iter().map(|row| row.ids.len() as u64));
        }
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        let tokens = lengths.iter().take(recipe.train.steps.batch_size).sum();
        let shape = model_shape(config);
        let parameters = shape.parameters(config.tie_word_embeddings);
        let storage = match recipe.model.dtype {
            Some(WeightDtype::F32) => WeightStorage::F32,
            _ => WeightStorage::Half,
        };
        let run = RunFootprint {
            base: BaseModel { shape, weights: parameters, storage },
            trained_weights: TrainedWeights::Adapters,
            trained: count_lora_params(&shape, &lora_config(recipe))?,
            precision: TrainingPrecision::F32,
            placement: StatePlacement::default(),
            bucket_size: recipe.parallel.sharding.bucket_size as u64,
            // The longest rows together are the largest batch that an epoch could hold.
            micro_batch: MicroBatch { tokens, ..MicroBatch::default() },
        };
        Ok(Self { run, memory: run.peak_memory() })
    }

    /// Returns the bytes of the adapters' weights, gradients and moments.
    fn states(&self) -> u64 {
        self.memory.parameters + self.memory.gradients + self.memory.moments
    }

    /// Returns the bytes in total, without the buffers of the communication.
    pub(super) fn total(&self) -> u64 {
        self.memory.frozen + self.states() + self.memory.activations
    }
}

impl fmt::Display for MemoryEstimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (run, memory) = (&self.run, &self.memory);
        writeln!(f, "memory, estimated")?;
        writeln!(f, "  {:>9}  {} frozen weights", format_mib(memory.frozen), format_millions(run.base.weights))?;
        let adapters = "adapter weights with their gradients and AdamW's two moments";
        writeln!(f, "  {:>9}  {} {adapters}", format_mib(self.states()), format_millions(run.trained))?;
        writeln!(
            f,
            "  {:>9}  kept for the backward pass, {} tokens at most",
            format_mib(memory.activations),
            run.micro_batch.tokens
        )?;
        writeln!(f, "  {:>9}  in all, besides the program itself", format_mib(self.total()))
    }
}

/// Formats bytes in MiB.
pub(super) fn format_mib(bytes: u64) -> String {
    format!("{} MiB", (bytes as f64 / f64::from(1 << 20)).round())
}

/// Formats a number of parameters in millions.
pub(super) fn format_millions(weights: u64) -> String {
    format!("{:.1} M", weights as f64 / 1e6)
}
