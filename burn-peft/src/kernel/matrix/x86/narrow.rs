//! Sums of products by 256-bit vectors.

pub(super) mod pack;

use super::micro::{Left, Place, Right};
use std::arch::{asm, x86_64::*};

/// Vectors of the vector side that are multiplied at a time: two registers.
pub(super) const WIDTH: usize = 2 * LANES;
/// Values of the broadcast side that meet them.
pub(super) const ROWS: usize = 6;
/// Words from one inner step to the next of rows that are staged side by side.
pub(super) const STAGE: usize = LANES;

const LANES: usize = 8;

type Sums<const R: usize> = [[__m256; 2]; R];

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
