//! Integer GEMV with AVX2: the integers of weights and activations are multiplied as 16-bit words, one block of 32
//! after the other.
//!
//! Blocks are accessed by pointers: a bounds check of each would cost as much as its product. Loops are over indices,
//! as in the kernels of bytes.
#![allow(clippy::needless_range_loop)]

mod formats;

use super::fixed_point::{BLOCK_LEN, MAX_INTEGER, MIN_ABSMAX};
use crate::{instructions::has_avx2, packed::BlockType, weight_rows::RawRows};
use formats::{NibblesInt16, Q4KInt16, Q6KInt16, Q8Int16};
use std::{arch::x86_64::*, cell::RefCell};

/// A function that multiplies packed rows with rows of activations.
type Int16GemvFn = unsafe fn(&Int16Input, RawRows<'_>, &mut [f32]);

/// The activations of a block as integers.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
struct Int16Block([i16; BLOCK_LEN]);

/// The scale of a block of activations. NaN if an activation of the block is not finite.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct BlockScale {
    /// The scale of the integers.
    scale: f32,
    /// The sum of the integers, times their scale.
    scaled_sum: f32,
}

/// Consecutive blocks of activations.
#[derive(Debug, Default)]
struct Int16Blocks {
    integers: Vec<Int16Block>,
    scales: Vec<BlockScale>,
}

thread_local! {
    /// Pool of the thread's allocations for blocks.
    static BLOCK_POOL: RefCell<Vec<Int16Blocks>> = const { RefCell::new(Vec::new()) };
}

/// Rows of activations in fixed point, and the kernel that multiplies them with packed rows.
pub(super) struct Int16Input {
    blocks: Int16Blocks,
    /// Blocks of a row of activations.
    blocks_per_row: usize,
    gemv: Int16GemvFn,
}

impl Drop for Int16Input {
    fn drop(&mut self) {
        let blocks = std::mem::take(&mut self.blocks);
        BLOCK_POOL.with_borrow_mut(|all| all.push(blocks));
    }
}

impl Int16Input {
    /// Quantizes rows of `features` activations for weights of that format; returns `None` if the machine or the format
    /// has no word kernel.
    pub(super) fn new(block_type: BlockType, x: &[f32], features: usize) -> Option<Self> {
        let gemv: Int16GemvFn = match block_type {
            BlockType::Q4_0 => gemv_rows::<NibblesInt16<false, false>>,
            BlockType::Q4_1 => gemv_rows::<NibblesInt16<true, false>>,
            BlockType::Q5_0 => gemv_rows::<NibblesInt16<false, true>>,
            BlockType::Q5_1 => gemv_rows::<NibblesInt16<true, true>>,
            BlockType::Q8_0 => gemv_rows::<Q8Int16>,
            BlockType::Q4_K => gemv_rows::<Q4KInt16>,
            BlockType::Q6_K => gemv_rows::<Q6KInt16>,
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => return None,
        };
        has_avx2().then(|| {
            let mut blocks = BLOCK_POOL.with_borrow_mut(Vec::pop).unwrap_or_default();
            blocks.integers.clear();
            blocks.scales.clear();
            for x in x.as_chunks::<BLOCK_LEN>().0 {
                // SAFETY: `has_avx2` returned true, so the CPU has the target features of the function.
                let (integers, scale) = unsafe { quantize_block(x) };
                blocks.integers.push(integers);
                blocks.scales.push(scale);
            }
            Self { blocks, blocks_per_row: features / BLOCK_LEN, gemv }
        })
    }

    /// Computes the products of weight rows with every row of activations, until `y` is full.
    pub(super) fn multiply(&self, rows: RawRows<'_>, y: &mut [f32]) {
        // SAFETY: `Int16Input::new` creates a value only if `has_avx2` returns true.
        unsafe { (self.gemv)(self, rows, y) }
    }
}

/// Converts a block of activations to 16-bit fixed point; returns it with its scale.
///
/// # Safety
/// [`has_avx2`] returns true.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantize_block(x: &[f32; BLOCK_LEN]) -> (Int16Block, BlockScale) {
    // SAFETY: the loads cover the 32 values of `x` and the stores the 32 words of the block, which is aligned to 64
    // bytes; the transmuted types have the same size and accept every bit pattern.
    unsafe {
        // Magnitudes of floats, read as integers, keep their order; infinity and NaN are above all others.
        let magnitude = |part: usize| {
            let bits = _mm256_loadu_si256(x.as_ptr().add(8 * part).cast());
            _mm256_and_si256(bits, _mm256_set1_epi32(i32::MAX))
        };
        let most = _mm256_max_epu32(
            _mm256_max_epu32(magnitude(0), magnitude(1)),
            _mm256_max_epu32(magnitude(2), magnitude(3)),
        );
        let lanes: [u32; 8] = std::mem::transmute(most);
        let largest = f32::from_bits(lanes.into_iter().fold(0, u32::max));
        let scale = if largest.is_finite() { largest.max(MIN_ABSMAX) / MAX_INTEGER } else { f32::NAN };
        let inverse = _mm256_set1_ps(1.0 / scale);
        let mut block = Int16Block([0; BLOCK_LEN]);
        let mut sums = _mm256_setzero_si256();
        for half in 0..2 {
            let integers = |part: usize| {
                let values = _mm256_loadu_ps(x.as_ptr().add(16 * half + 8 * part));
                _mm256_cvtps_epi32(_mm256_mul_ps(values, inverse))
            };
            let (first, second) = (integers(0), integers(1));
            // The pack instruction interleaves its operands by 128-bit halves; the permutation restores the order.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(first, second));
            _mm256_store_si256(block.0.as_mut_ptr().add(16 * half).cast(), words);
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
        }
        let lanes: [i32; 8] = std::mem::transmute(sums);
        (block, BlockScale { scale, scaled_sum: scale * lanes.into_iter().sum::<i32>() as f32 })
    }
}

/// Pointers to the activations of a part of a row.
#[derive(Clone, Copy)]
struct BlockPtr {
    integers: *const Int16Block,
    scales: *const BlockScale,
}

/// Accumulators of a row.
struct RowAccumulators {
    dots: [__m256; ACCUMULATORS],
    /// The sum of the minima of the blocks, times their activations.
    minima: __m128,
}

/// The number of independent accumulators.
const ACCUMULATORS: usize = 4;

/// A block format with a word kernel. A *part* of a row is the bytes that are multiplied at a time.
trait Int16Format {
    /// Blocks of activations that belong to a part of a row.
    const BLOCKS: usize;
    /// Bytes in a part of a row.
    const BYTES: usize;

    /// Accumulates the products of a part of a row with its activations; formats with small parts use accumulator
    /// `index`.
    ///
    /// # Safety
    /// [`has_avx2`] returns true, `bytes` points to `BYTES` bytes, and `x` to `BLOCKS` blocks.
    unsafe fn accumulate(sums: &mut RowAccumulators, index: usize, bytes: *const u8, x: BlockPtr);
}

/// Computes the products of packed rows with every row of activations, until `y` is full.
///
/// # Safety
/// [`has_avx2`] returns true.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn gemv_rows<F: Int16Format>(x: &Int16Input, rows: RawRows<'_>, y: &mut [f32]) {
    let Int16Input { blocks: Int16Blocks { integers, scales }, blocks_per_row, .. } = x;
    let (tokens, parts) = (integers.len() / blocks_per_row, blocks_per_row / F::BLOCKS);
    for index in 0..y.len() {
        let (row, token) = (rows.row(index / tokens), index % tokens);
        assert!(row.len() == parts * F::BYTES && (token + 1) * blocks_per_row <= scales.len().min(integers.len()));
        // SAFETY: the assertion above checks that the row has `parts` parts, and that the blocks of this row of
        // activations exist.
        y[index] = unsafe {
            let x = BlockPtr {
                integers: integers.as_ptr().add(token * blocks_per_row),
                scales: scales.as_ptr().add(token * blocks_per_row),
            };
            dot::<F>(parts, row.as_ptr(), x)
        };
    }
}

/// Returns the dot product of a row of `parts` parts with a row of activations.
///
/// # Safety
/// [`has_avx2`] returns true, `row` points to `parts` parts, and `x` to the blocks of as many.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot<F: Int16Format>(parts: usize, mut row: *const u8, mut x: BlockPtr) -> f32 {
    let mut sums = RowAccumulators { dots: [_mm256_setzero_ps(); ACCUMULATORS], minima: _mm_setzero_ps() };
    let mut left = parts;
    // SAFETY: the loops take `parts` parts in all, which exist by the caller's guarantee, and `advance` moves both
    // pointers by one part.
    unsafe {
        while left >= ACCUMULATORS {
            for index in 0..ACCUMULATORS {
                F::accumulate(&mut sums, index, row, x);
                (row, x) = advance::<F>(row, x);
            }
            left -= ACCUMULATORS;
        }
        for _ in 0..left {
            F::accumulate(&mut sums, 0, row, x);
            (row, x) = advance::<F>(row, x);
        }
    }
    let [a, b, c, d] = sums.dots;
    let sum = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
    let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
    let sum = _mm_add_ps(sum, sums.minima);
    let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)))
}

/// Returns the pointers to the next part.
#[inline(always)]
fn advance<F: Int16Format>(row: *const u8, x: BlockPtr) -> (*const u8, BlockPtr) {
    let after = BlockPtr { integers: x.integers.wrapping_add(F::BLOCKS), scales: x.scales.wrapping_add(F::BLOCKS) };
    (row.wrapping_add(F::BYTES), after)
}
