//! Micro-kernels for AMX tiles, on pairs of bf16 and on f32 that is split into three bf16 terms (bf16x3).

mod bf16x3;
mod pack;
mod tiles;

pub(super) use tiles::{TILE_K, available};

use super::{
    avx512::{self, NR, lane_mask},
    micro_kernel::MicroKernel,
    operands::{MicroPanelA, Operand, OutputTile, PackBuffer, RowBlock, TileTask},
};
use std::{arch::x86_64::*, mem::MaybeUninit, ops::Range};
use tiles::TileRegisters;

/// MR: rows of A that are multiplied with a micro-panel of B at a time, two tiles.
const MR: usize = 32;
/// The largest number of words along k for which AMX tiles load C and continue its sums. Longer sums would accumulate
/// too much rounding error, so each KC block is then accumulated from zero and added to C.
const LOAD_C_MAX_WORDS: usize = 1 << 10;

/// AMX tiles on bf16: a word is a pair of bf16, and the words of a row of A are adjacent.
#[derive(Clone, Copy)]
pub(super) struct AmxBf16;

impl MicroKernel for AmxBf16 {
    const MR: usize = MR;
    const NR: usize = NR;
    const PACK_MR: usize = MR;
    const K_PER_WORD: usize = 2;
    const CAN_TRANSPOSE_C: bool = false;

    type ThreadState = TileRegisters;

    unsafe fn prepare_thread(self) -> TileRegisters {
        // SAFETY: the conditions are the same.
        unsafe { TileRegisters::configure() }
    }

    fn reads_f32_in_place(self) -> bool {
        false
    }

    unsafe fn pack_b(self, b: &Operand, panels: Range<usize>, k: Range<usize>, to: PackBuffer) {
        // SAFETY: the conditions are the same, and each arm passes the element type of B.
        unsafe {
            match b.is_bf16 {
                false => avx512::pack_b_bf16::<false>(b, panels, k, to),
                true => avx512::pack_b_bf16::<true>(b, panels, k, to),
            }
        }
    }

    unsafe fn pack_a(self, a: &Operand, block: RowBlock, k: Range<usize>, buffer: *mut u32) -> MicroPanelA {
        // Rows can be read in place only if they fill complete tiles.
        let fills_tiles = block.rows.len() == MR && k.len().is_multiple_of(2 * TILE_K);
        // SAFETY: the conditions are the same, and each arm passes the element type of A.
        unsafe {
            match a.is_bf16 {
                true if fills_tiles && avx512::has_pairs_in_place(a, k.end) => {
                    avx512::bf16_in_place(a, block.rows.start, k.start)
                }
                true => pack::pack_a::<true>(a, block.rows, k, buffer),
                false => pack::pack_a::<false>(a, block.rows, k, buffer),
            }
        }
    }

    #[inline]
    unsafe fn compute_tile(self, task: TileTask, tile: OutputTile) {
        // SAFETY: the conditions are the same.
        unsafe { compute_tile(task, tile) }
    }
}

/// AMX tiles on f32, which is split into three bf16 terms; operands that are bf16 have one term.
#[derive(Clone, Copy)]
pub(super) struct AmxF32x3;

impl MicroKernel for AmxF32x3 {
    const MR: usize = MR;
    const NR: usize = NR;
    const PACK_MR: usize = MR;
    const K_PER_WORD: usize = 2;
    const F32_TERMS: usize = bf16x3::TERMS;
    const CAN_TRANSPOSE_C: bool = false;

    type ThreadState = TileRegisters;

    unsafe fn prepare_thread(self) -> TileRegisters {
        // SAFETY: the conditions are the same.
        unsafe { TileRegisters::configure() }
    }

    fn reads_f32_in_place(self) -> bool {
        false
    }

    unsafe fn pack_b(self, b: &Operand, panels: Range<usize>, k: Range<usize>, to: PackBuffer) {
        // SAFETY: the conditions are the same, and B is f32 where it is split.
        unsafe {
            match b.is_bf16 {
                false => bf16x3::pack_b(b, panels, k, to),
                true => AmxBf16.pack_b(b, panels, k, to),
            }
        }
    }

    unsafe fn pack_a(self, a: &Operand, block: RowBlock, k: Range<usize>, buffer: *mut u32) -> MicroPanelA {
        // SAFETY: the conditions are the same, and A is f32 where it is split.
        unsafe {
            match a.is_bf16 {
                false => bf16x3::pack_a(a, block.rows, k, buffer),
                true => AmxBf16.pack_a(a, block, k, buffer),
            }
        }
    }

    #[inline]
    unsafe fn compute_tile(self, task: TileTask, tile: OutputTile) {
        // SAFETY: the conditions are the same.
        unsafe { compute_tile(task, tile) }
    }
}

/// Rows of f32 that start `stride` values apart.
#[derive(Clone, Copy)]
struct Rows {
    data: *mut f32,
    stride: usize,
}

/// Computes a tile with AMX. Short sums continue from the values of C: a complete tile is loaded and stored in place,
/// an incomplete one goes through a buffer, so that both round alike. Long sums, or those with a factor `alpha`, are
/// accumulated from zero in a buffer and then added to C.
///
/// # Safety
/// The conditions of [`MicroKernel::compute_tile`] hold, and the words of the micro-panels are padded with zeros to a
/// multiple of 16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn compute_tile(task: TileTask, tile: OutputTile) {
    debug_assert!(tile.column_stride == 1);
    let shape = [task.rows, tile.columns];
    let c = Rows { data: tile.data, stride: tile.row_stride };
    let mut buffer = TileBuffer(MaybeUninit::uninit());
    let sums = Rows { data: buffer.0.as_mut_ptr().cast::<f32>(), stride: NR };
    // SAFETY: the micro-panels are packed for AMX and the tile lies within C by the caller's guarantee; the buffer
    // holds a complete tile, and the masks of `map_rows` limit the access to C to the rows and columns of the tile.
    unsafe {
        if tile.alpha != 1.0 || task.product_words > LOAD_C_MAX_WORDS {
            tiles::accumulate(task, sums, false);
            map_rows(shape, sums, c, |sum, before| {
                let sum = _mm512_mul_ps(sum, _mm512_set1_ps(tile.alpha));
                if tile.accumulate { _mm512_add_ps(sum, before) } else { sum }
            });
        } else if shape == [MR, NR] {
            tiles::accumulate(task, c, tile.accumulate);
        } else {
            if tile.accumulate {
                map_rows(shape, c, sums, |value, _| value);
            }
            tiles::accumulate(task, sums, tile.accumulate);
            map_rows(shape, sums, c, |value, _| value);
        }
    }
}

/// Aligned buffer for the sums of a complete AMX tile.
#[repr(C, align(64))]
struct TileBuffer(MaybeUninit<[f32; MR * NR]>);

/// Stores `of(source, destination)` for each row of at most [`NR`] values, between buffers of different strides.
///
/// # Safety
/// Both buffers hold `rows` rows of `columns` values at their strides, and the CPU has AVX-512F.
#[inline(always)]
unsafe fn map_rows([rows, columns]: [usize; 2], from: Rows, to: Rows, of: impl Fn(__m512, __m512) -> __m512) {
    for row in 0..rows {
        for start in (0..columns).step_by(16) {
            let mask = lane_mask(columns - start);
            // SAFETY: `row` and `start` lie within the buffers by the caller's guarantee, and the mask excludes values
            // beyond `columns`.
            unsafe {
                let to = to.data.add(row * to.stride + start);
                let value = _mm512_maskz_loadu_ps(mask, from.data.add(row * from.stride + start));
                _mm512_mask_storeu_ps(to, mask, of(value, _mm512_maskz_loadu_ps(mask, to)));
            }
        }
    }
}
