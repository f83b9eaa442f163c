//! Assignment of rows to optimizer steps and micro-batches, as a function of the recipe, the lengths of the rows and
//! the number of ranks.
//!
//! The order of an epoch is cut into micro-batches; a fixed number of consecutive ones, over all ranks, makes a step.

use super::order::{RowIndex, SourceSize, epoch_order, group_by_length};
use crate::recipe::{DataConfig, DatasetSource, Packing, Recipe, StepsConfig};
use anyhow::{Result, bail};
use std::ops::Range;

/// Sampler that returns the rows of every optimizer step of a run.
#[derive(Debug)]
pub struct BatchSampler {
    data: DataConfig,
    steps: StepsConfig,
    world_size: usize,
    /// Length in tokens of every row, by source.
    lengths: Vec<Vec<usize>>,
    /// Epoch of the step that was requested last.
    current_epoch: Epoch,
    total_steps: usize,
}

/// Row order and micro-batches of one epoch.
#[derive(Debug, Default)]
struct Epoch {
    /// Number of the epoch, counted from 0.
    index: usize,
    /// First step of the epoch, counted from the start of the run.
    first_step: usize,
    /// All rows.
    order: Vec<RowIndex>,
    /// Ranges of `order`, one for each rank in turn.
    micro_batches: Vec<Range<usize>>,
}

/// The rows of one optimizer step, over all ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct GlobalBatch {
    /// Rows of the step.
    pub rows: Vec<RowIndex>,
    /// Ranges of `rows`, one for each rank in turn. Empty ranges give every rank the same number.
    pub micro_batches: Vec<Range<usize>>,
    /// Number of passes over the data at the end of the step.
    pub epoch: f64,
}

impl GlobalBatch {
    /// Returns the micro-batches of one of `world` ranks; every rank has the same number.
    pub fn micro_batches_of_rank(&self, rank: usize, world: usize) -> impl Iterator<Item = Range<usize>> {
        self.micro_batches.iter().skip(rank).step_by(world).cloned()
    }
}

impl BatchSampler {
    /// Creates the sampler for `world` ranks; `lengths` holds the number of tokens of every row, by source.
    ///
    /// # Errors
    /// If the weights of the sources leave an epoch without a row.
    pub fn new(recipe: &Recipe, lengths: Vec<Vec<usize>>, world: usize) -> Result<Self> {
        let (data, steps) = (recipe.data.clone(), recipe.train.steps.clone());
        let mut plan =
            Self { data, steps, world_size: world, lengths, current_epoch: Epoch::default(), total_steps: 0 };
        plan.current_epoch = plan.build_epoch(0, 0);
        if plan.current_epoch.order.is_empty() {
            bail!("`data.train`: expected weights that leave an epoch at least one row, found none");
        }
        plan.total_steps = plan.count_steps();
        Ok(plan)
    }

    /// Returns the number of steps of the whole run.
    pub fn total_steps(&self) -> usize {
        self.total_steps
    }

    /// Returns the number of rows per step, over all ranks; with `packing = "fill"`, the number if all rows had the
    /// maximum length.
    pub fn rows_per_step(&self) -> usize {
        self.steps.batch_size * self.micro_batches_per_step()
    }

    /// Returns the number of tokens of the largest micro-batch that can occur.
    pub fn max_micro_batch_tokens(&self) -> usize {
        if self.data.packing == Packing::Fill {
            return self
                .current_epoch
                .order
                .iter()
                .map(|row| self.row_length(row))
                .sum::<usize>()
                .min(self.token_budget());
        }
        let mut lengths: Vec<usize> = self.lengths.iter().flatten().copied().collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.iter().take(self.steps.batch_size).sum()
    }

    /// Returns the rows of a step, counted from 0.
    ///
    /// # Panics
    /// If the epoch of the step is earlier than that of the step requested last.
    pub fn step(&mut self, step: usize) -> GlobalBatch {
        while step >= self.current_epoch.first_step + self.steps_in(&self.current_epoch) {
            self.current_epoch = self.build_epoch(
                self.current_epoch.index + 1,
                self.current_epoch.first_step + self.steps_in(&self.current_epoch),
            );
        }
        let (steps, Epoch { index, first_step, order, micro_batches }) =
            (self.steps_in(&self.current_epoch), &self.current_epoch);
        let own = (step - first_step) * self.micro_batches_per_step();
        let own = &micro_batches[own..micro_batches.len().min(own + self.micro_batches_per_step())];
        let (from, to) = (own[0].start, own[own.len() - 1].end);
        GlobalBatch {
            rows: order[from..to].to_vec(),
            micro_batches: own.iter().map(|rows| rows.start - from..rows.end - from).collect(),
            epoch: (index * steps + step - first_step + 1) as f64 / steps as f64,
        }
    }

    /// Returns the number of micro-batches per step, over all ranks.
    fn micro_batches_per_step(&self) -> usize {
        self.steps.gradient_accumulation * self.world_size
    }

    /// Returns the maximum number of tokens of a micro-batch with `packing = "fill"`.
    fn token_budget(&self) -> usize {
        self.steps.batch_size.saturating_mul(self.data.max_length)
    }

    fn row_length(&self, &RowIndex { source, row }: &RowIndex) -> usize {
        self.lengths[source][row]
    }

    fn steps_in(&self, epoch: &Epoch) -> usize {
        epoch.micro_batches.len().div_ceil(self.micro_batches_per_step())
    }

    fn count_steps(&self) -> usize {
        let whole = match (self.data.packing, self.steps.epochs) {
            (Packing::Fill, Some(epochs)) => epochs as usize,
            // All epochs have the same number of steps, or the recipe gives the number of steps itself.
            _ => return self.steps.total_steps(self.steps_in(&self.current_epoch)),
        };
        let steps = |index| self.steps_in(&self.build_epoch(index, 0));
        let (before, last) = ((0..whole).map(steps).sum::<usize>(), steps(whole));
        // `total` counts as if all epochs were like the last one; the steps of the whole epochs are taken off again.
        before + self.steps.total_steps(last) - last * whole
    }

    fn build_epoch(&self, index: usize, first_step: usize) -> Epoch {
        let sources = self.lengths.iter().zip(&self.data.train);
        let size =
            |(rows, source): (&Vec<usize>, &DatasetSource)| SourceSize { rows: rows.len(), weight: source.weight };
        let sizes: Vec<SourceSize> = sources.map(size).collect();
        let mut order = epoch_order(&sizes, self.steps.seed, index as u64, self.data.shuffle);
        if self.data.group_by_length {
            group_by_length(&mut order, |row| self.row_length(row), self.rows_per_step());
        }
        let micro_batches = if self.data.packing == Packing::Fill {
            self.fill_by_tokens(&order)
        } else {
            self.split_by_rows(order.len())
        };
        Epoch { index, first_step, order, micro_batches }
    }

    /// Cuts the rows into rounds of `batch_size` rows per rank, and each round as evenly as possible among the ranks.
    fn split_by_rows(&self, rows: usize) -> Vec<Range<usize>> {
        let round = self.steps.batch_size * self.world_size;
        let part = |first: usize, rank: usize| {
            let here = round.min(rows - first);
            let each = here.div_ceil(self.world_size);
            first + (rank * each).min(here)..first + ((rank + 1) * each).min(here)
        };
        (0..rows).step_by(round).flat_map(|first| (0..self.world_size).map(move |rank| part(first, rank))).collect()
    }

    /// Fills micro-batches with as many consecutive rows as the token budget allows, at least one, and appends empty
    /// micro-batches until every rank has the same number.
    fn fill_by_tokens(&self, order: &[RowIndex]) -> Vec<Range<usize>> {
        let (mut all, mut first, mut tokens) = (Vec::new(), 0, 0);
        for (row, place) in order.iter().enumerate() {
            let length = self.row_length(place);
            if row > first && tokens + length > self.token_budget() {
                all.push(first..row);
                (first, tokens) = (row, 0);
            }
            tokens += length;
        }
        all.push(first..order.len());
        all.resize(all.len().next_multiple_of(self.world_size), order.len()..order.len());
        all
    }
}

#[cfg(test)]
#[path = "batch_sampler_tests.rs"]
mod tests;
