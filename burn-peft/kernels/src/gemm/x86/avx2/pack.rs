//! Packing of the operands for AVX2. Values are rounded to bf16 or f16 as they are packed, if the product asks for it.

use super::{super::operands::PREFETCH_DISTANCE, LANES, MicroPanelA, NR, Operand, PACK_MR, PackBuffer};
use crate::MatmulPrecision;
use std::{arch::x86_64::*, ops::Range};

/// Calls a function for values that are stored as bf16 or f32 and rounded to the precision of the product.
macro_rules! by_type {
    ($half:expr, $precision:expr, $function:ident, $arguments:tt) => {
        match ($half, $precision) {
            (false, MatmulPrecision::F32) => $function::<false, { MatmulPrecision::F32 as u8 }> $arguments,
            (false, MatmulPrecision::Bf16) => $function::<false, { MatmulPrecision::Bf16 as u8 }> $arguments,
            (false, MatmulPrecision::F16) => $function::<false, { MatmulPrecision::F16 as u8 }> $arguments,
            (true, MatmulPrecision::F16) => $function::<true, { MatmulPrecision::F16 as u8 }> $arguments,
            (true, _) => $function::<true, { MatmulPrecision::F32 as u8 }> $arguments,
        }
    };
}

/// Packs micro-panels of B in f32, rounded to `precision`.
///
/// # Safety
/// The conditions of [`MicroKernel::pack_b`](super::MicroKernel::pack_b) hold for [`Avx2`](super::Avx2).
pub(super) unsafe fn pack_b(
    b: &Operand,
    precision: MatmulPrecision,
    panels: Range<usize>,
    k: Range<usize>,
    to: PackBuffer,
) {
    // SAFETY: the caller guarantees the room, the ranges and the CPU features; `by_type` passes the element type of B.
    unsafe {
        if b.strides[0] == 1 {
            by_type!(b.is_bf16, precision, pack_b_row_major, (b, panels, k, to))
        } else {
            by_type!(b.is_bf16, precision, pack_b_column_major, (b, panels, k, to))
        }
    }
}

/// Packs a row-major B: one step along k of all panels after the other, as they lie in memory.
///
/// # Safety
/// The conditions of [`pack_b`] hold, the columns of B are adjacent, and `IS_BF16` is true exactly if B is bf16.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pack_b_row_major<const IS_BF16: bool, const ROUND: u8>(
    operand: &Operand,
    panels: Range<usize>,
    k: Range<usize>,
    to: PackBuffer,
) {
    for position in k.clone() {
        for (index, panel) in panels.clone().enumerate() {
            for half in [0, LANES] {
                let first = panel * NR + half;
                // SAFETY: `load` reads at most the columns that exist from `first` on, and the caller guarantees [`NR`]
                // words at each step; prefetches may take any address.
                unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(operand.ptr(first, position + PREFETCH_DISTANCE).cast());
                    let values =
                        load::<IS_BF16, ROUND>(operand.ptr(first, position), operand.count.saturating_sub(first));
                    let to = to.words.add(index * to.panel_words + (position - k.start) * NR + half);
                    _mm256_storeu_ps(to.cast(), values);
                }
            }
        }
    }
}

/// Packs a column-major B: eight columns at a time, eight steps along k each.
///
/// # Safety
/// The conditions of [`pack_b`] hold, and `IS_BF16` is true exactly if B is bf16.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pack_b_column_major<const IS_BF16: bool, const ROUND: u8>(
    operand: &Operand,
    panels: Range<usize>,
    k: Range<usize>,
    to: PackBuffer,
) {
    for (index, panel) in panels.enumerate() {
        for half in [0, LANES] {
            let first = panel * NR + half;
            let count = operand.count.saturating_sub(first).min(LANES);
            for position in k.clone().step_by(LANES) {
                // SAFETY: `count` columns exist from `first` on and `load` reads at most the values of the range; the
                // room is a multiple of eight steps deep.
                unsafe {
                    let mut rows = [_mm256_setzero_ps(); LANES];
                    for (vector, row) in rows.iter_mut().enumerate().take(count) {
                        let values = operand.ptr(first + vector, position);
                        _mm_prefetch::<_MM_HINT_T0>(values.wrapping_add(64 * PREFETCH_DISTANCE).cast());
                        *row = load::<IS_BF16, ROUND>(values, k.end - position);
                    }
                    let to = to.words.add(index * to.panel_words + (position - k.start) * NR + half);
                    for (word, column) in transpose(rows).into_iter().enumerate() {
                        _mm256_storeu_ps(to.add(word * NR).cast(), column);
                    }
                }
            }
        }
    }
}

/// Returns a micro-panel of A in f32, rounded to `precision`: row-major f32 that needs no rounding stays in place.
///
/// # Safety
/// The conditions of [`MicroKernel::pack_a`](super::MicroKernel::pack_a) hold for [`Avx2`](super::Avx2).
pub(super) unsafe fn pack_a(
    a: &Operand,
    precision: MatmulPrecision,
    rows: Range<usize>,
    k: Range<usize>,
    to: *mut u32,
) -> MicroPanelA {
    // SAFETY: the caller guarantees the buffer, the ranges and the CPU features; `by_type` passes the element type of
    // A.
    unsafe {
        if a.strides[1] != 1 {
            by_type!(a.is_bf16, precision, pack_a_column_major, (a, rows, k, to.cast()));
            MicroPanelA::new(to, [1, PACK_MR])
        } else if a.is_bf16 || precision != MatmulPrecision::F32 {
            let depth = k.len().next_multiple_of(LANES);
            by_type!(a.is_bf16, precision, pack_a_row_major, (a, rows, k, to.cast()));
            MicroPanelA::new(to, [depth, 1])
        } else {
            MicroPanelA::new(a.ptr(rows.start, k.start).cast(), a.strides)
        }
    }
}

/// Packs a column-major A: the words of all rows at each step along k.
///
/// # Safety
/// The conditions of [`pack_a`] hold, the rows of A are adjacent, and `IS_BF16` is true exactly if A is bf16.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pack_a_column_major<const IS_BF16: bool, const ROUND: u8>(
    operand: &Operand,
    rows: Range<usize>,
    k: Range<usize>,
    to: *mut f32,
) {
    for position in k.clone() {
        // SAFETY: `load` reads at most the rows that exist from `rows.start` on, and the buffer has [`PACK_MR`] words
        // at each step; prefetches may take any address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(operand.ptr(rows.start, position + 2 * PREFETCH_DISTANCE).cast());
            let values = load::<IS_BF16, ROUND>(operand.ptr(rows.start, position), operand.count - rows.start);
            _mm256_storeu_ps(to.add((position - k.start) * PACK_MR), values);
        }
    }
}

/// Packs a row-major A: one row after the other, each padded with zeros to a multiple of 8 values.
///
/// # Safety
/// The conditions of [`pack_a`] hold, the values of a row are adjacent, and `IS_BF16` is true exactly if A is bf16.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pack_a_row_major<const IS_BF16: bool, const ROUND: u8>(
    operand: &Operand,
    rows: Range<usize>,
    k: Range<usize>,
    to: *mut f32,
) {
    let depth = k.len().next_multiple_of(LANES);
    for (index, row) in rows.enumerate() {
        for position in k.clone().step_by(LANES) {
            // SAFETY: `load` reads at most the values of the range, and each row has room for `depth` values, a
            // multiple of eight.
            unsafe {
                let values = load::<IS_BF16, ROUND>(operand.ptr(row, position), k.end - position);
                _mm256_storeu_ps(to.add(index * depth + position - k.start), values);
            }
        }
    }
}

/// Loads eight adjacent values, of which `left` exist, as rounded f32; zeros beyond them.
///
/// # Safety
/// `at` points to `left` values, bf16 if `IS_BF16` and else f32, and the CPU has AVX2 and F16C.
#[inline(always)]
unsafe fn load<const IS_BF16: bool, const ROUND: u8>(at: *const u8, left: usize) -> __m256 {
    // SAFETY: whole registers are loaded only if eight values are left; else the copy or the mask limits the reads to
    // `left` values. The window into `EDGE` starts at `LANES - left`, between 1 and 8, so its eight entries exist.
    unsafe {
        let values = if IS_BF16 {
            let halves = if left >= LANES {
                _mm_loadu_si128(at.cast())
            } else {
                let mut some = [0u16; LANES];
                std::ptr::copy_nonoverlapping(at, some.as_mut_ptr().cast(), 2 * left);
                _mm_loadu_si128(some.as_ptr().cast())
            };
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
        } else if left >= LANES {
            _mm256_loadu_ps(at.cast())
        } else {
            const EDGE: [i32; 2 * LANES] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
            _mm256_maskload_ps(at.cast(), _mm256_loadu_si256(EDGE.as_ptr().add(LANES - left).cast()))
        };
        if ROUND == MatmulPrecision::Bf16 as u8 {
            round_to_bf16(values)
        } else if ROUND == MatmulPrecision::F16 as u8 {
            _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values))
        } else {
            values
        }
    }
}

/// Rounds to the nearest bf16, ties to even; NaN stays NaN.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn round_to_bf16(values: __m256) -> __m256 {
    // SAFETY: the intrinsics only work on registers, and the CPU has AVX2 by the caller's guarantee.
    unsafe {
        let bits = _mm256_castps_si256(values);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let upper = _mm256_and_si256(rounded, _mm256_set1_epi32(0xffff_0000_u32 as i32));
        let no_number = _mm256_cmp_ps::<_CMP_UNORD_Q>(values, values);
        _mm256_blendv_ps(_mm256_castsi256_ps(upper), values, no_number)
    }
}

/// Transposes 8 rows of 8 words.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn transpose(rows: [__m256; LANES]) -> [__m256; LANES] {
    // SAFETY: the intrinsics only work on registers, and the CPU has AVX2 by the caller's guarantee.
    unsafe {
        let mut pairs = rows;
        for i in (0..LANES).step_by(2) {
            pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        }
        // 128-bit half h of register 4·g + c holds column 4·h + c of the rows 4·g to 4·g + 3.
        let mut fours = rows;
        for i in [0, 4] {
            fours[i] = _mm256_shuffle_ps::<0x44>(pairs[i], pairs[i + 2]);
            fours[i + 1] = _mm256_shuffle_ps::<0xee>(pairs[i], pairs[i + 2]);
            fours[i + 2] = _mm256_shuffle_ps::<0x44>(pairs[i + 1], pairs[i + 3]);
            fours[i + 3] = _mm256_shuffle_ps::<0xee>(pairs[i + 1], pairs[i + 3]);
        }
        let mut columns = rows;
        for c in 0..4 {
            columns[c] = _mm256_permute2f128_ps::<0x20>(fours[c], fours[4 + c]);
            columns[4 + c] = _mm256_permute2f128_ps::<0x31>(fours[c], fours[4 + c]);
        }
        columns
    }
}
