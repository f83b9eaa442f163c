//! Sums and operands of products by 256-bit vectors. Values are rounded, where they stand for bf16 or f16, as they are packed.

use super::{
    Side, Work,
    micro::{Left, Place, Right},
    pack::AHEAD,
};
use crate::kernel::Compute;
use std::{
    arch::{asm, x86_64::*},
    ops::Range,
};

/// Vectors of the vector side that are multiplied at a time: two registers.
pub(super) const WIDTH: usize = 2 * LANES;
/// Values of the broadcast side that meet them.
pub(super) const ROWS: usize = 6;
/// Words from one inner step to the next of rows that are staged side by side.
pub(super) const STAGE: usize = LANES;

const LANES: usize = 8;

type Sums<const R: usize> = [[__m256; 2]; R];

/// Whether this machine has the instructions.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// Writes or adds the product of some rows with a panel, so many words deep.
///
/// # Safety
/// `left` and `right` hold these words; the machine has the instructions.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn sum(rows: usize, words: usize, (left, right): (Left, Right), place: Place) {
    // SAFETY: by the caller.
    unsafe {
        match (rows, left.strides) {
            (ROWS, [_, 1]) if right.stride == WIDTH => store(multiply_along(words, left, right), place),
            (ROWS, [1, STAGE]) if right.stride == WIDTH => store(multiply_across(words, left, right), place),
            (1, _) => store(multiply::<1>(words, left, right), place),
            (2, _) => store(multiply::<2>(words, left, right), place),
            (3, _) => store(multiply::<3>(words, left, right), place),
            (4, _) => store(multiply::<4>(words, left, right), place),
            (5, _) => store(multiply::<5>(words, left, right), place),
            (ROWS, _) => store(multiply::<ROWS>(words, left, right), place),
            _ => unreachable!("a tile has 1 to {ROWS} rows"),
        }
    }
}

#[inline(always)]
unsafe fn multiply<const R: usize>(words: usize, left: Left, right: Right) -> Sums<R> {
    // SAFETY: by the caller of [`sum`].
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        let (mut a, mut b): (*const f32, *const f32) = (left.words.cast(), right.words.cast());
        for _ in 0..words {
            let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(LANES)));
            for (r, [sum0, sum1]) in sums.iter_mut().enumerate() {
                let value = _mm256_set1_ps(*a.add(r * left.strides[0]));
                *sum0 = _mm256_fmadd_ps(value, b0, *sum0);
                *sum1 = _mm256_fmadd_ps(value, b1, *sum1);
            }
            a = a.wrapping_add(left.strides[1]);
            b = b.wrapping_add(right.stride);
        }
        sums
    }
}

/// The products of one step of the inner dimension, `$step` steps from where the pointers are and `$next` bytes a step on the
/// left. A step of the panel is a line of memory; one that comes 16 steps later is asked for.
macro_rules! step {
    ($step:literal, $next:literal, $($row:literal $low:literal $high:literal)*) => {
        concat!(
            "prefetcht0 [{right} + 64*", $step, " + 1024]\n",
            "vmovups ymm12, ymmword ptr [{right} + 64*", $step, "]\n",
            "vmovups ymm13, ymmword ptr [{right} + 64*", $step, " + 32]\n",
            $(
                "vbroadcastss ymm14, dword ptr [{left} + ", $row, " + ", $next, "*", $step, "]\n",
                "vfmadd231ps ymm", $low, ", ymm12, ymm14\n",
                "vfmadd231ps ymm", $high, ", ymm13, ymm14\n",
            )*
        )
    };
}

/// A step with rows along memory, reached by multiples of what lies between two.
macro_rules! along {
    ($step:literal) => {
        step!($step, "4", "0" "0" "1" "{one}" "2" "3" "2*{one}" "4" "5" "{three}" "6" "7" "4*{one}" "8" "9" "{five}" "10" "11")
    };
}

/// A step with the words of all rows side by side.
macro_rules! across {
    ($step:literal) => {
        step!($step, "32", "0" "0" "1" "4" "2" "3" "8" "4" "5" "12" "6" "7" "16" "8" "9" "20" "10" "11")
    };
}

/// The sums of steps by `$step!`, four at a time.
macro_rules! sums {
    ($words:expr, $left:expr, $right:expr, $step:ident, $next:literal, $($operand:tt)*) => {{
        let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
        // SAFETY: it reads what the caller says is there.
        unsafe {
            asm!(
                "sub {count}, 4",
                "jb 3f",
                "2:",
                $step!("0"),
                $step!("1"),
                $step!("2"),
                $step!("3"),
                concat!("add {left}, 4*", $next),
                "add {right}, 4*64",
                "sub {count}, 4",
                "jae 2b",
                "3:",
                "add {count}, 4",
                "jz 5f",
                "4:",
                $step!("0"),
                concat!("add {left}, ", $next),
                "add {right}, 64",
                "dec {count}",
                "jnz 4b",
                "5:",
                left = inout(reg) $left.words => _,
                right = inout(reg) $right.words => _,
                count = inout(reg) $words => _,
                $($operand)*
                inout("ymm0") sums[0][0], inout("ymm1") sums[0][1], inout("ymm2") sums[1][0], inout("ymm3") sums[1][1],
                inout("ymm4") sums[2][0], inout("ymm5") sums[2][1], inout("ymm6") sums[3][0], inout("ymm7") sums[3][1],
                inout("ymm8") sums[4][0], inout("ymm9") sums[4][1], inout("ymm10") sums[5][0], inout("ymm11") sums[5][1],
                out("ymm12") _, out("ymm13") _, out("ymm14") _,
                options(nostack, readonly),
            );
        }
        sums
    }};
}

/// Of [`ROWS`] rows, whose words lie side by side, with a packed panel.
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_along(words: usize, left: Left, right: Right) -> Sums<ROWS> {
    let row = 4 * left.strides[0];
    sums!(words, left, right, along, "4", one = in(reg) row, three = in(reg) 3 * row, five = in(reg) 5 * row,)
}

/// Of rows whose words lie [`STAGE`] apart, those of a step side by side.
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_across(words: usize, left: Left, right: Right) -> Sums<ROWS> {
    sums!(words, left, right, across, "32",)
}

#[inline(always)]
unsafe fn store<const R: usize>(mut sums: Sums<R>, place: Place) {
    let Place { out, down, across, columns, add, factor } = place;
    // SAFETY: the tile is there.
    unsafe {
        if factor != 1.0 {
            sums.iter_mut().flatten().for_each(|half| *half = _mm256_mul_ps(*half, _mm256_set1_ps(factor)));
        }
        if across == 1 && columns == WIDTH {
            for (r, halves) in sums.into_iter().enumerate() {
                for (half, sum) in halves.into_iter().enumerate() {
                    let to = out.add(r * down + half * LANES);
                    _mm256_storeu_ps(to, if add { _mm256_add_ps(_mm256_loadu_ps(to), sum) } else { sum });
                }
            }
            return;
        }
        // Part of a panel, or rows of the tile are columns of the target.
        for (r, halves) in sums.into_iter().enumerate() {
            let values: [f32; WIDTH] = std::mem::transmute(halves);
            for (column, value) in values.into_iter().take(columns).enumerate() {
                let to = out.add(r * down + column * across);
                *to = if add { *to + value } else { value };
            }
        }
    }
}

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

/// As [`pack::panels`](super::pack::panels).
///
/// # Safety
/// As there.
pub(super) unsafe fn panels(
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

/// As [`pack::stage`](super::pack::stage): f32 along memory that are not rounded are left where they lie.
///
/// # Safety
/// As there.
pub(super) unsafe fn stage(work: &Work, compute: Compute, rows: Range<usize>, inner: [usize; 2], to: *mut f32) -> Left {
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
