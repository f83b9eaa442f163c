//! NF4 with double quantization (Dettmers et al., 2023, arXiv:2305.14314), with the numbers of bitsandbytes.
//!
//! 64 consecutive values form a block; each is encoded as the nearest of 16 quantiles of a normal distribution times
//! the largest magnitude of the block (absmax). The absmax values, minus their mean, are quantized in turn: each group
//! of 256 shares a second scale and is rounded to 8 bits.
//!
//! bitsandbytes counts blocks over the whole weight. Here every row also carries the scales of its own blocks, so that
//! rows can be read one by one: per block one byte of absmax and 32 bytes of values (the lower halves are the first
//! 32), then the number of its blocks that belong to the row's first group of 256, the mean, and the scales of its
//! groups.
#![allow(clippy::needless_range_loop)] // As in the other decoders.

use super::{LANES, RowCodec, accumulate_dot};
use std::sync::LazyLock;

/// Values in a block, which share an absmax.
pub const BLOCK_SIZE: usize = 64;
/// Blocks in a group, whose absmax values share a scale.
const GROUP_SIZE: usize = 256;
/// Bytes in a block.
const BLOCK_BYTES: usize = 1 + BLOCK_SIZE / 2;

/// The sixteen quantiles, as bitsandbytes rounds them.
#[allow(clippy::excessive_precision)] // The source's digits.
pub const VALUES: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// The boundaries between the values: a number between two boundaries is rounded to the value there.
#[allow(clippy::excessive_precision)] // The source's digits.
const BOUNDARIES: [f32; 15] = [
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
];

/// The 256 values of bitsandbytes' signed dynamic map, in order: seven decades, each divided twice as finely as the one
/// below.
pub static DYNAMIC_MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut all = vec![0.0f32, 1.0];
    for decade in 0..7 {
        let (parts, power) = (1usize << decade, 10f64.powi(decade - 6) as f32);
        // `torch.linspace(0.1, 1, parts + 1)`, which computes the upper half from its end.
        let step = (1.0f32 - 0.1) / parts as f32;
        let bound =
            |i: usize| if i < parts.div_ceil(2) { 0.1 + step * i as f32 } else { 1.0 - step * (parts - i) as f32 };
        for i in 0..parts {
            let mean = power * ((bound(i) + bound(i + 1)) / 2.0);
            all.extend([mean, -mean]);
        }
    }
    all.sort_by(f32::total_cmp);
    let mut map = [0.0; 256];
    map.copy_from_slice(&all);
    map
});

/// Returns the largest number of groups that a row of so many blocks can touch.
pub(crate) const fn max_groups(blocks: usize) -> usize {
    (blocks + GROUP_SIZE - 2) / GROUP_SIZE + 1
}

/// Returns the number of bytes in a row.
pub(crate) const fn row_bytes(features: usize) -> usize {
    let blocks = features / BLOCK_SIZE;
    blocks * BLOCK_BYTES + 8 + 4 * max_groups(blocks)
}

/// Encodes the rows of `values` as NF4, one after the other.
///
/// # Errors
/// Returns the first value that is not finite.
///
/// # Panics
/// If the features are not whole blocks.
pub fn encode(values: &[f32], features: usize) -> Result<Vec<u8>, f32> {
    assert!(
        features.is_multiple_of(BLOCK_SIZE) && features > 0,
        "NF4: {features} features are not blocks of {BLOCK_SIZE}"
    );
    if let Some(&value) = values.iter().find(|value| !value.is_finite()) {
        return Err(value);
    }
    let (blocks, _) = values.as_chunks::<BLOCK_SIZE>();
    let largest: Vec<f32> = blocks.iter().map(|block| block.iter().fold(0.0, |max, x| x.abs().max(max))).collect();
    let mean = (largest.iter().map(|&x| f64::from(x)).sum::<f64>() / largest.len().max(1) as f64) as f32;
    let scale = |group: &[f32]| group.iter().fold(0.0f32, |max, x| (x - mean).abs().max(max));
    let scales: Vec<f32> = largest.chunks(GROUP_SIZE).map(scale).collect();
    let per_row = features / BLOCK_SIZE;
    let mut out = Vec::with_capacity(values.len() / features * row_bytes(features));
    for first in (0..blocks.len()).step_by(per_row) {
        for index in first..first + per_row {
            let scale = scales[index / GROUP_SIZE];
            out.push(if scale > 0.0 { nearest((largest[index] - mean) / scale) } else { nearest(0.0) });
            encode_block(&blocks[index], largest[index], &mut out);
        }
        let in_first = per_row.min(GROUP_SIZE - first % GROUP_SIZE);
        out.extend((in_first as u32).to_le_bytes());
        out.extend(mean.to_le_bytes());
        for group in first / GROUP_SIZE..first / GROUP_SIZE + max_groups(per_row) {
            out.extend(scales.get(group).copied().unwrap_or(0.0).to_le_bytes());
        }
    }
    Ok(out)
}

/// Returns the index of the nearest value of the dynamic map.
fn nearest(x: f32) -> u8 {
    let above = DYNAMIC_MAP.partition_point(|&value| value < x).min(255);
    let below = above.saturating_sub(1);
    if (x - DYNAMIC_MAP[below]).abs() < (DYNAMIC_MAP[above] - x).abs() { below as u8 } else { above as u8 }
}

/// Encodes the values of a block, scaled by its absmax, and appends them.
fn encode_block(values: &[f32; BLOCK_SIZE], largest: f32, out: &mut Vec<u8>) {
    // A block of subnormal numbers has no finite inverse; its values become zero.
    let inverse = if largest > f32::MIN_POSITIVE { 1.0 / largest } else { 0.0 };
    let code = |value: f32| BOUNDARIES.iter().filter(|&&limit| value * inverse > limit).count() as u8;
    let half = BLOCK_SIZE / 2;
    out.extend((0..half).map(|i| code(values[i]) | code(values[i + half]) << 4));
}

/// The fields of an encoded row.
struct Nf4Row<'a> {
    blocks: &'a [[u8; BLOCK_BYTES]],
    blocks_in_first_group: usize,
    mean: f32,
    scales: &'a [[u8; 4]],
}

impl<'a> Nf4Row<'a> {
    #[inline(always)]
    fn new(bytes: &'a [u8], features: usize) -> Self {
        assert_eq!(bytes.len(), row_bytes(features), "NF4: these bytes are not a row of {features} features");
        let (blocks, rest) = bytes.split_at(features / BLOCK_SIZE * BLOCK_BYTES);
        let (words, _) = rest.as_chunks::<4>();
        let (head, scales) = words.split_at(2);
        Self {
            blocks: blocks.as_chunks().0,
            blocks_in_first_group: u32::from_le_bytes(head[0]) as usize,
            mean: f32::from_le_bytes(head[1]),
            scales,
        }
    }

    /// Calls `work` with the index and the decoded values of every block.
    #[inline(always)]
    fn for_each_block(&self, map: &[f32; 256], mut work: impl FnMut(usize, &[f32; BLOCK_SIZE])) {
        let mut values = [0.0; BLOCK_SIZE];
        for index in 0..self.blocks.len() {
            let block = &self.blocks[index];
            let group = (index + GROUP_SIZE - self.blocks_in_first_group) / GROUP_SIZE;
            let scale = map[block[0] as usize] * f32::from_le_bytes(self.scales[group]) + self.mean;
            let mut codes = [0u8; BLOCK_SIZE];
            for i in 0..BLOCK_SIZE / 2 {
                codes[i] = block[1 + i] & 15;
            }
            for i in 0..BLOCK_SIZE / 2 {
                codes[i + BLOCK_SIZE / 2] = block[1 + i] >> 4;
            }
            for i in 0..BLOCK_SIZE {
                values[i] = VALUES[(codes[i] & 15) as usize] * scale;
            }
            work(index, &values);
        }
    }
}

/// Row codec of NF4.
pub(super) struct Nf4Codec;

impl RowCodec for Nf4Codec {
    #[inline(always)]
    fn decode(bytes: &[u8], out: &mut [f32]) {
        let row = Nf4Row::new(bytes, out.len());
        let (out, _) = out.as_chunks_mut::<BLOCK_SIZE>();
        row.for_each_block(&DYNAMIC_MAP, |index, values| out[index] = *values);
    }

    #[inline(always)]
    fn dot(bytes: &[u8], x: &[f32]) -> f32 {
        let row = Nf4Row::new(bytes, x.len());
        let ((x, _), mut sums) = (x.as_chunks::<BLOCK_SIZE>(), [0.0; LANES]);
        row.for_each_block(&DYNAMIC_MAP, |index, values| accumulate_dot(&mut sums, values, &x[index]));
        sums.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_is_the_one_of_bitsandbytes() {
        assert_eq!((DYNAMIC_MAP[127], DYNAMIC_MAP[255]), (0.0, 1.0));
        // The ends of `create_dynamic_map(signed=True)`: 55 % of the lowest decade, and the last part of the highest.
        for (found, expected) in
            [(DYNAMIC_MAP[0], -0.992_968_75), (DYNAMIC_MAP[254], 0.992_968_75), (DYNAMIC_MAP[128], 5.5e-7f32)]
        {
            assert!((found - expected).abs() <= 2e-7 * expected.abs(), "{found} against {expected}");
        }
        assert!(DYNAMIC_MAP.is_sorted());
        assert!(VALUES.iter().zip(DYNAMIC_MAP.iter()).all(|(a, b)| a.is_finite() && b.is_finite()));
        assert!((0..256).all(|i| nearest(DYNAMIC_MAP[i]) as usize == i));
        for (limit, pair) in BOUNDARIES.iter().zip(VALUES.windows(2)) {
            assert!((limit - (pair[0] + pair[1]) / 2.0).abs() < 1e-6);
        }
    }

    #[test]
    fn a_row_touches_no_more_groups_than_it_carries() {
        for blocks in 1..1100 {
            let touched = (0..GROUP_SIZE).map(|first| (first + blocks - 1) / GROUP_SIZE + 1).max();
            assert_eq!(touched, Some(max_groups(blocks)), "{blocks}");
        }
    }
}
