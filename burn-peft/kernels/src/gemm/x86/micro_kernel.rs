//! Micro-kernels: one tile of C is accumulated in registers.

use super::{GemmProblem, LOAD_C_MAX_WORDS, MR, MicroKernel, NR, StridedOutput, amx, avx2, avx512, pack::transpose};
use std::{arch::x86_64::*, mem::MaybeUninit, ops::Range};

/// Words from one step along k to the next in a column-major micro-panel of A.
pub(super) const PACK_MR: usize = 16;

/// A micro-panel of A: words with strides from row to row and along k.
#[derive(Clone, Copy)]
pub(super) struct MicroPanelA {
    pub(super) words: *const u32,
    pub(super) strides: [usize; 2],
    /// Offset in words from the first 16 rows to the remaining ones, for AMX tiles.
    pub(super) second_tile_offset: usize,
    /// The first of the rows that are read next, with the same strides; they are prefetched meanwhile.
    pub(super) next_rows: *const u32,
}

impl MicroPanelA {
    /// Creates a micro-panel after which no particular rows are prefetched.
    pub(super) fn new(words: *const u32, strides: [usize; 2]) -> Self {
        Self { words, strides, second_tile_offset: 16 * strides[0], next_rows: words }
    }
}

/// A micro-panel of B: [`MicroKernel::nr`] words at each step along k, and the stride in words from one step to the
/// next.
#[derive(Clone, Copy)]
pub(super) struct MicroPanelB {
    pub(super) words: *const u32,
    pub(super) stride: usize,
}

/// Adds the product of a micro-panel of A with a micro-panel of B over a range of k to a tile of C, or writes it if C
/// is not accumulated and the range starts at 0.
///
/// # Safety
/// The micro-panels hold the words of the whole range, the rows and the panel lie within C, and the CPU has the
/// instructions of the problem's micro-kernel.
#[inline]
pub(super) unsafe fn compute_tile(
    problem: &GemmProblem,
    (left, right): (MicroPanelA, MicroPanelB),
    [from, to]: [usize; 2],
    (rows, column): (Range<usize>, usize),
) {
    let width = problem.micro_kernel.nr();
    let start = column * width;
    let columns = width.min(problem.b.count - start);
    let StridedOutput { data: values, strides: [down, across], accumulate: add, alpha: factor } = problem.c;
    // SAFETY: the caller passes rows and a panel that lie within C, so the offset of the tile is in bounds.
    let out = unsafe { values.add(rows.start * down + start * across) };
    let output = OutputTile {
        data: out,
        row_stride: down,
        column_stride: across,
        columns,
        accumulate: add || from > 0,
        alpha: factor,
    };
    let words = (to - from).div_ceil(problem.micro_kernel.k_per_word());
    output.prefetch(rows.len());
    // SAFETY: the caller guarantees the micro-panels, the tile and the CPU features, which are the conditions of all
    // four kernels; `words` is the range in words.
    unsafe {
        match problem.micro_kernel {
            MicroKernel::Avx2(_) => avx2::compute_tile(rows.len(), words, (left, right), output),
            MicroKernel::Avx512 => compute_tile_f32(rows.len(), words, left, right, output),
            MicroKernel::Avx512Bf16 => compute_tile_bf16(rows.len(), words, left, right, output),
            MicroKernel::Amx => compute_tile_amx(problem, (rows.len(), words), (left, right), output),
        }
    }
}

/// A tile of C.
#[derive(Clone, Copy)]
pub(super) struct OutputTile {
    pub(super) data: *mut f32,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
    pub(super) columns: usize,
    pub(super) accumulate: bool,
    pub(super) alpha: f32,
}

impl OutputTile {
    /// Prefetches the tile of C for writing while its sums are computed.
    fn prefetch(&self, rows: usize) {
        let (lines, apart, line_parts) = match self.column_stride {
            1 => (rows, self.row_stride, self.columns.div_ceil(16)),
            _ => (self.columns, self.column_stride, 1),
        };
        for line in 0..lines {
            for part in 0..line_parts {
                // SAFETY: a prefetch accesses no memory and may take any address.
                unsafe { _mm_prefetch::<_MM_HINT_ET0>(self.data.wrapping_add(line * apart + 16 * part).cast()) };
            }
        }
    }
}

/// Calls the kernel that is compiled for the given number of rows and stores its accumulators.
macro_rules! for_rows {
    ($sum:ident, $rows:ident, $arguments:tt) => {
        for_rows!(@ $sum, $rows, $arguments, 1 2 3 4 5 6 7 8 9 10 11 12)
    };
    (@ $sum:ident, $rows:ident, ($words:ident, $left:ident, $right:ident, $place:ident), $($n:literal)*) => {
        match $rows {
            $($n => store::<$n>($sum::<$n>($words, $left, $right), $place),)*
            _ => unreachable!("a tile has 1 to {MR} rows"),
        }
    };
}

/// Computes a tile with AVX-512 on f32 words.
///
/// # Safety
/// The conditions of [`compute_tile`] hold; `words` is the length of the micro-panels, and the CPU has AVX-512F, BW and
/// VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn compute_tile_f32(rows: usize, words: usize, left: MicroPanelA, right: MicroPanelB, place: OutputTile) {
    // SAFETY: the micro-panels hold `words` words by the caller's guarantee, and each arm matches the layout that its
    // kernel requires.
    unsafe {
        match left.strides {
            [_, 1] if rows == MR && right.stride == NR => {
                store(avx512::accumulate_row_major(words, left, right), place)
            }
            [1, MR] if rows == MR && right.stride == NR => {
                store(avx512::accumulate_column_major(words, left, right), place);
            }
            _ => for_rows!(accumulate_f32, rows, (words, left, right, place)),
        }
    }
}

/// Computes a tile with AVX-512 BF16 on pairs of bf16.
///
/// # Safety
/// The conditions of [`compute_tile`] hold; `words` is the length of the micro-panels, and the CPU has AVX-512F, BW, VL
/// and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn compute_tile_bf16(rows: usize, words: usize, left: MicroPanelA, right: MicroPanelB, place: OutputTile) {
    // SAFETY: the micro-panels hold `words` words and the tile lies within C by the caller's guarantee.
    unsafe { for_rows!(accumulate_bf16, rows, (words, left, right, place)) }
}

/// Computes a tile with AMX. Short sums continue from the values of C: a complete tile is loaded and stored in place,
/// an incomplete one goes through a buffer, so that both round alike. Long sums, or those with a factor `alpha`, are
/// accumulated from zero in a buffer and then added to C.
///
/// # Safety
/// The conditions of [`compute_tile`] hold; `words` is the length of the micro-panels, padded with zeros to a multiple
/// of 16, and this thread holds [`amx::TileRegisters`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn compute_tile_amx(
    problem: &GemmProblem,
    (rows, words): (usize, usize),
    sides: (MicroPanelA, MicroPanelB),
    place: OutputTile,
) {
    let OutputTile { data: out, row_stride: down, column_stride: across, columns, accumulate: add, alpha: factor } =
        place;
    debug_assert!(across == 1);
    let mut room = TileBuffer(MaybeUninit::uninit());
    let sums = room.0.as_mut_ptr().cast::<f32>();
    let parts = [problem.a.terms, problem.b.terms];
    // SAFETY: the micro-panels are packed for AMX and the tile lies within C by the caller's guarantee; the buffer
    // holds a complete tile, and the masks of `map_rows` limit the access to C to its `rows × columns`.
    unsafe {
        if factor != 1.0 || problem.k_words() > LOAD_C_MAX_WORDS {
            amx::accumulate(words, sides, parts, (sums, NR, false));
            map_rows([rows, columns], (sums, NR), (out, down), |sum, before| {
                let sum = _mm512_mul_ps(sum, _mm512_set1_ps(factor));
                if add { _mm512_add_ps(sum, before) } else { sum }
            });
        } else if [rows, columns] == [amx::MR, NR] {
            amx::accumulate(words, sides, parts, (out, down, add));
        } else {
            if add {
                map_rows([rows, columns], (out, down), (sums, NR), |value, _| value);
            }
            amx::accumulate(words, sides, parts, (sums, NR, add));
            map_rows([rows, columns], (sums, NR), (out, down), |value, _| value);
        }
    }
}

/// Aligned buffer for the sums of a complete AMX tile.
#[repr(C, align(64))]
struct TileBuffer(MaybeUninit<[f32; amx::MR * NR]>);

/// Stores `of(source, destination)` for each row of at most [`NR`] values, between buffers of different strides.
///
/// # Safety
/// Both buffers hold `rows` rows of `columns` values at their strides, and the CPU has AVX-512F.
#[inline(always)]
unsafe fn map_rows(
    [rows, columns]: [usize; 2],
    (from, from_stride): (*const f32, usize),
    (to, to_stride): (*mut f32, usize),
    of: impl Fn(__m512, __m512) -> __m512,
) {
    for row in 0..rows {
        for start in (0..columns).step_by(16) {
            let mask = lane_mask(columns - start);
            // SAFETY: `row` and `start` lie within the buffers by the caller's guarantee, and the mask excludes values
            // beyond `columns`.
            unsafe {
                let to = to.add(row * to_stride + start);
                let value = _mm512_maskz_loadu_ps(mask, from.add(row * from_stride + start));
                _mm512_mask_storeu_ps(to, mask, of(value, _mm512_maskz_loadu_ps(mask, to)));
            }
        }
    }
}

pub(super) type Avx512Accumulators<const R: usize> = [[__m512; 2]; R];

/// Accumulates the products of `R` rows with a micro-panel of B in f32.
///
/// # Safety
/// `left` holds `R` rows and `right` [`NR`] columns of `words` words, and the CPU has AVX-512F.
#[inline(always)]
unsafe fn accumulate_f32<const R: usize>(words: usize, left: MicroPanelA, right: MicroPanelB) -> Avx512Accumulators<R> {
    // SAFETY: the loop reads `words` steps of `R` rows and of two registers of B, which exist by the caller's
    // guarantee; the pointers advance with wrapping arithmetic, so that they may end beyond the last step.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        let (mut a, mut b): (*const f32, *const f32) = (left.words.cast(), right.words.cast());
        for _ in 0..words {
            let b0 = _mm512_loadu_ps(b);
            let b1 = _mm512_loadu_ps(b.add(16));
            for (r, [sum0, sum1]) in sums.iter_mut().enumerate() {
                let value = _mm512_set1_ps(*a.add(r * left.strides[0]));
                *sum0 = _mm512_fmadd_ps(value, b0, *sum0);
                *sum1 = _mm512_fmadd_ps(value, b1, *sum1);
            }
            a = a.wrapping_add(left.strides[1]);
            b = b.wrapping_add(right.stride);
        }
        sums
    }
}

/// Accumulates the products of `R` rows of bf16 pairs with a micro-panel of B in f32.
///
/// # Safety
/// `left` holds `R` rows and `right` [`NR`] columns of `words` words, and the CPU has AVX-512F and BF16.
#[inline(always)]
unsafe fn accumulate_bf16<const R: usize>(
    words: usize,
    left: MicroPanelA,
    right: MicroPanelB,
) -> Avx512Accumulators<R> {
    // SAFETY: the loop reads `words` steps of `R` rows and of two registers of B, which exist by the caller's
    // guarantee; `__m512i` and `__m512bh` are both 512 plain bits.
    unsafe {
        let pairs = |register: __m512i| -> __m512bh { std::mem::transmute(register) };
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        let (mut a, mut b): (*const i32, *const i32) = (left.words.cast(), right.words.cast());
        for _ in 0..words {
            let b0 = pairs(_mm512_loadu_si512(b.cast()));
            let b1 = pairs(_mm512_loadu_si512(b.add(16).cast()));
            for (r, [sum0, sum1]) in sums.iter_mut().enumerate() {
                let value = pairs(_mm512_set1_epi32(a.add(r * left.strides[0]).read_unaligned()));
                *sum0 = _mm512_dpbf16_ps(*sum0, value, b0);
                *sum1 = _mm512_dpbf16_ps(*sum1, value, b1);
            }
            a = a.wrapping_add(left.strides[1]);
            b = b.wrapping_add(right.stride);
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

/// Returns the mask of the first `n` of 16 lanes.
#[inline(always)]
pub(super) fn lane_mask(n: usize) -> __mmask16 {
    if n >= 16 { !0 } else { (1 << n) - 1 }
}
