//! Micro-kernels for AVX-512, on f32 and on pairs of bf16.

mod full_tile;
mod pack;
mod registers;

pub(super) use pack::{gather_words, pack_a_bf16, pack_b_bf16};
pub(super) use registers::{lane_mask, transpose};

use super::{
    micro_kernel::MicroKernel,
    operands::{MicroPanelA, Operand, OutputTile, PackBuffer, RowBlock, TileTask},
};
use std::{arch::x86_64::*, ops::Range};

/// NR: columns of B that a micro-kernel processes at a time, two registers of 512 bits.
pub(super) const NR: usize = 32;
/// MR: rows of A that a micro-kernel processes at a time.
const MR: usize = 12;
/// Words from one step along k to the next in a column-major micro-panel of A.
const PACK_MR: usize = 16;

/// AVX-512 on f32: a word is an f32.
#[derive(Clone, Copy)]
pub(super) struct Avx512F32;

impl MicroKernel for Avx512F32 {
    const MR: usize = MR;
    const NR: usize = NR;
    const PACK_MR: usize = PACK_MR;
    const K_PER_WORD: usize = 1;

    type ThreadState = ();

    unsafe fn prepare_thread(self) {}

    fn reads_f32_in_place(self) -> bool {
        true
    }

    unsafe fn pack_b(self, b: &Operand, panels: Range<usize>, k: Range<usize>, to: PackBuffer) {
        // SAFETY: the conditions are the same, and each arm passes the element type of B.
        unsafe {
            match b.is_bf16 {
                false => pack::pack_b_f32::<false>(b, panels, k, to),
                true => pack::pack_b_f32::<true>(b, panels, k, to),
            }
        }
    }

    unsafe fn pack_a(
        self,
        a: &Operand,
        RowBlock { rows, next }: RowBlock,
        k: Range<usize>,
        buffer: *mut u32,
    ) -> MicroPanelA {
        // SAFETY: the conditions are the same, and the first two arms match the types and layouts of their functions.
        unsafe {
            match a.is_bf16 {
                true => pack::pack_a_f32(a, rows, k, buffer),
                false if a.strides[0] == 1 && rows.len() == MR => pack::pack_a_column_major(a, rows, k, buffer),
                false => MicroPanelA {
                    next_rows: a.ptr(next, k.start).cast(),
                    ..MicroPanelA::new(a.ptr(rows.start, k.start).cast(), a.strides)
                },
            }
        }
    }

    #[inline]
    unsafe fn compute_tile(self, task: TileTask, tile: OutputTile) {
        // SAFETY: the conditions are the same.
        unsafe { compute_tile_f32(task, tile) }
    }
}

/// AVX-512 BF16: a word is a pair of bf16.
#[derive(Clone, Copy)]
pub(super) struct Avx512Bf16;

impl MicroKernel for Avx512Bf16 {
    const MR: usize = MR;
    const NR: usize = NR;
    const PACK_MR: usize = PACK_MR;
    const K_PER_WORD: usize = 2;

    type ThreadState = ();

    unsafe fn prepare_thread(self) {}

    fn reads_f32_in_place(self) -> bool {
        false
    }

    unsafe fn pack_b(self, b: &Operand, panels: Range<usize>, k: Range<usize>, to: PackBuffer) {
        // SAFETY: the conditions are the same, and each arm passes the element type of B.
        unsafe {
            match b.is_bf16 {
                false => pack_b_bf16::<false>(b, panels, k, to),
                true => pack_b_bf16::<true>(b, panels, k, to),
            }
        }
    }

    unsafe fn pack_a(self, a: &Operand, block: RowBlock, k: Range<usize>, buffer: *mut u32) -> MicroPanelA {
        // SAFETY: the conditions are the same, and each arm passes the element type of A.
        unsafe {
            match a.is_bf16 {
                true if has_pairs_in_place(a, k.end) => bf16_in_place(a, block.rows.start, k.start),
                true => pack_a_bf16::<true>(a, block.rows, k, buffer),
                false => pack_a_bf16::<false>(a, block.rows, k, buffer),
            }
        }
    }

    #[inline]
    unsafe fn compute_tile(self, task: TileTask, tile: OutputTile) {
        // SAFETY: the conditions are the same.
        unsafe { compute_tile_bf16(task, tile) }
    }
}

/// Returns true if rows of a bf16 operand that end at value `end` are words in memory.
pub(super) fn has_pairs_in_place(operand: &Operand, end: usize) -> bool {
    operand.strides[1] == 1 && operand.strides[0].is_multiple_of(2) && end.is_multiple_of(2)
}

/// Returns a micro-panel of a bf16 A in place, if [`has_pairs_in_place`] returns true for it.
pub(super) fn bf16_in_place(a: &Operand, row: usize, k: usize) -> MicroPanelA {
    MicroPanelA::new(a.ptr(row, k).cast(), [a.strides[0] / 2, 1])
}

/// Calls the kernel that is compiled for the given number of rows and stores its accumulators.
macro_rules! for_rows {
    ($sum:ident, $task:ident, $tile:ident) => {
        for_rows!(@ $sum, $task, $tile, 1 2 3 4 5 6 7 8 9 10 11 12)
    };
    (@ $sum:ident, $task:ident, $tile:ident, $($n:literal)*) => {
        match $task.rows {
            $($n => store::<$n>($sum::<$n>($task), $tile),)*
            _ => unreachable!("a tile has 1 to {MR} rows"),
        }
    };
}

/// Computes a tile with AVX-512 on f32 words.
///
/// # Safety
/// The conditions of [`MicroKernel::compute_tile`] hold for [`Avx512F32`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn compute_tile_f32(task: TileTask, tile: OutputTile) {
    // SAFETY: the micro-panels hold the words of the task by the caller's guarantee, and each arm matches the layout
    // that its kernel requires.
    unsafe {
        match task.a.strides {
            [_, 1] if task.rows == MR && task.b.stride == NR => store(full_tile::accumulate_row_major(task), tile),
            [1, MR] if task.rows == MR && task.b.stride == NR => {
                store(full_tile::accumulate_column_major(task), tile);
            }
            _ => for_rows!(accumulate_f32, task, tile),
        }
    }
}

/// Computes a tile with AVX-512 BF16 on pairs of bf16.
///
/// # Safety
/// The conditions of [`MicroKernel::compute_tile`] hold for [`Avx512Bf16`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn compute_tile_bf16(task: TileTask, tile: OutputTile) {
    // SAFETY: the micro-panels hold the words of the task and the tile lies within C by the caller's guarantee.
    unsafe { for_rows!(accumulate_bf16, task, tile) }
}

/// The accumulators of `R` rows: two registers each.
type Avx512Accumulators<const R: usize> = [[__m512; 2]; R];

/// Accumulates the products of `R` rows with a micro-panel of B in f32.
///
/// # Safety
/// The task has `R` rows and [`NR`] columns, and the CPU has AVX-512F.
#[inline(always)]
unsafe fn accumulate_f32<const R: usize>(task: TileTask) -> Avx512Accumulators<R> {
    // SAFETY: the loop reads `task.words` steps of `R` rows and of two registers of B, which exist by the caller's
    // guarantee; the pointers advance with wrapping arithmetic, so that they may end beyond the last step.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        let (mut a, mut b): (*const f32, *const f32) = (task.a.words.cast(), task.b.words.cast());
        for _ in 0..task.words {
            let b0 = _mm512_loadu_ps(b);
            let b1 = _mm512_loadu_ps(b.add(16));
            for (r, [sum0, sum1]) in sums.iter_mut().enumerate() {
                let value = _mm512_set1_ps(*a.add(r * task.a.strides[0]));
                *sum0 = _mm512_fmadd_ps(value, b0, *sum0);
                *sum1 = _mm512_fmadd_ps(value, b1, *sum1);
            }
            a = a.wrapping_add(task.a.strides[1]);
            b = b.wrapping_add(task.b.stride);
        }
        sums
    }
}

/// Accumulates the products of `R` rows of bf16 pairs with a micro-panel of B in f32.
///
/// # Safety
/// The task has `R` rows and [`NR`] columns, and the CPU has AVX-512F and BF16.
#[inline(always)]
unsafe fn accumulate_bf16<const R: usize>(task: TileTask) -> Avx512Accumulators<R> {
    // SAFETY: the loop reads `task.words` steps of `R` rows and of two registers of B, which exist by the caller's
    // guarantee; `__m512i` and `__m512bh` are both 512 plain bits.
    unsafe {
        let pairs = |register: __m512i| -> __m512bh { std::mem::transmute(register) };
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        let (mut a, mut b): (*const i32, *const i32) = (task.a.words.cast(), task.b.words.cast());
        for _ in 0..task.words {
            let b0 = pairs(_mm512_loadu_si512(b.cast()));
            let b1 = pairs(_mm512_loadu_si512(b.add(16).cast()));
            for (r, [sum0, sum1]) in sums.iter_mut().enumerate() {
                let value = pairs(_mm512_set1_epi32(a.add(r * task.a.strides[0]).read_unaligned()));
                *sum0 = _mm512_dpbf16_ps(*sum0, value, b0);
                *sum1 = _mm512_dpbf16_ps(*sum1, value, b1);
            }
            a = a.wrapping_add(task.a.strides[1]);
            b = b.wrapping_add(task.b.stride);
        }
        sums
    }
}

/// Writes accumulators to a tile of C or adds them, times `alpha`.
///
/// # Safety
/// The tile lies within C, no other thread accesses it, and the CPU has AVX-512F and VL.
#[inline(always)]
unsafe fn store<const R: usize>(mut sums: Avx512Accumulators<R>, tile: OutputTile) {
    // SAFETY: the masks limit the loads and stores to the `R` rows and the columns of the tile, which lies within C by
    // the caller's guarantee.
    unsafe {
        if tile.alpha != 1.0 {
            let factor = _mm512_set1_ps(tile.alpha);
            for half in sums.iter_mut().flatten() {
                *half = _mm512_mul_ps(*half, factor);
            }
        }
        let put = |sum: __m512, to: *mut f32, mask: __mmask16| {
            let sum = if tile.accumulate { _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, to)) } else { sum };
            _mm512_mask_storeu_ps(to, mask, sum);
        };
        let halves = tile.columns.div_ceil(16);
        if tile.column_stride == 1 {
            for half in 0..halves {
                let mask = lane_mask(tile.columns - 16 * half);
                for (r, sums) in sums.iter().enumerate() {
                    put(sums[half], tile.data.add(r * tile.row_stride + 16 * half), mask);
                }
            }
            return;
        }
        // C is transposed: rows of the tile are columns of C, with unit stride.
        for half in 0..halves {
            let mut registers = [_mm512_setzero_si512(); 16];
            for (register, sums) in registers.iter_mut().zip(&sums) {
                *register = _mm512_castps_si512(sums[half]);
            }
            let columns = transpose(registers);
            let count = (tile.columns - 16 * half).min(16);
            for (index, column) in columns.into_iter().take(count).enumerate() {
                let to = tile.data.add((16 * half + index) * tile.column_stride);
                put(_mm512_castsi512_ps(column), to, lane_mask(R));
            }
        }
    }
}
