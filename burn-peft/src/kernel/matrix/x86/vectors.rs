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
        step!($step, "4", "0" "0" "1" "{one}" "2" "3" "2*{one}" "4" "5" "{three}" "6" "7" "4*{one}" "8" "9" "{five}" "10" "11"
            "2*{three}" "12" "13" "{seven}" "14" "15" "8*{one}" "16" "17" "{nine}" "18" "19" "2*{five}" "20" "21"
            "{eleven}" "22" "23")
    };
}

/// A step with the words of all rows side by side.
macro_rules! across {
    ($step:literal) => {
        step!($step, "48", "0" "0" "1" "4" "2" "3" "8" "4" "5" "12" "6" "7" "16" "8" "9" "20" "10" "11" "24" "12" "13"
            "28" "14" "15" "32" "16" "17" "36" "18" "19" "40" "20" "21" "44" "22" "23")
    };
}

/// The sums of steps by `$step!`, four at a time: what `$fetch` and `$move` say happens between and after them.
macro_rules! sums {
    (
        $words:expr, $left:expr, $right:expr, $step:ident, $next:literal,
        [$($fetch:literal),*], [$($move:literal),*], $($operand:tt)*
    ) => {{
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
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
                inout("zmm0") sums[0][0], inout("zmm1") sums[0][1], inout("zmm2") sums[1][0], inout("zmm3") sums[1][1],
                inout("zmm4") sums[2][0], inout("zmm5") sums[2][1], inout("zmm6") sums[3][0], inout("zmm7") sums[3][1],
                inout("zmm8") sums[4][0], inout("zmm9") sums[4][1], inout("zmm10") sums[5][0], inout("zmm11") sums[5][1],
                inout("zmm12") sums[6][0], inout("zmm13") sums[6][1], inout("zmm14") sums[7][0], inout("zmm15") sums[7][1],
                inout("zmm16") sums[8][0], inout("zmm17") sums[8][1], inout("zmm18") sums[9][0], inout("zmm19") sums[9][1],
                inout("zmm20") sums[10][0], inout("zmm21") sums[10][1], inout("zmm22") sums[11][0], inout("zmm23") sums[11][1],
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
