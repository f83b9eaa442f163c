//! Which rows make which step of a run, as a function of the recipe, the lengths of the rows and the number of ranks.
//!
//! An epoch's order is cut into micro-batches, and so many of these in turn, of all ranks, are a step.

use super::order::{epoch_order, group_by_length};
use crate::recipe::{Data, Packing, Recipe, Steps};
use anyhow::{Result, bail};
use std::ops::Range;

/// The steps of a run.
#[derive(Debug)]
pub struct Plan {
    data: Data,
    steps: Steps,
    world: usize,
    /// Tokens of every row of every source.
    lengths: Vec<Vec<usize>>,
    /// The epoch of the step that was asked for last.
    epoch: Epoch,
    total: usize,
}

#[derive(Debug, Default)]
struct Epoch {
    /// Counted from 0.
    index: usize,
    /// The step that it begins with.
    first: usize,
    /// All rows, as (source, row).
    order: Vec<(usize, usize)>,
    /// Ranges of `order`, one of each rank in turn.
    micro_batches: Vec<Range<usize>>,
}

/// One optimizer step of all ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Its rows, as (source, row).
    pub rows: Vec<(usize, usize)>,
    /// Ranges of `rows`, one of each rank in turn. An empty one has nothing to learn.
    pub micro_batches: Vec<Range<usize>>,
    /// Passes over the data with its end.
    pub epoch: f64,
}

impl Step {
    /// The micro-batches of one of `world` ranks; all ranks have as many.
    pub fn of_rank(&self, rank: usize, world: usize) -> impl Iterator<Item = Range<usize>> {
        self.micro_batches.iter().skip(rank).step_by(world).cloned()
    }
}

impl Plan {
    /// The plan for `world` ranks and rows of so many tokens, by source.
    ///
    /// # Errors
    /// If weights of sources leave an epoch without a row.
    pub fn new(recipe: &Recipe, lengths: Vec<Vec<usize>>, world: usize) -> Result<Self> {
        let (data, steps) = (recipe.data.clone(), recipe.train.steps.clone());
        let mut plan = Self { data, steps, world, lengths, epoch: Epoch::default(), total: 0 };
        plan.epoch = plan.epoch(0, 0);
        if plan.epoch.order.is_empty() {
            bail!("`data.train`: expected weights that leave an epoch at least one row, found none");
        }
        plan.total = plan.count();
        Ok(plan)
    }

    /// Steps of the whole run.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Rows per step, of all ranks; with `packing = "fill"` only if they were as long as rows can be.
    pub fn rows_per_step(&self) -> usize {
        self.steps.batch_size * self.per_step()
    }

    /// Tokens of the largest micro-batch that an epoch could hold.
    pub fn most_tokens(&self) -> usize {
        if self.data.packing == Packing::Fill {
            return self.epoch.order.iter().map(|row| self.length(row)).sum::<usize>().min(self.budget());
        }
        let mut lengths: Vec<usize> = self.lengths.iter().flatten().copied().collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.iter().take(self.steps.batch_size).sum()
    }

    /// A step, counted from 0.
    ///
    /// # Panics
    /// If its epoch lies before that of the step that was asked for last.
    pub fn step(&mut self, step: usize) -> Step {
        while step >= self.epoch.first + self.steps_of(&self.epoch) {
            self.epoch = self.epoch(self.epoch.index + 1, self.epoch.first + self.steps_of(&self.epoch));
        }
        let (steps, Epoch { index, first, order, micro_batches }) = (self.steps_of(&self.epoch), &self.epoch);
        let own = (step - first) * self.per_step();
        let own = &micro_batches[own..micro_batches.len().min(own + self.per_step())];
        let (from, to) = (own[0].start, own[own.len() - 1].end);
        Step {
            rows: order[from..to].to_vec(),
            micro_batches: own.iter().map(|rows| rows.start - from..rows.end - from).collect(),
            epoch: (index * steps + step - first + 1) as f64 / steps as f64,
        }
    }

    /// Micro-batches per step, of all ranks.
    fn per_step(&self) -> usize {
        self.steps.gradient_accumulation * self.world
    }

    /// The most tokens of a micro-batch with `packing = "fill"`.
    fn budget(&self) -> usize {
        self.steps.batch_size.saturating_mul(self.data.max_length)
    }

    fn length(&self, &(source, row): &(usize, usize)) -> usize {
        self.lengths[source][row]
    }

    fn steps_of(&self, epoch: &Epoch) -> usize {
        epoch.micro_batches.len().div_ceil(self.per_step())
    }

    fn count(&self) -> usize {
        let whole = match (self.data.packing, self.steps.epochs) {
            (Packing::Fill, Some(epochs)) => epochs as usize,
            // All epochs have as many steps, or their number does not matter.
            _ => return self.steps.total(self.steps_of(&self.epoch)),
        };
        let steps = |index| self.steps_of(&self.epoch(index, 0));
        let (before, last) = ((0..whole).map(steps).sum::<usize>(), steps(whole));
        // What `total` counts beyond the whole epochs, if all were like the last.
        before + self.steps.total(last) - last * whole
    }

    fn epoch(&self, index: usize, first: usize) -> Epoch {
        let sources = self.lengths.iter().zip(&self.data.train);
        let sizes: Vec<_> = sources.map(|(rows, source)| (rows.len(), source.weight)).collect();
        let mut order = epoch_order(&sizes, self.steps.seed, index as u64, self.data.shuffle);
        if self.data.group_by_length {
            group_by_length(&mut order, |row| self.length(row), self.rows_per_step());
        }
        let micro_batches =
            if self.data.packing == Packing::Fill { self.filled(&order) } else { self.cut(order.len()) };
        Epoch { index, first, order, micro_batches }
    }

    /// Rounds of `batch_size` rows of each rank, cut as evenly as they come.
    fn cut(&self, rows: usize) -> Vec<Range<usize>> {
        let round = self.steps.batch_size * self.world;
        let part = |first: usize, rank: usize| {
            let here = round.min(rows - first);
            let each = here.div_ceil(self.world);
            first + (rank * each).min(here)..first + ((rank + 1) * each).min(here)
        };
        (0..rows).step_by(round).flat_map(|first| (0..self.world).map(move |rank| part(first, rank))).collect()
    }

    /// In turn as many rows as the budget holds, at least one; at the end so many empty micro-batches that all ranks have as many.
    fn filled(&self, order: &[(usize, usize)]) -> Vec<Range<usize>> {
        let (mut all, mut first, mut tokens) = (Vec::new(), 0, 0);
        for (row, place) in order.iter().enumerate() {
            let length = self.length(place);
            if row > first && tokens + length > self.budget() {
                all.push(first..row);
                (first, tokens) = (row, 0);
            }
            tokens += length;
        }
        all.push(first..order.len());
        all.resize(all.len().next_multiple_of(self.world), order.len()..order.len());
        all
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
