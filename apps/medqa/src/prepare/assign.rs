//! The part of a data set that a row goes to: by the hash of its group, so that rows never move when others are added.

use super::groups::{Fingerprint, Nearness, earlier_twins};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The part of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum SplitPart {
    Train,
    Valid,
    Test,
    /// No part: the row is near to rows of two parts.
    Between,
}

/// The shares of the validation and the test rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct SplitShares {
    pub valid: f64,
    pub test: f64,
    pub seed: u64,
}

impl SplitShares {
    fn part(self, key: u128) -> SplitPart {
        let hash = xxh3_64_with_seed(&key.to_le_bytes(), self.seed);
        let place = (hash >> 11) as f64 / (1_u64 << 53) as f64;
        match place {
            place if place < self.test => SplitPart::Test,
            place if place < self.test + self.valid => SplitPart::Valid,
            _ => SplitPart::Train,
        }
    }

    /// Returns the part of each row. A row that is equal or near to earlier ones goes where they are; if those stand in
    /// several parts, it goes to none. So rows that are added behind the others change nothing.
    pub(crate) fn by_question(self, rows: &[Fingerprint], nearness: Nearness) -> Vec<SplitPart> {
        let twins = earlier_twins(rows, nearness);
        let mut parts: Vec<SplitPart> = Vec::with_capacity(rows.len());
        for (row, earlier) in rows.iter().zip(&twins) {
            let mut found: Vec<SplitPart> =
                earlier.iter().filter_map(|&row| parts.get(row as usize).copied()).collect();
            // The twin of a row that stands between two parts stands there too.
            let between = |&twin: &u32| {
                parts.get(twin as usize) == Some(&SplitPart::Between) && rows[twin as usize].exact == row.exact
            };
            if earlier.iter().any(between) {
                parts.push(SplitPart::Between);
                continue;
            }
            found.retain(|part| *part != SplitPart::Between);
            found.sort_unstable();
            found.dedup();
            parts.push(match found.as_slice() {
                [] => self.part(row.exact),
                [only] => *only,
                _ => SplitPart::Between,
            });
        }
        parts
    }

    /// Returns the part of a row by the value of a column, such as a patient or a source.
    pub(crate) fn by_value(self, value: &str) -> SplitPart {
        self.part(xxhash_rust::xxh3::xxh3_128(value.as_bytes()))
    }
}
