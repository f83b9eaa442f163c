//! 8-bit moments (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022).
//!
//! A block of 256 values has one f32 scale, its absolute maximum, and one byte per value: an index into a table of
//! quantization levels that are dense near zero (bitsandbytes' `create_dynamic_map`). Blocks start at multiples of 256
//! in their parameter, so they are the same in every world size.

use super::cpu_adam::{AdamSlices, AdamUpdate};
use crate::sharding::ALIGN;
use rayon::prelude::*;
use std::sync::LazyLock;

/// Parameters of fewer values keep 32-bit moments (bitsandbytes' `min_8bit_size`).
pub(crate) const MIN_8BIT_SIZE: usize = 4096;

/// The two quantized moments of a shard.
#[derive(Debug, Clone)]
pub(crate) struct EightBitMoments {
    exp_avg: QuantizedMoment,
    exp_avg_sq: QuantizedMoment,
}

#[derive(Debug, Clone)]
struct QuantizedMoment {
    codes: Vec<u8>,
    scales: Vec<f32>,
}

static SIGNED: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(true));
static UNSIGNED: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(false));

/// The 256 quantization levels and a table that finds the level nearest to a value in `[-1, 1]`. The table is indexed
/// by the value's sign, exponent and first 7 mantissa bits; the values with one such index form a *cell*, which spans
/// at most two levels.
struct DynamicMap {
    /// The levels, in ascending order.
    levels: [f32; 256],
    /// The code of the lowest value in each cell; the negative cells follow the others.
    cells: [u8; 2 * CELLS],
    /// The lowest value of each code; the last entry is above every value.
    bounds: [f32; 257],
}

/// The lower bound of the cells: values nearer to zero share the first cell; the last cell starts at 1.
const FIRST_CELL_BITS: u32 = f32::EPSILON.to_bits();
const CELL_SHIFT: u32 = 16;
const CELLS: usize = ((1f32.to_bits() - FIRST_CELL_BITS) >> CELL_SHIFT) as usize + 1;

impl DynamicMap {
    fn new(signed: bool) -> Self {
        let levels = dynamic_map(signed);
        let bounds = std::array::from_fn(|code| match code {
            0 => f32::NEG_INFINITY,
            256 => f32::INFINITY,
            _ => {
                let mut bound = (levels[code - 1] + levels[code]) / 2.0;
                while usize::from(nearest(&levels, bound)) >= code {
                    bound = bound.next_down();
                }
                while usize::from(nearest(&levels, bound)) < code {
                    bound = bound.next_up();
                }
                bound
            }
        });
        let start =
            |cell: usize| if cell == 0 { 0.0 } else { f32::from_bits(FIRST_CELL_BITS + ((cell as u32) << CELL_SHIFT)) };
        let end = |cell: usize| if cell + 1 == CELLS { 1.0 } else { start(cell + 1).next_down() };
        let cells = std::array::from_fn(|cell| {
            let ends = if cell < CELLS { [start(cell), end(cell)] } else { [-end(cell - CELLS), -start(cell - CELLS)] };
            let [low, high] = ends.map(|value| nearest(&levels, value));
            assert!(high - low <= 1, "a cell spans at most two codes");
            low
        });
        Self { levels, cells, bounds }
    }

    /// Returns the code of the level nearest to a value between -1 and 1.
    #[inline(always)]
    fn code(&self, value: f32) -> u8 {
        let bits = value.to_bits();
        let cell = (((bits & !(1 << 31)).max(FIRST_CELL_BITS) - FIRST_CELL_BITS) >> CELL_SHIFT) as usize;
        let low = self.cells[cell.min(CELLS - 1) + (bits >> 31) as usize * CELLS];
        low + u8::from(value >= self.bounds[usize::from(low) + 1])
    }
}

/// Returns the quantization levels in ascending order: for every power of ten down to 1e-7 the midpoints of equal
/// intervals between 0.1 and 1, twice as many for each larger power, plus 0 and 1.
fn dynamic_map(signed: bool) -> [f32; 256] {
    let mut map = vec![0.0, 1.0];
    for i in 0..7 {
        let items = if signed { (1usize << i) + 1 } else { (1usize << (i + 1)) + 1 };
        let bound = |k: usize| 0.1 + 0.9 * k as f64 / (items - 1) as f64;
        for k in 0..items - 1 {
            let mean = (bound(k) + bound(k + 1)) / 2.0 * 10f64.powi(i - 6);
            map.push(mean as f32);
            if signed {
                map.push(-mean as f32);
            }
        }
    }
    map.sort_by(f32::total_cmp);
    map.try_into().expect("there are 256 levels")
}

/// Returns the index of the level nearest to `value`.
fn nearest(map: &[f32], value: f32) -> u8 {
    let above = map.partition_point(|&number| number < value).min(map.len() - 1);
    let below = above.saturating_sub(1);
    (if value - map[below] < map[above] - value { below } else { above }) as u8
}

impl QuantizedMoment {
    fn new(n: usize, map: &DynamicMap) -> Self {
        Self { codes: vec![map.code(0.0); n], scales: vec![0.0; n.div_ceil(ALIGN)] }
    }

    fn dequantize(&self, map: &DynamicMap) -> Vec<f32> {
        let mut values = vec![0.0; self.codes.len()];
        let blocks = values.chunks_mut(ALIGN).zip(self.codes.chunks(ALIGN)).zip(&self.scales);
        blocks.for_each(|((values, codes), &scale)| dequantize_block(map, codes, scale, values));
        values
    }

    /// Quantizes values with the given block scales, or with the blocks' absolute maxima.
    fn quantize(&mut self, map: &DynamicMap, values: &[f32], scales: Option<&[f32]>) {
        let blocks = values.chunks(ALIGN).zip(self.codes.chunks_mut(ALIGN)).zip(&mut self.scales);
        blocks.enumerate().for_each(|(i, ((values, codes), scale))| {
            *scale = scales.map_or_else(|| absmax(values), |scales| scales[i]);
            quantize_block(map, values, *scale, codes);
        });
    }
}

fn dequantize_block(map: &DynamicMap, codes: &[u8], scale: f32, values: &mut [f32]) {
    values.iter_mut().zip(codes).for_each(|(value, &code)| *value = map.levels[usize::from(code)] * scale);
}

fn absmax(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |largest, value| largest.max(value.abs()))
}

fn quantize_block(map: &DynamicMap, values: &[f32], scale: f32, codes: &mut [u8]) {
    let unit = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    codes.iter_mut().zip(values).for_each(|(code, &value)| *code = map.code(value * unit));
}

impl EightBitMoments {
    pub(crate) fn new(n: usize) -> Self {
        Self { exp_avg: QuantizedMoment::new(n, &SIGNED), exp_avg_sq: QuantizedMoment::new(n, &UNSIGNED) }
    }

    /// Quantizes 32-bit moments, with the block scales that they had as 8-bit moments before, if any.
    pub(crate) fn from_values([exp_avg, exp_avg_sq]: [&[f32]; 2], scales: Option<[&[f32]; 2]>) -> Self {
        let mut new = Self::new(exp_avg.len());
        new.exp_avg.quantize(&SIGNED, exp_avg, scales.map(|scales| scales[0]));
        new.exp_avg_sq.quantize(&UNSIGNED, exp_avg_sq, scales.map(|scales| scales[1]));
        new
    }

    /// Returns both moments in 32 bits.
    pub(crate) fn values(&self) -> [Vec<f32>; 2] {
        [self.exp_avg.dequantize(&SIGNED), self.exp_avg_sq.dequantize(&UNSIGNED)]
    }

    /// Returns the block scales of both moments.
    pub(crate) fn scales(&self) -> [&[f32]; 2] {
        [&self.exp_avg.scales, &self.exp_avg_sq.scales]
    }

    /// Returns the bytes of codes and scales.
    pub(crate) fn bytes(&self) -> usize {
        [&self.exp_avg, &self.exp_avg_sq].iter().map(|codes| codes.codes.len() + 4 * codes.scales.len()).sum()
    }

    /// Applies Adam's update block by block: dequantizes, updates, quantizes.
    pub(crate) fn apply(&mut self, update: &AdamUpdate, parameter: &mut [f32], gradient: &[f32]) {
        let (constants, first, second) = (update.constants(), &mut self.exp_avg, &mut self.exp_avg_sq);
        let blocks = parameter.par_chunks_mut(ALIGN).zip(gradient.par_chunks(ALIGN));
        let blocks = blocks.zip(first.codes.par_chunks_mut(ALIGN).zip(first.scales.par_iter_mut()));
        let blocks = blocks.zip(second.codes.par_chunks_mut(ALIGN).zip(second.scales.par_iter_mut()));
        blocks.for_each(|(((parameter, gradient), (m, m_scale)), (v, v_scale))| {
            let n = parameter.len();
            let (mut exp_avg, mut exp_avg_sq) = ([0.0; ALIGN], [0.0; ALIGN]);
            let (exp_avg, exp_avg_sq) = (&mut exp_avg[..n], &mut exp_avg_sq[..n]);
            dequantize_block(&SIGNED, m, *m_scale, exp_avg);
            dequantize_block(&UNSIGNED, v, *v_scale, exp_avg_sq);
            let block = AdamSlices { parameter, gradient, exp_avg: &mut *exp_avg, exp_avg_sq: &mut *exp_avg_sq };
            constants.update_block(block, &mut []);
            (*m_scale, *v_scale) = (absmax(exp_avg), absmax(exp_avg_sq));
            quantize_block(&SIGNED, exp_avg, *m_scale, m);
            quantize_block(&UNSIGNED, exp_avg_sq, *v_scale, v);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_are_those_of_bitsandbytes() {
        // create_dynamic_map(signed, max_exponent_bits=7, total_bits=8) has 255 and 256 different values.
        for DynamicMap { levels: numbers, .. } in [&*SIGNED, &*UNSIGNED] {
            assert!(numbers.is_sorted() && numbers.contains(&0.0) && numbers.contains(&1.0));
        }
        let (signed, unsigned) = (&SIGNED.levels, &UNSIGNED.levels);
        assert!((unsigned[1] - 3.25e-7).abs() < 1e-12, "{}", unsigned[1]);
        assert!(signed.iter().filter(|&&number| number < 0.0).all(|number| signed.contains(&-number)));
    }

    #[test]
    fn a_code_is_that_of_the_nearest_number() {
        for map in [&*SIGNED, &*UNSIGNED] {
            let between = (0..=1f32.to_bits()).step_by(9973).chain([1f32.to_bits()]).map(f32::from_bits);
            let bounds = map.bounds[1..256].iter().flat_map(|bound| [bound.next_down(), *bound, bound.next_up()]);
            for value in between.chain(bounds).chain(map.levels).flat_map(|value| [value, -value]) {
                assert_eq!(map.code(value), nearest(&map.levels, value), "{value:e}");
            }
        }
    }

    #[test]
    fn what_is_coded_is_near_and_coding_by_the_same_scales_changes_nothing() {
        let n = 3000;
        let value = |i: usize| ((i * 7919) % 1009) as f32 / 1009.0 - 0.5;
        let exp_avg: Vec<f32> = (0..n).map(|i| value(i) * 10f32.powi(-((i / 256) as i32 % 5))).collect();
        let exp_avg_sq: Vec<f32> = exp_avg.iter().map(|m| m * m).collect();
        let coded = EightBitMoments::from_values([&exp_avg, &exp_avg_sq], None);
        let [m, v] = coded.values();
        for (block, (found, expected)) in m.chunks(ALIGN).zip(exp_avg.chunks(ALIGN)).enumerate() {
            let largest = expected.iter().fold(0f32, |a, b| a.max(b.abs()));
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() <= 0.0078 * largest, "block {block}: {found} for {expected}");
            }
        }
        let again = EightBitMoments::from_values([&m, &v], Some(coded.scales()));
        assert_eq!(again.values(), [m, v]);
        assert!(coded.bytes() < 2 * n + 2 * n / 50);
    }
}
