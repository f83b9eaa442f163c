//! Order of the rows in an epoch, as a function of seed and epoch.

use burn_peft::random;
use std::cmp::Reverse;

/// A row of a dataset that consists of several sources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RowIndex {
    /// The source, counted from 0 in the order of the recipe.
    pub source: usize,
    /// The row in its source, counted from 0.
    pub row: usize,
}

/// The size of a source.
#[derive(Debug, Clone, Copy)]
pub(super) struct SourceSize {
    /// Number of rows.
    pub rows: usize,
    /// Mean number of times that a row is seen per epoch.
    pub weight: f64,
}

/// Returns the rows of one epoch over sources of the given sizes. A weight of 2.5 takes every row twice and half of
/// them, drawn anew in every epoch, a third time. Without shuffling, the sources follow each other, each in its own
/// order.
pub(super) fn epoch_order(sources: &[SourceSize], seed: u64, epoch: u64, shuffle: bool) -> Vec<RowIndex> {
    let mut order = Vec::new();
    for (source, &SourceSize { rows, weight }) in sources.iter().enumerate() {
        for _ in 0..weight as usize {
            order.extend((0..rows).map(|row| RowIndex { source, row }));
        }
        let extra = (weight.fract() * rows as f64).round() as usize;
        let mut drawn: Vec<usize> = (0..rows).collect();
        permute(&mut drawn, random::key(&[seed, epoch, source as u64, 1]));
        drawn.truncate(extra);
        drawn.sort_unstable();
        order.extend(drawn.into_iter().map(|row| RowIndex { source, row }));
    }
    if shuffle {
        permute(&mut order, random::key(&[seed, epoch, 0, 2]));
    }
    order
}

/// Groups rows of similar length, as `transformers`' `LengthGroupedSampler` does: the order is cut into chunks with the
/// rows of up to 50 steps, each chunk is sorted from long to short, and the longest row of all is swapped with the very
/// first one, so that running out of memory shows at once.
pub(super) fn group_by_length(order: &mut [RowIndex], length: impl Fn(&RowIndex) -> usize, rows_per_step: usize) {
    let steps = (order.len() / (rows_per_step * 4)).clamp(1, 50);
    for part in order.chunks_mut(steps * rows_per_step) {
        part.sort_by_key(|row| Reverse(length(row)));
    }
    if let Some(longest) = (0..order.len()).rev().max_by_key(|&row| length(&order[row])) {
        order.swap(0, longest);
    }
}

/// Shuffles the items by the Fisher-Yates algorithm, with random numbers from `key`.
fn permute<T>(items: &mut [T], key: u64) {
    for i in (1..items.len()).rev() {
        let j = (random::uniform(key, i as u64) * (i + 1) as f64) as usize;
        items.swap(i, j);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the order of an epoch over one source of weight 1.
    fn order(rows: usize, epoch: u64, shuffle: bool) -> Vec<RowIndex> {
        epoch_order(&[SourceSize { rows, weight: 1.0 }], 7, epoch, shuffle)
    }

    #[test]
    fn an_epoch_shows_every_row_once_and_differs_from_the_next() {
        let (first, second) = (order(100, 0, true), order(100, 1, true));
        assert_ne!(first, second);
        assert_eq!(first, order(100, 0, true));
        let mut sorted = first;
        sorted.sort_unstable();
        assert_eq!(sorted, order(100, 0, false));
    }

    #[test]
    fn grouped_rows_fall_in_length_within_each_part_and_the_longest_is_first() {
        let length = |index: &RowIndex| index.row * 37 % 101;
        for (rows, per_step, part) in [(100, 2, 24), (100, 40, 40), (1000, 2, 100), (3, 8, 8), (0, 1, 1)] {
            let before = order(rows, 3, true);
            let mut after = before.clone();
            group_by_length(&mut after, length, per_step);
            assert!(after.first().is_none_or(|first| Some(length(first)) == before.iter().map(length).max()));
            // The chunks are compared after undoing the swap of the longest row.
            if let Some(longest) = after.first() {
                let home = before.iter().position(|row| row == longest).unwrap() / part * part;
                after.swap(0, home);
            }
            for (before, after) in before.chunks(part).zip(after.chunks(part)) {
                assert!(after.is_sorted_by_key(|row| Reverse(length(row))), "{rows} rows, {per_step} per step");
                let sorted = |part: &[RowIndex]| {
                    let mut part = part.to_vec();
                    part.sort_unstable();
                    part
                };
                assert_eq!(sorted(before), sorted(after));
            }
        }
    }

    #[test]
    fn weights_count_rows() {
        let sources = [2.5, 0.3].map(|weight| SourceSize { rows: 10, weight });
        let order = epoch_order(&sources, 1, 0, false);
        assert_eq!(order.iter().filter(|index| index.source == 0).count(), 25);
        assert_eq!(order.iter().filter(|index| index.source == 1).count(), 3);
    }
}
