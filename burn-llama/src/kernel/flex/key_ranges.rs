//! The attention mask as ranges of visible keys.

use super::buffer::to_i32;
use crate::{RowSlots, kernel::AttentionMask};
use burn::backend::Flex;
use std::ops::Range;

/// The keys visible to each query of one row, as ascending ranges of indices: one range in a plain causal row, two
/// after a prefix.
#[derive(Debug)]
pub(super) struct KeyRanges {
    ranges: Vec<Range<usize>>,
    /// The start of the ranges of each query in `ranges`, and the end of the last.
    starts: Vec<usize>,
}

impl KeyRanges {
    /// Returns the ranges of each row of the batch.
    pub(super) fn of_batch(mask: &AttentionMask<Flex>) -> Vec<Self> {
        let ([rows, queries], [_, keys]) = (mask.query_segments.dims(), mask.key_segments.dims());
        let query_segments = to_i32(mask.query_segments.to_data());
        let query_positions = to_i32(mask.query_positions.to_data());
        let key_segments = to_i32(mask.key_segments.to_data());
        let key_positions = to_i32(mask.key_positions.to_data());
        let row = |row: usize| {
            let (q, k) = (row * queries..(row + 1) * queries, row * keys..(row + 1) * keys);
            Self::of_row(
                RowSlots { segments: &query_segments[q.clone()], positions: &query_positions[q] },
                RowSlots { segments: &key_segments[k.clone()], positions: &key_positions[k] },
                mask.window,
            )
        };
        (0..rows).map(row).collect()
    }

    fn of_row(queries: RowSlots<'_>, keys: RowSlots<'_>, window: Option<usize>) -> Self {
        let (cached, runs) = (keys.segments.len() - queries.segments.len(), segment_runs(keys));
        let (mut ranges, mut starts) = (Vec::<Range<usize>>::new(), vec![0]);
        for (query, (&segment, &position)) in queries.segments.iter().zip(queries.positions).enumerate() {
            let (visible, first_range) = (cached + query + 1, ranges.len());
            for run in runs.iter().take_while(|run| run.keys.start < visible) {
                if run.segment != segment && run.segment != AttentionMask::<Flex>::ANY_SEGMENT {
                    continue;
                }
                // The run has `up_to` keys up to the query's own position; the window excludes all but the last of
                // them.
                let up_to = (i64::from(position) - i64::from(run.position) + 1).max(0) as usize;
                let from = run.keys.start + window.map_or(0, |window| up_to.saturating_sub(window));
                let to = run.keys.end.min(visible).min(run.keys.start + up_to);
                match ranges[first_range..].last_mut() {
                    _ if from >= to => {}
                    Some(last) if last.end == from => last.end = to,
                    _ => ranges.push(from..to),
                }
            }
            starts.push(ranges.len());
        }
        Self { ranges, starts }
    }

    /// Returns the ranges of keys visible to a query.
    pub(super) fn of_query(&self, query: usize) -> &[Range<usize>] {
        &self.ranges[self.starts[query]..self.starts[query + 1]]
    }

    /// Returns the span from the first to the last key that is visible to any of the queries; empty if there is none.
    pub(super) fn span(&self, queries: Range<usize>) -> Range<usize> {
        let ranges = &self.ranges[self.starts[queries.start]..self.starts[queries.end]];
        let first = ranges.iter().map(|range| range.start).min().unwrap_or(0);
        first..ranges.iter().map(|range| range.end).max().unwrap_or(first)
    }
}

/// Adjacent keys of one segment with consecutive positions.
struct SegmentRun {
    keys: Range<usize>,
    segment: i32,
    /// The position of the first key.
    position: i32,
}

/// Splits the keys of a row into runs.
fn segment_runs(row: RowSlots<'_>) -> Vec<SegmentRun> {
    let mut runs: Vec<SegmentRun> = Vec::new();
    for (key, (&segment, &position)) in row.segments.iter().zip(row.positions).enumerate() {
        match runs.last_mut() {
            Some(run) if run.segment == segment && position - run.position == (key - run.keys.start) as i32 => {
                run.keys.end = key + 1;
            }
            _ => runs.push(SegmentRun { keys: key..key + 1, segment, position }),
        }
    }
    runs
}
