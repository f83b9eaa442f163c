//! Operands of products by 256-bit vectors. Values are rounded, where they stand for bf16 or f16, as they are packed.

use super::{
    super::{Side, Work, micro::Left, pack::AHEAD},
    LANES, STAGE, WIDTH,
};
use crate::kernel::Compute;
use std::{arch::x86_64::*, ops::Range};

/// Runs a function for values that are stored as bf16 or f32 and are rounded to what a product computes with.
macro_rules! by_type {
    ($half:expr, $compute:expr, $function:ident, $arguments:tt) => {
        match ($half, $compute) {
            (false, Compute::F32) => $function::<false, { Compute::F32 as u8 }> $arguments,
            (false, Compute::Bf16) => $function::<false, { Compute::Bf16 as u8 }> $arguments,
            (false, Compute::F16) => $function::<false, { Compute::F16 as u8 }> $arguments,
            (true, Compute::F16) => $function::<true, { Compute::F16 as u8 }> $arguments,
            (true, _) => $function::<true, { Compute::F32 as u8 }> $arguments,
        }
    };
}

/// As [`panels`](super::super::pack::panels).
///
/// # Safety
/// As there.
pub(in super::super) unsafe fn panels(
    work: &Work,
    compute: Compute,
    panels: Range<usize>,
    inner: [usize; 2],
    to: (*mut f32, usize),
) {
    let side = &work.vectors;
    // SAFETY: by the caller.
    unsafe {
        if side.strides[0] == 1 {
            by_type!(side.half, compute, panels_across, (side, panels, inner, to))
        } else {
            by_type!(side.half, compute, panels_along, (side, panels, inner, to))
        }
    }
}

/// A word of depth of all panels before the next, as they lie in memory.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn panels_across<const HALF: bool, const ROUND: u8>(
    side: &Side,
    panels: Range<usize>,
    [from, end]: [usize; 2],
    (to, room): (*mut f32, usize),
) {
    for inner in from..end {
        for (index, panel) in panels.clone().enumerate() {
            for half in [0, LANES] {
                let first = panel * WIDTH + half;
                // SAFETY: only values that exist are read, and the room is there.
                unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(side.at(first, inner + AHEAD).cast());
                    let values = load::<HALF, ROUND>(side.at(first, inner), side.count.saturating_sub(first));
                    _mm256_storeu_ps(to.add(index * room + (inner - from) * WIDTH + half), values);
                }
            }
        }
    }
}

/// One vector after the other, eight of them at a time, eight words deep.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn panels_along<const HALF: bool, const ROUND: u8>(
    side: &Side,
    panels: Range<usize>,
    [from, end]: [usize; 2],
    (to, room): (*mut f32, usize),
) {
    for (index, panel) in panels.enumerate() {
        for half in [0, LANES] {
            let first = panel * WIDTH + half;
            let count = side.count.saturating_sub(first).min(LANES);
            for inner in (from..end).step_by(LANES) {
                // SAFETY: only values that exist are read; the room is a multiple of eight deep.
                unsafe {
                    let mut rows = [_mm256_setzero_ps(); LANES];
                    for (vector, row) in rows.iter_mut().enumerate().take(count) {
                        let values = side.at(first + vector, inner);
                        _mm_prefetch::<_MM_HINT_T0>(values.wrapping_add(64 * AHEAD).cast());
                        *row = load::<HALF, ROUND>(values, end - inner);
                    }
                    let to = to.add(index * room + (inner - from) * WIDTH + half);
                    for (word, column) in transpose(rows).into_iter().enumerate() {
                        _mm256_storeu_ps(to.add(word * WIDTH), column);
                    }
                }
            }
        }
    }
}

/// As [`stage`](super::super::pack::stage): f32 along memory that are not rounded are left where they lie.
///
/// # Safety
/// As there.
pub(in super::super) unsafe fn stage(
    work: &Work,
    compute: Compute,
    rows: Range<usize>,
    inner: [usize; 2],
    to: *mut f32,
) -> Left {
    let side = &work.broadcast;
    // SAFETY: by the caller.
    unsafe {
        if side.strides[1] != 1 {
            by_type!(side.half, compute, stage_across, (side, rows, inner, to));
            Left::new(to.cast(), [1, STAGE])
        } else if side.half || compute != Compute::F32 {
            let depth = (inner[1] - inner[0]).next_multiple_of(LANES);
            by_type!(side.half, compute, stage_along, (side, rows, inner, (to, depth)));
            Left::new(to.cast(), [depth, 1])
        } else {
            Left::new(side.at(rows.start, inner[0]).cast(), side.strides)
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn stage_across<const HALF: bool, const ROUND: u8>(
    side: &Side,
    rows: Range<usize>,
    [from, end]: [usize; 2],
    to: *mut f32,
) {
    for inner in from..end {
        // SAFETY: only values that exist are read, and the room is there.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(side.at(rows.start, inner + 2 * AHEAD).cast());
            let values = load::<HALF, ROUND>(side.at(rows.start, inner), side.count - rows.start);
            _mm256_storeu_ps(to.add((inner - from) * STAGE), values);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn stage_along<const HALF: bool, const ROUND: u8>(
    side: &Side,
    rows: Range<usize>,
    [from, end]: [usize; 2],
    (to, depth): (*mut f32, usize),
) {
    for (index, row) in rows.enumerate() {
        for inner in (from..end).step_by(LANES) {
            // SAFETY: only values that exist are read; the room is a multiple of eight deep.
            unsafe {
                let values = load::<HALF, ROUND>(side.at(row, inner), end - inner);
                _mm256_storeu_ps(to.add(index * depth + inner - from), values);
            }
        }
    }
}

/// Eight values that lie side by side, zeros for those that are not among the `left`.
#[inline(always)]
unsafe fn load<const HALF: bool, const ROUND: u8>(at: *const u8, left: usize) -> __m256 {
    // SAFETY: only the values that are left are read.
    unsafe {
        let values = if HALF {
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
        if ROUND == Compute::Bf16 as u8 {
            to_bf16(values)
        } else if ROUND == Compute::F16 as u8 {
            _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values))
        } else {
            values
        }
    }
}

/// To the nearest, ties to even; NaN stays NaN.
#[inline(always)]
unsafe fn to_bf16(values: __m256) -> __m256 {
    // SAFETY: the callers run where the instructions are.
    unsafe {
        let bits = _mm256_castps_si256(values);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let upper = _mm256_and_si256(rounded, _mm256_set1_epi32(0xffff_0000_u32 as i32));
        let no_number = _mm256_cmp_ps::<_CMP_UNORD_Q>(values, values);
        _mm256_blendv_ps(_mm256_castsi256_ps(upper), values, no_number)
    }
}

/// 8 rows of 8 words → 8 columns.
#[inline(always)]
unsafe fn transpose(rows: [__m256; LANES]) -> [__m256; LANES] {
    // SAFETY: the callers run where the instructions are.
    unsafe {
        let mut pairs = rows;
        for i in (0..LANES).step_by(2) {
            pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        }
        // In half h of register 4·g + c: column 4·h + c of the rows 4·g to 4·g + 3.
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
