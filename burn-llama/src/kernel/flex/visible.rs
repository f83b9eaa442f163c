//! Which keys a query sees, as ranges.

use super::buffer::integers;
use crate::kernel::Visibility;
use burn::backend::Flex;
use std::ops::Range;

/// The keys that the queries of one row see, as ranges of indices in ascending order: one for a plain causal row, two where
/// a prefix comes first.
#[derive(Debug)]
pub(super) struct Visible {
    ranges: Vec<Range<usize>>,
    /// Where the ranges of each query start in `ranges`, and the end of the last.
    starts: Vec<usize>,
}

impl Visible {
    /// One per row of the batch.
    pub(super) fn rows(visibility: &Visibility<Flex>) -> Vec<Self> {
        let ([rows, queries], [_, keys]) = (visibility.query_segments.dims(), visibility.key_segments.dims());
        let query_segments = integers(visibility.query_segments.to_data());
        let query_positions = integers(visibility.query_positions.to_data());
        let key_segments = integers(visibility.key_segments.to_data());
        let key_positions = integers(visibility.key_positions.to_data());
        let row = |row: usize| {
            let (q, k) = (row * queries..(row + 1) * queries, row * keys..(row + 1) * keys);
            Self::row(
                [&query_segments[q.clone()], &query_positions[q]],
                [&key_segments[k.clone()], &key_positions[k]],
                visibility.window,
            )
        };
        (0..rows).map(row).collect()
    }

    fn row(queries: [&[i32]; 2], keys: [&[i32]; 2], window: Option<usize>) -> Self {
        let (past, runs) = (keys[0].len() - queries[0].len(), runs(keys));
        let (mut ranges, mut starts) = (Vec::<Range<usize>>::new(), vec![0]);
        for (query, (&segment, &position)) in queries[0].iter().zip(queries[1]).enumerate() {
            let (seen, mine) = (past + query + 1, ranges.len());
            for run in runs.iter().take_while(|run| run.keys.start < seen) {
                if run.segment != segment && run.segment != Visibility::<Flex>::ANY {
                    continue;
                }
                // Keys of the run up to the query's own position, and how many of them the window still holds.
                let up_to = (i64::from(position) - i64::from(run.position) + 1).max(0) as usize;
                let from = run.keys.start + window.map_or(0, |window| up_to.saturating_sub(window));
                let to = run.keys.end.min(seen).min(run.keys.start + up_to);
                match ranges[mine..].last_mut() {
                    _ if from >= to => {}
                    Some(last) if last.end == from => last.end = to,
                    _ => ranges.push(from..to),
                }
            }
            starts.push(ranges.len());
        }
        Self { ranges, starts }
    }

    /// The ranges that a query sees.
    pub(super) fn of(&self, query: usize) -> &[Range<usize>] {
        &self.ranges[self.starts[query]..self.starts[query + 1]]
    }

    /// From the first to the last key that any of the queries sees; empty if none sees any.
    pub(super) fn span(&self, queries: Range<usize>) -> Range<usize> {
        let ranges = &self.ranges[self.starts[queries.start]..self.starts[queries.end]];
        let first = ranges.iter().map(|range| range.start).min().unwrap_or(0);
        first..ranges.iter().map(|range| range.end).max().unwrap_or(first)
    }
}

/// Keys of one segment whose positions follow each other.
struct Run {
    keys: Range<usize>,
    segment: i32,
    /// Of the first.
    position: i32,
}

fn runs([segments, positions]: [&[i32]; 2]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (key, (&segment, &position)) in segments.iter().zip(positions).enumerate() {
        match runs.last_mut() {
            Some(run) if run.segment == segment && position - run.position == (key - run.keys.start) as i32 => {
                run.keys.end = key + 1;
            }
            _ => runs.push(Run { keys: key..key + 1, segment, position }),
        }
    }
    runs
}
