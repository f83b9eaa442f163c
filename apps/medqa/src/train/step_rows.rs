//! The training rows, step by step.

use crate::{
    data::{BatchSampler, GlobalBatch},
    recipe::Recipe,
};
use anyhow::Result;
use burn_llama::Example;

/// The training rows and their order.
pub(super) struct TrainData {
    /// The rows by source.
    sources: Vec<Vec<Example>>,
    pub batch_sampler: BatchSampler,
}

/// The rows of one step, over all ranks.
pub(super) struct StepRows {
    /// The number of the step, counted from 0.
    pub step: usize,
    pub rows: Vec<Example>,
    /// Input tokens of all rows.
    pub tokens: usize,
    /// Target tokens among these.
    pub target_tokens: usize,
    /// The places of the rows in the data, and the micro-batches.
    pub batch: GlobalBatch,
}

impl TrainData {
    /// Plans the steps of a run of `world` ranks over these rows.
    ///
    /// # Errors
    /// If the weights of the sources leave an epoch without a row.
    pub(super) fn new(recipe: &Recipe, sources: Vec<Vec<Example>>, world: usize) -> Result<Self> {
        let lengths = |rows: &Vec<Example>| rows.iter().map(|row| row.ids.len()).collect();
        let batch_sampler = BatchSampler::new(recipe, sources.iter().map(lengths).collect(), world)?;
        Ok(Self { sources, batch_sampler })
    }

    /// Returns the rows of a step, counted from 0.
    pub(super) fn step(&mut self, step: usize) -> StepRows {
        let batch = self.batch_sampler.step(step);
        let rows = batch.rows.iter().map(|index| self.sources[index.source][index.row].clone());
        let rows: Vec<Example> = rows.collect();
        let tokens = rows.iter().map(|row| row.ids.len()).sum();
        let target_tokens = rows.iter().map(Example::num_targets).sum();
        StepRows { step, rows, tokens, target_tokens, batch }
    }
}
