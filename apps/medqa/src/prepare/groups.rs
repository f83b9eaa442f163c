//! Groups of rows that ask the same: equal questions, and near ones found by MinHash and compared one by one.
//!
//! A signature has 128 hashes in bands of 4 (of 8 for long texts). Rows that agree in a band are compared by the Jaccard
//! similarity of their shingles: pairs of Han characters or of words for questions, runs of five for long texts. 1 M
//! questions of 15 units take about 500 MB.

use super::{
    agreement::{QuestionDetails, jaccard},
    units::Units,
};
use rayon::prelude::*;
use std::collections::HashMap;

/// The number of hashes of a signature.
const HASHES: usize = 128;
/// Units below which texts are compared exactly only.
const SHORTEST: usize = 4;
/// The largest number of earlier rows in a band's bucket that a row is compared with.
const COMPARED: usize = 64;

/// The kind of texts that are compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Nearness {
    /// The least Jaccard similarity of two texts that count as one.
    pub threshold: f64,
    /// True for answers and other long texts, whose details need not agree.
    pub long: bool,
    /// The seed of the hashes.
    pub seed: u64,
}

impl Nearness {
    /// Returns the usual comparison of questions.
    pub(crate) fn questions() -> Self {
        Self { threshold: 0.5, long: false, seed: 42 }
    }

    fn shingle(self) -> usize {
        if self.long { 5 } else { 2 }
    }

    fn rows_per_band(self) -> usize {
        if self.long { 8 } else { 4 }
    }
}

/// The text of a row, as it is compared.
#[derive(Debug, Clone)]
pub(crate) struct Fingerprint {
    /// Equal for texts that differ only in punctuation, spaces and case.
    pub exact: u128,
    /// Hashes of the shingles, in order and without repeats; none for a short text.
    shingles: Vec<u32>,
    details: QuestionDetails,
    /// A key for each band.
    bands: Vec<u32>,
}

impl Fingerprint {
    /// Computes the fingerprint of a text.
    pub(crate) fn new(text: &str, nearness: Nearness) -> Self {
        let units = Units::of(text);
        let exact = units.exact_hash();
        let mut shingles: Vec<u32> = Vec::new();
        if units.len() >= SHORTEST.max(nearness.shingle()) {
            shingles.extend(units.grams(nearness.shingle(), nearness.seed).iter().map(|&hash| (hash >> 32) as u32));
            shingles.sort_unstable();
            shingles.dedup();
        }
        let bands = if shingles.is_empty() { Vec::new() } else { bands(&shingles, nearness) };
        let details = if nearness.long { QuestionDetails::default() } else { QuestionDetails::of(&units) };
        Self { exact, shingles, details, bands }
    }

    fn is_near(&self, other: &Self, nearness: Nearness) -> bool {
        self.details.agree(&other.details) && jaccard(&self.shingles, &other.shingles) >= nearness.threshold
    }
}

/// Returns a key for each band of the MinHash signature.
fn bands(shingles: &[u32], nearness: Nearness) -> Vec<u32> {
    let mut state = nearness.seed | 1;
    let mut next = || {
        // The sequence of SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
    };
    let signature: Vec<u32> = (0..HASHES)
        .map(|_| {
            let (factor, term) = (next() | 1, next());
            let hash = |&shingle: &u32| (u64::from(shingle).wrapping_mul(factor).wrapping_add(term) >> 32) as u32;
            shingles.iter().map(hash).min().unwrap_or(u32::MAX)
        })
        .collect();
    let key =
        |band: &[u32]| band.iter().fold(0_u32, |key, &hash| (key.rotate_left(7) ^ hash).wrapping_mul(0x9e37_79b1));
    signature.chunks(nearness.rows_per_band()).map(key).collect()
}

/// Returns, for every row, the earlier rows that it is equal to or near to, in order.
pub(crate) fn earlier_twins(rows: &[Fingerprint], nearness: Nearness) -> Vec<Vec<u32>> {
    let mut twins: Vec<Vec<u32>> = vec![Vec::new(); rows.len()];
    let mut first: HashMap<u128, u32> = HashMap::with_capacity(rows.len());
    for (index, row) in rows.iter().enumerate() {
        match first.get(&row.exact) {
            Some(&earlier) => twins[index].push(earlier),
            None => drop(first.insert(row.exact, index as u32)),
        }
    }
    // Equal rows are compared by their first one only.
    let distinct: Vec<u32> = (0..rows.len() as u32).filter(|&index| twins[index as usize].is_empty()).collect();
    for band in 0..HASHES / nearness.rows_per_band() {
        for Pair { later, earlier } in band_pairs(rows, &distinct, band, nearness) {
            twins[later as usize].push(earlier);
        }
    }
    twins.par_iter_mut().for_each(|earlier| {
        earlier.sort_unstable();
        earlier.dedup();
    });
    twins
}

/// Two rows that are near to each other.
struct Pair {
    later: u32,
    earlier: u32,
}

/// Returns the near pairs among rows with the same key in a band.
fn band_pairs(rows: &[Fingerprint], distinct: &[u32], band: usize, nearness: Nearness) -> Vec<Pair> {
    let key = |row: u32| rows[row as usize].bands.get(band).copied();
    let mut keyed: Vec<(u32, u32)> = distinct.iter().filter_map(|&row| Some((key(row)?, row))).collect();
    keyed.par_sort_unstable();
    let buckets: Vec<&[(u32, u32)]> =
        keyed.chunk_by(|one, other| one.0 == other.0).filter(|bucket| bucket.len() > 1).collect();
    let pairs = buckets.par_iter().flat_map_iter(|bucket| {
        bucket.iter().enumerate().flat_map(move |(index, &(_, later))| {
            let before = bucket.iter().take(index.min(COMPARED)).map(|&(_, earlier)| earlier);
            let near = move |earlier: &u32| rows[later as usize].is_near(&rows[*earlier as usize], nearness);
            before.filter(near).map(move |earlier| Pair { later, earlier })
        })
    });
    pairs.collect()
}

/// Returns the first row of every row's group.
pub(crate) fn first_of_group(twins: &[Vec<u32>]) -> Vec<u32> {
    let mut parent: Vec<u32> = (0..twins.len() as u32).collect();
    for (row, earlier) in twins.iter().enumerate() {
        for &other in earlier {
            let (one, other) = (root(&mut parent, row as u32), root(&mut parent, other));
            // The first row stays the root.
            parent[one.max(other) as usize] = one.min(other);
        }
    }
    (0..twins.len() as u32).map(|row| root(&mut parent, row)).collect()
}

fn root(parent: &mut [u32], mut row: u32) -> u32 {
    while parent[row as usize] != row {
        parent[row as usize] = parent[parent[row as usize] as usize];
        row = parent[row as usize];
    }
    row
}
