//! Micro-kernels for AVX2.

mod pack;

use super::{
    micro_kernel::MicroKernel,
    operands::{MicroPanelA, Operand, OutputTile, PackBuffer, RowBlock, TileTask},
};
use crate::MatmulPrecision;
use std::{
    arch::{asm, x86_64::*},
    ops::Range,
};

/// NR: columns of B that a micro-kernel processes at a time, two registers.
const NR: usize = 2 * LANES;
/// MR: rows of A that a micro-kernel processes at a time.
const MR: usize = 6;
/// Words from one step along k to the next in a column-major micro-panel of A.
const PACK_MR: usize = LANES;

/// f32 values in a register.
const LANES: usize = 8;

/// AVX2: a word is an f32, rounded to a precision when it is packed.
#[derive(Clone, Copy)]
pub(super) struct Avx2 {
    pub(super) precision: MatmulPrecision,
}

impl MicroKernel for Avx2 {
    const MR: usize = MR;
    const NR: usize = NR;
    const PACK_MR: usize = PACK_MR;
    const K_PER_WORD: usize = 1;
    /// Machines without AVX-512 have smaller caches.
    const PACKED_B_WORDS: usize = 1 << 16;

    type ThreadState = ();

    unsafe fn prepare_thread(self) {}

    fn reads_f32_in_place(self) -> bool {
        self.precision == MatmulPrecision::F32
    }

    unsafe fn pack_b(self, b: &Operand, panels: Range<usize>, k: Range<usize>, to: PackBuffer) {
        // SAFETY: the conditions are the same.
        unsafe { pack::pack_b(b, self.precision, panels, k, to) }
    }

    unsafe fn pack_a(self, a: &Operand, block: RowBlock, k: Range<usize>, buffer: *mut u32) -> MicroPanelA {
        // SAFETY: the conditions are the same.
        unsafe { pack::pack_a(a, self.precision, block.rows, k, buffer) }
    }

    #[inline]
    unsafe fn compute_tile(self, task: TileTask, tile: OutputTile) {
        // SAFETY: the conditions are the same.
        unsafe { compute_tile(task, tile) }
    }
}

/// The accumulators of `R` rows: two registers each.
type Avx2Accumulators<const R: usize> = [[__m256; 2]; R];

/// Writes the product of up to [`MR`] rows with a micro-panel of B to a tile of C, or adds it.
///
/// # Safety
/// The conditions of [`MicroKernel::compute_tile`] hold for [`Avx2`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn compute_tile(task: TileTask, tile: OutputTile) {
    // SAFETY: the caller guarantees the operands, the tile and the CPU features; the first two arms match the layouts
    // that their kernels require.
    unsafe {
        match (task.rows, task.a.strides) {
            (MR, [_, 1]) if task.b.stride == NR => store(accumulate_row_major(task), tile),
            (MR, [1, PACK_MR]) if task.b.stride == NR => store(accumulate_column_major(task), tile),
            (1, _) => store(accumulate::<1>(task), tile),
            (2, _) => store(accumulate::<2>(task), tile),
            (3, _) => store(accumulate::<3>(task), tile),
            (4, _) => store(accumulate::<4>(task), tile),
            (5, _) => store(accumulate::<5>(task), tile),
            (MR, _) => store(accumulate::<MR>(task), tile),
            _ => unreachable!("a tile has 1 to {MR} rows"),
        }
    }
}

/// Accumulates the products of `R` rows with a micro-panel of B.
///
/// # Safety
/// The task has `R` rows and [`NR`] columns, and the CPU has AVX2 and FMA.
#[inline(always)]
unsafe fn accumulate<const R: usize>(task: TileTask) -> Avx2Accumulators<R> {
    // SAFETY: the loop reads `task.words` steps of `R` rows and of two registers of B, which exist by the caller's
    // guarantee; the pointers advance with wrapping arithmetic, so that they may end beyond the last step.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        let (mut a, mut b): (*const f32, *const f32) = (task.a.words.cast(), task.b.words.cast());
        for _ in 0..task.words {
            let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(LANES)));
            for (r, [sum0, sum1]) in sums.iter_mut().enumerate() {
                let value = _mm256_set1_ps(*a.add(r * task.a.strides[0]));
                *sum0 = _mm256_fmadd_ps(value, b0, *sum0);
                *sum1 = _mm256_fmadd_ps(value, b1, *sum1);
            }
            a = a.wrapping_add(task.a.strides[1]);
            b = b.wrapping_add(task.b.stride);
        }
        sums
    }
}

/// Multiplies one step along k, `$step` steps beyond the pointers; a step takes `$next` bytes of A. A step of B is one
/// cache line; the line 16 steps ahead is prefetched.
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

/// One step with a row-major A: rows are addressed by multiples of the row stride.
macro_rules! step_row_major {
    ($step:literal) => {
        step!($step, "4", "0" "0" "1" "{one}" "2" "3" "2*{one}" "4" "5" "{three}" "6" "7" "4*{one}" "8" "9" "{five}" "10" "11")
    };
}

/// One step with a column-major A: the words of all rows are adjacent.
macro_rules! step_column_major {
    ($step:literal) => {
        step!($step, "32", "0" "0" "1" "4" "2" "3" "8" "4" "5" "12" "6" "7" "16" "8" "9" "20" "10" "11")
    };
}

/// Runs `$step!` for all steps, four at a time, and evaluates to the accumulators.
macro_rules! accumulate_steps {
    ($task:expr, $step:ident, $next:literal, $($operand:tt)*) => {{
        let mut sums = [[_mm256_setzero_ps(); 2]; MR];
        // SAFETY: the caller of this macro's function guarantees that both operands of `$task` hold its steps; the
        // block reads nothing else but prefetches, writes no memory and declares all registers that it changes.
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
                left = inout(reg) $task.a.words => _,
                right = inout(reg) $task.b.words => _,
                count = inout(reg) $task.words => _,
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

/// Accumulates the products of [`MR`] row-major rows with a packed micro-panel of B.
///
/// # Safety
/// A holds [`MR`] rows of adjacent words, B is packed and as deep, and the CPU has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
unsafe fn accumulate_row_major(task: TileTask) -> Avx2Accumulators<MR> {
    let row = 4 * task.a.strides[0];
    accumulate_steps!(task, step_row_major, "4", one = in(reg) row, three = in(reg) 3 * row, five = in(reg) 5 * row,)
}

/// Accumulates the products of [`MR`] rows of a column-major micro-panel of A, whose steps lie [`PACK_MR`] words apart.
///
/// # Safety
/// A is such a micro-panel, B is packed and as deep, and the CPU has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
unsafe fn accumulate_column_major(task: TileTask) -> Avx2Accumulators<MR> {
    accumulate_steps!(task, step_column_major, "32",)
}

/// Writes accumulators to a tile of C or adds them, times `alpha`.
///
/// # Safety
/// The tile lies within C, no other thread accesses it, and the CPU has AVX2.
#[inline(always)]
unsafe fn store<const R: usize>(mut sums: Avx2Accumulators<R>, tile: OutputTile) {
    let OutputTile { data, row_stride, column_stride, columns, accumulate, alpha } = tile;
    // SAFETY: all offsets are those of `R` rows and at most `columns` columns of the tile, which lies within C by the
    // caller's guarantee; whole registers are stored only if the tile has all [`NR`] columns. Two `__m256` have the
    // size of 16 f32.
    unsafe {
        if alpha != 1.0 {
            sums.iter_mut().flatten().for_each(|half| *half = _mm256_mul_ps(*half, _mm256_set1_ps(alpha)));
        }
        if column_stride == 1 && columns == NR {
            for (r, halves) in sums.into_iter().enumerate() {
                for (half, sum) in halves.into_iter().enumerate() {
                    let to = data.add(r * row_stride + half * LANES);
                    _mm256_storeu_ps(to, if accumulate { _mm256_add_ps(_mm256_loadu_ps(to), sum) } else { sum });
                }
            }
            return;
        }
        // The tile is incomplete, or C is transposed: rows of the tile are columns of C.
        for (r, halves) in sums.into_iter().enumerate() {
            let values: [f32; NR] = std::mem::transmute(halves);
            for (column, value) in values.into_iter().take(columns).enumerate() {
                let to = data.add(r * row_stride + column * column_stride);
                *to = if accumulate { *to + value } else { value };
            }
        }
    }
}
