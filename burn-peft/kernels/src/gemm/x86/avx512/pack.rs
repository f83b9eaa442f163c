//! Packing of the operands into micro-panels, in the order in which the micro-kernels read them.

use super::{
    super::operands::PREFETCH_DISTANCE,
    MR, MicroPanelA, NR, Operand, PACK_MR, PackBuffer,
    registers::{lane_mask, transpose},
};
use std::{arch::x86_64::*, ops::Range};

/// Packs micro-panels of B as f32 words.
///
/// # Safety
/// The conditions of [`MicroKernel::pack_b`](super::MicroKernel::pack_b) hold, `IS_BF16` is true exactly if B is bf16,
/// and the CPU has AVX-512F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn pack_b_f32<const IS_BF16: bool>(
    operand: &Operand,
    panels: Range<usize>,
    k: Range<usize>,
    to: PackBuffer,
) {
    // SAFETY: the conditions are the same, and the target features of this function are those that the inlined body
    // needs.
    unsafe { pack_b_panels::<IS_BF16, false>(operand, panels, k, to) }
}

/// Packs micro-panels of B as pairs of bf16.
///
/// # Safety
/// The conditions of [`MicroKernel::pack_b`](super::MicroKernel::pack_b) hold, `IS_BF16` is true exactly if B is bf16,
/// and the CPU has AVX-512F, BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(in super::super) unsafe fn pack_b_bf16<const IS_BF16: bool>(
    operand: &Operand,
    panels: Range<usize>,
    k: Range<usize>,
    to: PackBuffer,
) {
    // SAFETY: the conditions are the same, and the target features of this function are those that the inlined body
    // needs.
    unsafe { pack_b_panels::<IS_BF16, true>(operand, panels, k, to) }
}

/// Packs micro-panels of B, reading memory in its order: one column after the other if B is column-major, else one step
/// along k of all panels after the other.
///
/// # Safety
/// The conditions of [`MicroKernel::pack_b`](super::MicroKernel::pack_b) hold, `IS_BF16` is true exactly if B is bf16,
/// and the CPU has AVX-512F, BW and VL (and BF16 if `PAIRS`).
#[inline(always)]
unsafe fn pack_b_panels<const IS_BF16: bool, const PAIRS: bool>(
    operand: &Operand,
    panels: Range<usize>,
    k: Range<usize>,
    to: PackBuffer,
) {
    let [pair, deep] = if PAIRS { [2, 16] } else { [1, 1] };
    let count = panels.len();
    // SAFETY: `first` and the counts are clamped to the columns of B, and `to` has room for each panel by the
    // caller's guarantee, of which a panel writes [`NR`] words at each step; prefetches may take any address.
    unsafe {
        if operand.strides[0] != 1 {
            for panel in 0..count {
                let start = (panels.start + panel) * NR;
                let vectors = start..operand.count.min(start + NR);
                pack_k_major::<IS_BF16, PAIRS, NR>(operand, vectors, k.clone(), to.skip_panels(panel).words);
            }
            return;
        }
        for word in 0..k.len().div_ceil(pair).next_multiple_of(deep) {
            for lane in (0..count * NR).step_by(16) {
                let first = (panels.start * NR + lane).min(operand.count);
                let vectors = first..operand.count.min(first + 16);
                _mm_prefetch::<_MM_HINT_T0>(operand.ptr(first, k.start + (word + PREFETCH_DISTANCE) * pair).cast());
                let words = gather_words::<IS_BF16, PAIRS>(operand, vectors, k.start + word * pair..k.end);
                _mm512_storeu_si512(to.words.add(lane / NR * to.panel_words + word * NR + lane % NR).cast(), words);
            }
        }
    }
}

/// Packs [`MR`] rows of a column-major f32 A so that consecutive steps along k are adjacent; in place, every step lies
/// in cache lines of its own.
///
/// # Safety
/// The conditions of [`MicroKernel::pack_a`](super::MicroKernel::pack_a) hold, A is column-major f32, `rows` has [`MR`]
/// rows, and the CPU has AVX-512F and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn pack_a_column_major(
    operand: &Operand,
    rows: Range<usize>,
    k: Range<usize>,
    to: *mut u32,
) -> MicroPanelA {
    // SAFETY: the mask limits each access to the [`MR`] rows, which exist by the caller's guarantee, and `to` has room
    // for them at each step.
    unsafe {
        for position in k.clone() {
            _mm_prefetch::<_MM_HINT_T0>(operand.ptr(rows.start, position + 2 * PREFETCH_DISTANCE).cast());
            let words = _mm512_maskz_loadu_epi32(lane_mask(MR), operand.ptr(rows.start, position).cast());
            _mm512_mask_storeu_epi32(to.add((position - k.start) * MR).cast(), lane_mask(MR), words);
        }
    }
    MicroPanelA::new(to, [1, MR])
}

/// Packs rows of bf16 as f32 words.
///
/// # Safety
/// The conditions of [`MicroKernel::pack_a`](super::MicroKernel::pack_a) hold, A is bf16, and the CPU has AVX-512F, BW
/// and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn pack_a_f32(operand: &Operand, rows: Range<usize>, k: Range<usize>, to: *mut u32) -> MicroPanelA {
    // SAFETY: the conditions are the same, and the target features of this function are those that the inlined body
    // needs.
    unsafe { pack_a_rows::<true, false>(operand, rows, k, to) }
}

/// Packs rows as pairs of bf16.
///
/// # Safety
/// The conditions of [`MicroKernel::pack_a`](super::MicroKernel::pack_a) hold, `IS_BF16` is true exactly if A is bf16,
/// and the CPU has AVX-512F, BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(in super::super) unsafe fn pack_a_bf16<const IS_BF16: bool>(
    operand: &Operand,
    rows: Range<usize>,
    k: Range<usize>,
    to: *mut u32,
) -> MicroPanelA {
    // SAFETY: the conditions are the same, and the target features of this function are those that the inlined body
    // needs.
    unsafe { pack_a_rows::<IS_BF16, true>(operand, rows, k, to) }
}

/// Packs rows as words: row-major if the values of a row are adjacent, else k-major as [`pack_k_major`] does.
///
/// # Safety
/// The conditions of [`MicroKernel::pack_a`](super::MicroKernel::pack_a) hold, `IS_BF16` is true exactly if A is bf16,
/// and the CPU has AVX-512F, BW and VL (and BF16 if `PAIRS`).
#[inline(always)]
unsafe fn pack_a_rows<const IS_BF16: bool, const PAIRS: bool>(
    operand: &Operand,
    rows: Range<usize>,
    k: Range<usize>,
    to: *mut u32,
) -> MicroPanelA {
    // SAFETY: the loads are masked to the values from `position` on that exist, of which `k` is the range, and `to`
    // has room for all rows of `depth` words by the caller's guarantee; prefetches may take any address.
    unsafe {
        if operand.strides[1] != 1 {
            pack_k_major::<IS_BF16, PAIRS, PACK_MR>(operand, rows, k.clone(), to);
            return MicroPanelA::new(to, [1, PACK_MR]);
        }
        let pair = if PAIRS { 2 } else { 1 };
        let words = k.len().div_ceil(pair);
        let depth = words.next_multiple_of(16);
        let tile = MR * operand.strides[0] * if IS_BF16 { 2 } else { 4 };
        for (index, row) in rows.enumerate() {
            for word in (0..words).step_by(16) {
                let position = k.start + word * pair;
                // Prefetch the rows of the next micro-panel while this one is multiplied.
                let ahead = operand.ptr(row, position).wrapping_add(tile);
                _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
                if PAIRS && !IS_BF16 {
                    _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(64).cast());
                }
                let part = load_along_k::<IS_BF16, PAIRS>(operand.ptr(row, position), k.end - position);
                _mm512_storeu_si512(to.add(index * depth + word).cast(), part);
            }
        }
        MicroPanelA::new(to, [depth, 1])
    }
}

/// Writes vectors (rows of A or columns of B) as words in k-major order: at each step along k `LANES` words, one of
/// each vector, zeros where there is none. Words are pairs of bf16 if `PAIRS`.
///
/// # Safety
/// `vectors` and the range of k lie within `operand`, `IS_BF16` is true exactly if its values are bf16, `to` has room
/// for `LANES` words at each step (padded to a multiple of 16 steps if `PAIRS`, or if the values along k are adjacent),
/// and the CPU has AVX-512F, BW and VL (and BF16 if `PAIRS`).
#[inline(always)]
unsafe fn pack_k_major<const IS_BF16: bool, const PAIRS: bool, const LANES: usize>(
    operand: &Operand,
    vectors: Range<usize>,
    k: Range<usize>,
    to: *mut u32,
) {
    let pair = if PAIRS { 2 } else { 1 };
    let words = k.len().div_ceil(pair);
    let depth = if PAIRS { words.next_multiple_of(16) } else { words };
    // SAFETY: `first` and `count` are clamped to `vectors`, loads along k are masked to the range, and `to` has room
    // for every step by the caller's guarantee.
    unsafe {
        for lane in (0..LANES).step_by(16) {
            let first = (vectors.start + lane).min(vectors.end);
            let count = (vectors.end - first).min(16);
            let to = to.add(lane);
            if count == 0 {
                for word in 0..depth {
                    _mm512_storeu_si512(to.add(word * LANES).cast(), _mm512_setzero_si512());
                }
            } else if operand.strides[1] == 1 {
                for word in (0..words).step_by(16) {
                    let position = k.start + word * pair;
                    let rows = load_rows::<IS_BF16, PAIRS>(operand, first..first + count, position..k.end);
                    for (index, column) in transpose(rows).into_iter().enumerate() {
                        _mm512_storeu_si512(to.add((word + index) * LANES).cast(), column);
                    }
                }
            } else {
                for word in 0..depth {
                    let column =
                        gather_words::<IS_BF16, PAIRS>(operand, first..first + count, k.start + word * pair..k.end);
                    _mm512_storeu_si512(to.add(word * LANES).cast(), column);
                }
            }
        }
    }
}

/// Loads up to 16 words along k, from the start of the range `k`, of each of up to 16 vectors whose values along k are
/// adjacent; zeros for the others and where the range has ended.
///
/// # Safety
/// The vectors and the range lie within `operand`, `IS_BF16` is true exactly if they are bf16, and the CPU has
/// AVX-512F, BW and VL (and BF16 if `PAIRS`).
#[inline(always)]
unsafe fn load_rows<const IS_BF16: bool, const PAIRS: bool>(
    operand: &Operand,
    vectors: Range<usize>,
    k: Range<usize>,
) -> [__m512i; 16] {
    // SAFETY: loads are masked to the range, which lies within `operand` by the caller's guarantee.
    unsafe {
        let mut rows = [_mm512_setzero_si512(); 16];
        for (row, vector) in rows.iter_mut().zip(vectors) {
            let values = operand.ptr(vector, k.start);
            _mm_prefetch::<_MM_HINT_T0>(values.wrapping_add(64 * PREFETCH_DISTANCE).cast());
            *row = load_along_k::<IS_BF16, PAIRS>(values, k.len());
        }
        rows
    }
}

/// Returns one word along k of each of up to 16 vectors, at the start of the range `k`; zeros for the others and
/// where the range has ended.
///
/// # Safety
/// The vectors and the range lie within `operand`, `IS_BF16` is true exactly if they are bf16, and the CPU has
/// AVX-512F, BW and VL (and BF16 if `PAIRS`).
#[inline(always)]
pub(in super::super) unsafe fn gather_words<const IS_BF16: bool, const PAIRS: bool>(
    operand: &Operand,
    vectors: Range<usize>,
    k: Range<usize>,
) -> __m512i {
    // SAFETY: the conditions of `gather_values` are the same; it checks that each of the two values along k exists.
    unsafe {
        let low = gather_values::<IS_BF16, PAIRS>(operand, vectors.clone(), k.clone());
        if !PAIRS {
            return low;
        }
        let high = gather_values::<IS_BF16, PAIRS>(operand, vectors, k.start + 1..k.end);
        _mm512_or_si512(low, _mm512_slli_epi32::<16>(high))
    }
}

/// Returns one value along k of each of up to 16 vectors, at the start of the range `k`; zeros for the others and
/// where the range has ended.
///
/// # Safety
/// The conditions of [`gather_words`] hold.
#[inline(always)]
unsafe fn gather_values<const IS_BF16: bool, const PAIRS: bool>(
    operand: &Operand,
    vectors: Range<usize>,
    k: Range<usize>,
) -> __m512i {
    // SAFETY: the range is not empty when memory is read, and the mask or the loop limits the reads to the vectors
    // that exist.
    unsafe {
        if k.start >= k.end {
            return _mm512_setzero_si512();
        }
        if operand.strides[0] == 1 {
            return load_across_k::<IS_BF16, PAIRS>(
                operand.ptr(vectors.start, k.start),
                lane_mask(vectors.end - vectors.start),
            );
        }
        let mut words = [0; 16];
        for (word, vector) in words.iter_mut().zip(vectors) {
            *word = load_one::<IS_BF16, PAIRS>(operand.ptr(vector, k.start));
        }
        _mm512_loadu_si512(words.as_ptr().cast())
    }
}

/// Loads 16 words of a vector whose values along k are adjacent and of which `left` values exist; zeros beyond them.
///
/// # Safety
/// `at` points to `left` values, bf16 if `IS_BF16` and else f32, and the CPU has AVX-512F, BW and VL (and BF16 if
/// `PAIRS`).
#[inline(always)]
unsafe fn load_along_k<const IS_BF16: bool, const PAIRS: bool>(at: *const u8, left: usize) -> __m512i {
    // SAFETY: the masks limit the loads to the `left` values that exist; masked-off lanes are not accessed.
    unsafe {
        match (IS_BF16, PAIRS) {
            (false, false) => _mm512_maskz_loadu_epi32(lane_mask(left), at.cast()),
            (true, false) => {
                _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lane_mask(left), at.cast())))
            }
            (false, true) => {
                let low = _mm512_maskz_loadu_ps(lane_mask(left), at.cast());
                let high = _mm512_maskz_loadu_ps(lane_mask(left.saturating_sub(16)), at.cast::<f32>().wrapping_add(16));
                std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
            }
            (true, true) => {
                let mask = if left >= 32 { !0 } else { (1u32 << left) - 1 };
                _mm512_maskz_loadu_epi16(mask, at.cast())
            }
        }
    }
}

/// Loads one value of each of 16 adjacent vectors: as f32, or as bf16 in the lower half of each word if `PAIRS`.
///
/// # Safety
/// `at` points to as many values as `mask` has bits, bf16 if `IS_BF16` and else f32, and the CPU has AVX-512F, BW and
/// VL (and BF16 if `PAIRS`).
#[inline(always)]
unsafe fn load_across_k<const IS_BF16: bool, const PAIRS: bool>(at: *const u8, mask: __mmask16) -> __m512i {
    // SAFETY: the mask limits the loads to the values that exist; masked-off lanes are not accessed.
    unsafe {
        match (IS_BF16, PAIRS) {
            (false, false) => _mm512_maskz_loadu_epi32(mask, at.cast()),
            (true, false) => _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at.cast()))),
            (false, true) => {
                let halves = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, at.cast()));
                _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(halves))
            }
            (true, true) => _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at.cast())),
        }
    }
}

/// Loads one value: the bits of an f32, or a bf16 in the lower half if `PAIRS`.
///
/// # Safety
/// `at` points to a value, bf16 if `IS_BF16` and else f32.
#[inline(always)]
unsafe fn load_one<const IS_BF16: bool, const PAIRS: bool>(at: *const u8) -> u32 {
    // SAFETY: `at` points to a value of this type by the caller's guarantee; the reads need no alignment.
    unsafe {
        match (IS_BF16, PAIRS) {
            (false, false) => at.cast::<u32>().read_unaligned(),
            (true, false) => u32::from(at.cast::<u16>().read_unaligned()) << 16,
            (false, true) => half::bf16::from_f32(at.cast::<f32>().read_unaligned()).to_bits().into(),
            (true, true) => at.cast::<u16>().read_unaligned().into(),
        }
    }
}
