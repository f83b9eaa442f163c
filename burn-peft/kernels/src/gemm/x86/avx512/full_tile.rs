//! AVX-512 micro-kernels for complete f32 tiles, in assembly: the compiler computes each row address by an addition,
//! for which a hyperthread has no issue slot left beside the multiply-adds.

use super::{Avx512Accumulators, MR, NR, TileTask};
use std::arch::{asm, x86_64::*};

/// Multiplies one step along k, `$step` steps beyond the pointers; a step takes `$next` bytes of A: two registers of B
/// with the broadcast word of every row.
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

/// One step with a row-major A: rows are addressed by multiples of the row stride.
macro_rules! step_row_major {
    ($step:literal) => {
        step!($step, "4", "0" "0" "1" "{one}" "2" "3" "2*{one}" "4" "5" "{three}" "6" "7" "4*{one}" "8" "9" "{five}" "10" "11"
            "2*{three}" "12" "13" "{seven}" "14" "15" "8*{one}" "16" "17" "{nine}" "18" "19" "2*{five}" "20" "21"
            "{eleven}" "22" "23")
    };
}

/// One step with a column-major A: the words of all rows are adjacent.
macro_rules! step_column_major {
    ($step:literal) => {
        step!($step, "48", "0" "0" "1" "4" "2" "3" "8" "4" "5" "12" "6" "7" "16" "8" "9" "20" "10" "11" "24" "12" "13"
            "28" "14" "15" "32" "16" "17" "36" "18" "19" "40" "20" "21" "44" "22" "23")
    };
}

/// Runs `$step!` for all steps, four at a time, and evaluates to the accumulators. Four steps also prefetch with
/// `$fetch` and then advance the prefetch pointer with `$move`.
macro_rules! accumulate_steps {
    (
        $task:expr, $step:ident, $next:literal,
        [$($fetch:literal),*], [$($move:literal),*], $($operand:tt)*
    ) => {{
        let mut sums = [[_mm512_setzero_ps(); 2]; MR];
        // SAFETY: the caller of this macro's function guarantees that both operands of `$task` hold its steps; the
        // block reads nothing else but prefetches, which may take any address, writes no memory and declares all
        // registers that it changes.
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
                left = inout(reg) $task.a.words => _,
                right = inout(reg) $task.b.words => _,
                count = inout(reg) $task.words => _,
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

/// Accumulates the products of [`MR`] row-major rows with a packed micro-panel of B.
///
/// # Safety
/// A holds [`MR`] rows of adjacent words, B is packed and as deep, and the CPU has AVX-512F.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn accumulate_row_major(task: TileTask) -> Avx512Accumulators<MR> {
    debug_assert!(task.a.strides[1] == 1 && task.b.stride == NR);
    let row = 4 * task.a.strides[0];
    // Every four steps prefetch three cache lines of the rows that are read next, so that all of them are cached at the
    // end: `groups` times three lines of a row, then the jump from its end to the start of the next row.
    let groups = task.words.div_ceil(3 * 16);
    let next_row = [row.wrapping_sub(groups * 3 * 64), groups];
    accumulate_steps!(
        task, step_row_major, "4",
        ["prefetcht1 [{ahead}]", "prefetcht1 [{ahead} + 64]", "prefetcht1 [{ahead} + 128]"],
        [
            "add {ahead}, 3*64",
            "dec {group}",
            "jnz 6f",
            "add {ahead}, qword ptr [{next_row}]",
            "mov {group}, qword ptr [{next_row} + 8]",
            "6:"
        ],
        ahead = inout(reg) task.a.next_rows => _,
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

/// Accumulates the products of [`MR`] rows of a column-major micro-panel of A, whose steps lie [`MR`] words apart.
///
/// # Safety
/// A is such a micro-panel, B is packed and as deep, and the CPU has AVX-512F.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn accumulate_column_major(task: TileTask) -> Avx512Accumulators<MR> {
    debug_assert!(task.a.strides == [1, MR] && task.b.stride == NR);
    accumulate_steps!(task, step_column_major, "48", [], [],)
}
