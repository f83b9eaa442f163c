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
        let past = keys[0].len() - queries[0].len();
        let (mut ranges, mut starts) = (Vec::new(), vec![0]);
        for (query, (&segment, &position)) in queries[0].iter().zip(queries[1]).enumerate() {
            let mut open: Option<usize> = None;
            let seen = past + query + 1;
            for (key, (&of, &at)) in keys[0][..seen].iter().zip(keys[1]).enumerate() {
                let distance = position - at;
                let within = distance >= 0 && window.is_none_or(|window| (distance as usize) < window);
                let sees = within && (of == segment || of == Visibility::<Flex>::ANY);
                match open {
                    None if sees => open = Some(key),
                    Some(first) if !sees => {
                        ranges.push(first..key);
                        open = None;
                    }
                    _ => {}
                }
            }
            ranges.extend(open.map(|first| first..seen));
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
