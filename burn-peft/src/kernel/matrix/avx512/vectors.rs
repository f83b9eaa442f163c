//! Sums of whole tiles of f32 in assembly: the compiler reaches each row by an addition, for which a thread that shares its core
//! with another has no time beside the sums.

use super::{
    ROWS, WIDTH,
    micro::{Left, Right, Sums},
};
use std::arch::{asm, x86_64::*};

/// The products of one step of the inner dimension, `$step` steps from where the pointers are and `$next` bytes a step on the
/// left: of two registers of the panel with the word of every row.
macro_rules! step {
    ($step:literal, $next:literal, $($row:literal $low:literal $high:literal)*) => {
        concat!(
            "vmovups zmm24, zmmword ptr [{right} + 128*", $step, "]\n",
            "vmovups zmm25, zmmword ptr [{right} + 128*", $step, " + 64]\n",
            $(
                "vbroadcastss zmm26, dword ptr [{left} + ", $row, " + ", $next, "*", $step, "]\n",
                "vfmadd231ps zmm", $low, ", zmm24, zmm26\n",
                "vfmadd231ps zmm", $high, ", zmm25, zmm26\n",
            )*
        )
    };
}

/// A step with rows along memory, reached by multiples of what lies between two.
macro_rules! along {
    ($step:literal) => {
        step!($step, "4", "0" "0" "1" "{one}" "2" "3" "2*{one}" "4" "5" "{three}" "6" "7" "4*{one}" "8" "9" "{five}" "10" "11" "2*{three}" "12" "13" "{seven}" "14" "15" "8*{one}" "16" "17" "{nine}" "18" "19" "2*{five}" "20" "21" "{eleven}" "22" "23")
    };
}

/// A step with the words of all rows side by side.
macro_rules! across {
    ($step:literal) => {
        step!($step, "48", "4*0" "0" "1" "4*1" "2" "3" "4*2" "4" "5" "4*3" "6" "7" "4*4" "8" "9" "4*5" "10" "11" "4*6" "12" "13" "4*7" "14" "15" "4*8" "16" "17" "4*9" "18" "19" "4*10" "20" "21" "4*11" "22" "23")
    };
}

/// The sums of steps by `$step!`, four at a time: what `$fetch` and `$move` say happens between and after them.
macro_rules! sums {
    ($words:expr, $left:expr, $right:expr, $step:ident, $next:literal, [$($fetch:literal),*], [$($move:literal),*], $($operand:tt)*) => {{
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        let [[s0, s1], [s2, s3], [s4, s5], [s6, s7], [s8, s9], [s10, s11], [s12, s13], [s14, s15], [s16, s17], [s18, s19], [s20, s21], [s22, s23]] = &mut sums;
        // SAFETY: it reads what the caller says is there, and what it brings into the cache need not be.
        unsafe {
            asm!(
                "sub {count}, 4",
                "jb 3f",
                "2:",
                $step!("0"),
                $step!("1"),
                $($fetch,)*
                $step!("2"),
                $step!("3"),
                $($move,)*
                concat!("add {left}, 4*", $next),
                "add {right}, 4*128",
                "sub {count}, 4",
                "jae 2b",
                "3:",
                "add {count}, 4",
                "jz 5f",
                "4:",
                $step!("0"),
                concat!("add {left}, ", $next),
                "add {right}, 128",
                "dec {count}",
                "jnz 4b",
                "5:",
                left = inout(reg) $left.words => _,
                right = inout(reg) $right.words => _,
                count = inout(reg) $words => _,
                $($operand)*
                inout("zmm0") *s0, inout("zmm1") *s1, inout("zmm2") *s2, inout("zmm3") *s3, inout("zmm4") *s4, inout("zmm5") *s5, inout("zmm6") *s6, inout("zmm7") *s7, inout("zmm8") *s8, inout("zmm9") *s9, inout("zmm10") *s10, inout("zmm11") *s11, inout("zmm12") *s12, inout("zmm13") *s13, inout("zmm14") *s14, inout("zmm15") *s15, inout("zmm16") *s16, inout("zmm17") *s17, inout("zmm18") *s18, inout("zmm19") *s19, inout("zmm20") *s20, inout("zmm21") *s21, inout("zmm22") *s22, inout("zmm23") *s23,
                out("zmm24") _, out("zmm25") _, out("zmm26") _,
                options(nostack, readonly),
            );
        }
        sums
    }};
}

/// The products of [`ROWS`] rows, whose words lie side by side, with a packed panel.
///
/// # Safety
/// They hold `words` words; the machine has the instructions.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn multiply(words: usize, left: Left, right: Right) -> Sums<ROWS> {
    debug_assert!(left.strides[1] == 1 && right.stride == WIDTH);
    let row = 4 * left.strides[0];
    // Of the next rows three lines come into the cache in four steps, so that all are there at the end: a row in so many groups of
    // lines, then from its end to where the one after it begins.
    let groups = words.div_ceil(3 * 16);
    let next_row = [row.wrapping_sub(groups * 3 * 64), groups];
    sums!(
        words, left, right, along, "4",
        ["prefetcht1 [{ahead}]", "prefetcht1 [{ahead} + 64]", "prefetcht1 [{ahead} + 128]"],
        [
            "add {ahead}, 3*64",
            "dec {group}",
            "jnz 6f",
            "add {ahead}, qword ptr [{next_row}]",
            "mov {group}, qword ptr [{next_row} + 8]",
            "6:"
        ],
        ahead = inout(reg) left.ahead => _,
        group = inout(reg) groups => _,
        next_row = in(reg) &next_row,
        one = in(reg) row,
        three = in(reg) 3 * row,
        five = in(reg) 5 * row,
        seven = in(reg) 7 * row,
        nine = in(reg) 9 * row,
        eleven = in(reg) 11 * row,
    )
}

/// The same of rows whose words lie [`ROWS`] apart, those of a step side by side.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn multiply_across(words: usize, left: Left, right: Right) -> Sums<ROWS> {
    debug_assert!(left.strides == [1, ROWS] && right.stride == WIDTH);
    sums!(words, left, right, across, "48", [], [],)
}
