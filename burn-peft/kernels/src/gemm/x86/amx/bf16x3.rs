//! Packing of f32 operands for AMX as bf16x3: each value is the sum of three bf16 terms, which together are as exact as
//! f32. The terms of each block of [`TILE_K`] words along k lie one after the other.
//!
//! The first term is the upper half of the value's bits, the second the remainder rounded to nearest, the third the
//! remainder of that, which a bf16 holds exactly. A value that is not finite leaves NaN in the second term.

use super::{
    super::{avx512::transpose, operands::PREFETCH_DISTANCE},
    MR, MicroPanelA, NR, Operand, PackBuffer, TILE_K, lane_mask,
};
use std::{arch::x86_64::*, ops::Range};

/// The number of bf16 terms of an f32.
pub(super) const TERMS: usize = 3;
/// Mask of the upper half of an f32's bits, which is a bf16.
const BF16_MASK: i32 = 0xffff_0000_u32 as i32;
/// Words in a tile.
const TILE_WORDS: usize = 16 * TILE_K;
/// Words in the two tiles of a term.
const TERM_WORDS: usize = 2 * TILE_WORDS;

/// Splits 16 pairs of f32 into words of their bf16 terms.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline(always)]
unsafe fn split_pairs(low: __m512i, high: __m512i) -> [__m512i; TERMS] {
    // SAFETY: the intrinsics only work on registers, and the CPU has AVX-512F by the caller's guarantee.
    unsafe {
        let [low_rest, high_rest] = [residual(low, low), residual(high, high)];
        let half = _mm512_set1_epi32(0x8000);
        let [low_near, high_near] = [_mm512_add_epi32(low_rest, half), _mm512_add_epi32(high_rest, half)];
        let [low_last, high_last] = [residual(low_rest, low_near), residual(high_rest, high_near)];
        [pack_pair(low, high), pack_pair(low_near, high_near), pack_pair(low_last, high_last)]
    }
}

/// Returns `value` minus the bf16 in the upper half of `part`.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline(always)]
unsafe fn residual(value: __m512i, part: __m512i) -> __m512i {
    // SAFETY: the intrinsics only work on registers, and the CPU has AVX-512F by the caller's guarantee.
    unsafe {
        let upper = _mm512_and_si512(part, _mm512_set1_epi32(BF16_MASK));
        _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(value), _mm512_castsi512_ps(upper)))
    }
}

/// Combines the upper halves of two f32 into a word, the first in its lower half.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline(always)]
unsafe fn pack_pair(low: __m512i, high: __m512i) -> __m512i {
    // SAFETY: the intrinsics only work on registers, and the CPU has AVX-512F by the caller's guarantee. The ternary
    // function 0xf8 is a | b & c.
    unsafe { _mm512_ternarylogic_epi32::<0xf8>(_mm512_srli_epi32::<16>(low), high, _mm512_set1_epi32(BF16_MASK)) }
}

/// Loads the first 16 values along k of up to 16 vectors. Each register holds one value of every vector; zeros for
/// vectors and values that do not exist.
///
/// # Safety
/// The vectors and the range `k` lie within `operand`, which is f32, and the CPU has AVX-512F.
#[inline(always)]
unsafe fn load_columns(operand: &Operand, vectors: Range<usize>, k: Range<usize>) -> [__m512i; 16] {
    // SAFETY: the masks and loops limit the reads to the vectors and the `steps` values that exist; masked-off lanes
    // are not accessed, and prefetches may take any address.
    unsafe {
        let mut values = [_mm512_setzero_si512(); 16];
        let steps = k.end.saturating_sub(k.start).min(16);
        if operand.strides[1] == 1 {
            let mask = lane_mask(steps);
            for (row, vector) in values.iter_mut().zip(vectors) {
                let at = operand.ptr(vector, k.start);
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(64 * PREFETCH_DISTANCE).cast());
                *row = _mm512_maskz_loadu_epi32(mask, at.cast());
            }
            return transpose(values);
        }
        for (index, column) in values.iter_mut().enumerate().take(steps) {
            let at = operand.ptr(vectors.start, k.start + index);
            if operand.strides[0] == 1 {
                let ahead = operand.ptr(vectors.start, k.start + index + 2 * PREFETCH_DISTANCE);
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                *column = _mm512_maskz_loadu_epi32(lane_mask(vectors.end - vectors.start), at.cast());
            } else {
                let mut words = [0; 16];
                for (word, vector) in words.iter_mut().zip(vectors.clone()) {
                    *word = operand.ptr(vector, k.start + index).cast::<u32>().read_unaligned();
                }
                *column = _mm512_loadu_si512(words.as_ptr().cast());
            }
        }
        values
    }
}

/// Packs micro-panels of an f32 B over a range of k: for every block along k and every bf16 term a tile of the first 16
/// columns and one of the remaining 16.
///
/// # Safety
/// `to` has room for all micro-panels, a multiple of [`TILE_K`] words deep in each term, and is aligned to 64 bytes;
/// `panels` and the range lie within B; the CPU has AVX-512F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn pack_b(operand: &Operand, panels: Range<usize>, k: Range<usize>, to: PackBuffer) {
    let (count, blocks) = (panels.len(), k.len().div_ceil(2 * TILE_K));
    for step in 0..count * blocks {
        // Memory is read in its order: one column after the other, or one block of all panels after the other.
        let (index, block) =
            if operand.strides[0] == 1 { (step % count, step / count) } else { (step / blocks, step % blocks) };
        let position = k.start + block * 2 * TILE_K;
        for group in 0..2 {
            let first = ((panels.start + index) * NR + 16 * group).min(operand.count);
            let vectors = first..operand.count.min(first + 16);
            for half in 0..2 {
                // SAFETY: `first` and the counts are clamped to the columns of B, and every offset is a multiple of 16
                // words within its panel.
                unsafe {
                    let tile = block * TERMS * TERM_WORDS + group * TILE_WORDS + 8 * half * 16;
                    let to = to.words.add(index * to.panel_words + tile);
                    let values = load_columns(operand, vectors.clone(), position + 16 * half..k.end);
                    for pair in 0..8 {
                        store_terms(split_pairs(values[2 * pair], values[2 * pair + 1]), to.add(pair * 16));
                    }
                }
            }
        }
    }
}

/// Packs rows of an f32 A over a range of k: for every block along k and every bf16 term a tile of the first 16 rows
/// and one of the remaining rows.
///
/// # Safety
/// `to` has room for [`MR`] rows, a multiple of [`TILE_K`] words deep in each term, and is aligned to 64 bytes; the
/// rows and the range lie within A; the CPU has AVX-512F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn pack_a(operand: &Operand, rows: Range<usize>, k: Range<usize>, to: *mut u32) -> MicroPanelA {
    // SAFETY: `first` and `count` lie within `rows`, the masks limit the loads to the values of the range, and every
    // offset is a multiple of 16 words within the buffer; prefetches may take any address.
    unsafe {
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
        for (block, position) in k.clone().step_by(2 * TILE_K).enumerate() {
            let masks = [lane_mask(k.end - position), lane_mask((k.end - position).saturating_sub(16))];
            for (group, first) in rows.clone().step_by(16).enumerate() {
                let count = (rows.end - first).min(16);
                let to = to.add(block * TERMS * TERM_WORDS + group * TILE_WORDS);
                if operand.strides[1] == 1 {
                    for row in 0..count {
                        let values = operand.ptr(first + row, position);
                        // Prefetch the rows of the next micro-panel while this one is multiplied.
                        let ahead = values.wrapping_add(4 * MR * operand.strides[0]);
                        _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
                        _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(64).cast());
                        let lower = _mm512_maskz_loadu_epi32(masks[0], values.cast());
                        let upper = _mm512_maskz_loadu_epi32(masks[1], values.wrapping_add(64).cast());
                        let low = _mm512_permutex2var_epi32(lower, even, upper);
                        let high = _mm512_permutex2var_epi32(lower, odd, upper);
                        store_terms(split_pairs(low, high), to.add(row * 16));
                    }
                    continue;
                }
                let lower = transpose(load_columns(operand, first..first + count, position..k.end));
                let upper = transpose(load_columns(operand, first..first + count, position + 16..k.end));
                for row in 0..count {
                    let low = _mm512_permutex2var_epi32(lower[row], even, upper[row]);
                    let high = _mm512_permutex2var_epi32(lower[row], odd, upper[row]);
                    store_terms(split_pairs(low, high), to.add(row * 16));
                }
            }
        }
    }
    MicroPanelA { second_tile_offset: TILE_WORDS, terms: TERMS, ..MicroPanelA::new(to, [16, 1]) }
}

/// Stores the words of one row of a tile in every term.
///
/// # Safety
/// `to` is aligned to 64 bytes and has room for 16 words in each of the three terms, and the CPU has AVX-512F.
#[inline(always)]
unsafe fn store_terms(words: [__m512i; TERMS], to: *mut u32) {
    // SAFETY: the terms lie [`TERM_WORDS`] apart, a multiple of 16 words, so each store is aligned and within the
    // buffer that the caller guarantees.
    unsafe {
        for (part, words) in words.into_iter().enumerate() {
            _mm512_store_si512(to.add(part * TERM_WORDS).cast(), words);
        }
    }
}
