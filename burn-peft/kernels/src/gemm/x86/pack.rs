//! Packing of the operands into micro-panels, in the order in which the micro-kernels read them.

use super::{
    GemmProblem, MR, MicroKernel, NR, Operand, amx, avx2, bf16x3,
    micro_kernel::{MicroPanelA, MicroPanelB, PACK_MR, lane_mask},
};
use crate::MatmulPrecision;
use std::{arch::x86_64::*, ops::Range};

/// Steps along k between a prefetch and the read of that memory.
pub(super) const PREFETCH_DISTANCE: usize = 4;

/// Packs micro-panels of B over the range `inner` of k, `room` words apart: at each step along k the words of all NR
/// columns, zeros for columns beyond the last. Pairs are padded with zeros to a multiple of 16 words along k.
///
/// # Safety
/// `to` has room for all micro-panels of `room` words, a multiple of 16 steps deep, and is aligned to 64 bytes;
/// `panels` and `inner` lie within B; the CPU has the instructions of the micro-kernel.
pub(super) unsafe fn pack_b(
    problem: &GemmProblem,
    panels: Range<usize>,
    inner: [usize; 2],
    (to, room): (*mut u32, usize),
) {
    let side = &problem.b;
    // SAFETY: the caller guarantees the room, the ranges and the CPU features, which are the conditions of every
    // packing function; each arm passes the element type of B.
    unsafe {
        match (side.is_bf16, problem.micro_kernel) {
            (_, MicroKernel::Avx2(compute)) => avx2::pack::pack_b(problem, compute, panels, inner, (to.cast(), room)),
            (false, MicroKernel::Avx512) => pack_b_f32::<false>(side, panels, inner, (to, room)),
            (true, MicroKernel::Avx512) => pack_b_f32::<true>(side, panels, inner, (to, room)),
            (false, _) if side.terms > 1 => bf16x3::pack_b(side, panels, inner, (to, room)),
            (false, _) => pack_b_bf16::<false>(side, panels, inner, (to, room)),
            (true, _) => pack_b_bf16::<true>(side, panels, inner, (to, room)),
        }
    }
}

/// Returns true if a micro-panel of B can be read in place: it is complete, f32, and its columns are adjacent.
pub(super) fn can_use_b_in_place(problem: &GemmProblem, panel: usize) -> bool {
    let side = &problem.b;
    let plain = matches!(problem.micro_kernel, MicroKernel::Avx512 | MicroKernel::Avx2(MatmulPrecision::F32));
    !side.is_bf16 && plain && side.strides[0] == 1 && (panel + 1) * problem.micro_kernel.nr() <= side.count
}

/// Returns a micro-panel of B in place, if [`can_use_b_in_place`] returns true for it.
pub(super) fn b_in_place(problem: &GemmProblem, panel: usize, inner: [usize; 2]) -> MicroPanelB {
    let side = &problem.b;
    MicroPanelB { words: side.ptr(panel * problem.micro_kernel.nr(), inner[0]).cast(), stride: side.strides[1] }
}

/// Returns the micro-panel of A for a range of rows and the range `inner` of k: in place if the kernel can read it
/// there, else packed into `buffer`. For AMX the words of a row are adjacent and padded with zeros to a multiple of 16.
/// `next` is the first of the rows that are read after these.
///
/// # Safety
/// `buffer` has room for [`MicroKernel::pack_mr`] rows of the words of the range, padded to a multiple of 16, in each
/// bf16 term, and is aligned to 64 bytes; `rows` and `inner` lie within A; the CPU has the instructions of the
/// micro-kernel.
pub(super) unsafe fn pack_a(
    problem: &GemmProblem,
    (rows, next): (Range<usize>, usize),
    inner: [usize; 2],
    buffer: *mut u32,
) -> MicroPanelA {
    let side = &problem.a;
    // SAFETY: the caller guarantees the buffer, the ranges and the CPU features, which are the conditions of every
    // packing function; each arm passes the element type of A.
    unsafe {
        let words = side.ptr(rows.start, inner[0]).cast();
        match (side.is_bf16, problem.micro_kernel) {
            (_, MicroKernel::Avx2(compute)) => avx2::pack::pack_a(problem, compute, rows, inner, buffer.cast()),
            (false, MicroKernel::Avx512) if side.strides[0] == 1 && rows.len() == MR => {
                pack_a_column_major(side, rows, inner, buffer)
            }
            (false, MicroKernel::Avx512) => {
                MicroPanelA { next_rows: side.ptr(next, inner[0]).cast(), ..MicroPanelA::new(words, side.strides) }
            }
            (true, MicroKernel::Avx512) => pack_a_f32(side, rows, inner, buffer),
            (false, MicroKernel::Amx) if side.terms > 1 => bf16x3::pack_a(side, rows, inner, buffer),
            (true, _) if can_use_a_in_place(problem, rows.len(), inner) => {
                MicroPanelA::new(words, [side.strides[0] / 2, 1])
            }
            (false, MicroKernel::Avx512Bf16) => pack_a_bf16::<false>(side, rows, inner, buffer),
            (true, MicroKernel::Avx512Bf16) => pack_a_bf16::<true>(side, rows, inner, buffer),
            (false, MicroKernel::Amx) => pack_a_amx::<false>(side, rows, inner, buffer),
            (true, MicroKernel::Amx) => pack_a_amx::<true>(side, rows, inner, buffer),
        }
    }
}

/// Returns true if rows of bf16 can be read in place as words; for AMX they must also fill complete tiles.
fn can_use_a_in_place(problem: &GemmProblem, rows: usize, [from, end]: [usize; 2]) -> bool {
    let side = &problem.a;
    let fill = rows == amx::MR && (end - from).is_multiple_of(2 * amx::TILE_K);
    side.strides[1] == 1
        && side.strides[0].is_multiple_of(2)
        && end.is_multiple_of(2)
        && (problem.micro_kernel != MicroKernel::Amx || fill)
}

/// Packs micro-panels of B as f32 words.
///
/// # Safety
/// The conditions of [`pack_b`] hold, `HALF` is true exactly if B is bf16, and the CPU has AVX-512F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_b_f32<const HALF: bool>(side: &Operand, panels: Range<usize>, inner: [usize; 2], to: (*mut u32, usize)) {
    // SAFETY: the conditions are the same, and the target features of this function are those that the inlined body
    // needs.
    unsafe { pack_b_panels::<HALF, false>(side, panels, inner, to) }
}

/// Packs micro-panels of B as pairs of bf16.
///
/// # Safety
/// The conditions of [`pack_b`] hold, `HALF` is true exactly if B is bf16, and the CPU has AVX-512F, BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pack_b_bf16<const HALF: bool>(
    side: &Operand,
    panels: Range<usize>,
    inner: [usize; 2],
    to: (*mut u32, usize),
) {
    // SAFETY: the conditions are the same, and the target features of this function are those that the inlined body
    // needs.
    unsafe { pack_b_panels::<HALF, true>(side, panels, inner, to) }
}

/// Packs micro-panels of B, reading memory in its order: one column after the other if B is column-major, else one step
/// along k of all panels after the other.
///
/// # Safety
/// The conditions of [`pack_b`] hold, `HALF` is true exactly if B is bf16, and the CPU has AVX-512F, BW and VL (and
/// BF16 if `PAIRS`).
#[inline(always)]
unsafe fn pack_b_panels<const HALF: bool, const PAIRS: bool>(
    side: &Operand,
    panels: Range<usize>,
    [from, end]: [usize; 2],
    (to, room): (*mut u32, usize),
) {
    let [pair, deep] = if PAIRS { [2, 16] } else { [1, 1] };
    let count = panels.len();
    // SAFETY: `first` and the counts are clamped to the columns of B, and `to` has `room` words for each panel by the
    // caller's guarantee, of which a panel writes [`NR`] words at each step; prefetches may take any address.
    unsafe {
        if side.strides[0] != 1 {
            for panel in 0..count {
                let start = (panels.start + panel) * NR;
                let vectors = start..side.count.min(start + NR);
                pack_k_major::<HALF, PAIRS, NR>(side, vectors, [from, end], to.add(panel * room));
            }
            return;
        }
        for word in 0..(end - from).div_ceil(pair).next_multiple_of(deep) {
            for lane in (0..count * NR).step_by(16) {
                let first = (panels.start * NR + lane).min(side.count);
                let place = [first, (side.count - first).min(16)];
                _mm_prefetch::<_MM_HINT_T0>(side.ptr(first, from + (word + PREFETCH_DISTANCE) * pair).cast());
                let words = gather_words::<HALF, PAIRS>(side, place, [from + word * pair, end]);
                _mm512_storeu_si512(to.add(lane / NR * room + word * NR + lane % NR).cast(), words);
            }
        }
    }
}

/// Packs [`MR`] rows of a column-major f32 A so that consecutive steps along k are adjacent; in place, every step lies
/// in cache lines of its own.
///
/// # Safety
/// The conditions of [`pack_a`] hold, A is column-major f32, `rows` has [`MR`] rows, and the CPU has AVX-512F and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_a_column_major(
    side: &Operand,
    rows: Range<usize>,
    [from, end]: [usize; 2],
    to: *mut u32,
) -> MicroPanelA {
    // SAFETY: the mask limits each access to the [`MR`] rows, which exist by the caller's guarantee, and `to` has room
    // for them at each step.
    unsafe {
        for inner in from..end {
            _mm_prefetch::<_MM_HINT_T0>(side.ptr(rows.start, inner + 2 * PREFETCH_DISTANCE).cast());
            let words = _mm512_maskz_loadu_epi32(lane_mask(MR), side.ptr(rows.start, inner).cast());
            _mm512_mask_storeu_epi32(to.add((inner - from) * MR).cast(), lane_mask(MR), words);
        }
    }
    MicroPanelA::new(to, [1, MR])
}

/// Packs rows of bf16 as f32 words.
///
/// # Safety
/// The conditions of [`pack_a`] hold, A is bf16, and the CPU has AVX-512F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_a_f32(side: &Operand, rows: Range<usize>, inner: [usize; 2], to: *mut u32) -> MicroPanelA {
    // SAFETY: the conditions are the same, and the target features of this function are those that the inlined body
    // needs.
    unsafe { pack_a_rows::<true, false>(side, rows, inner, to) }
}

/// Packs rows as pairs of bf16.
///
/// # Safety
/// The conditions of [`pack_a`] hold, `HALF` is true exactly if A is bf16, and the CPU has AVX-512F, BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pack_a_bf16<const HALF: bool>(
    side: &Operand,
    rows: Range<usize>,
    inner: [usize; 2],
    to: *mut u32,
) -> MicroPanelA {
    // SAFETY: the conditions are the same, and the target features of this function are those that the inlined body
    // needs.
    unsafe { pack_a_rows::<HALF, true>(side, rows, inner, to) }
}

/// Packs rows as pairs of bf16 for AMX: the words of a row are adjacent.
///
/// # Safety
/// The conditions of [`pack_a`] hold, `HALF` is true exactly if A is bf16, and the CPU has AVX-512F, BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pack_a_amx<const HALF: bool>(
    side: &Operand,
    rows: Range<usize>,
    inner: [usize; 2],
    to: *mut u32,
) -> MicroPanelA {
    // SAFETY: `first` and `count` lie within `rows`, `gather_words` returns zeros beyond `end`, and `to` has room for
    // up to [`amx::MR`] rows of `depth` words by the caller's guarantee.
    unsafe {
        if side.strides[1] == 1 {
            return pack_a_rows::<HALF, true>(side, rows, inner, to);
        }
        let [from, end] = inner;
        let words = (end - from).div_ceil(2);
        let depth = words.next_multiple_of(16);
        for (row, first) in rows.clone().step_by(16).enumerate() {
            let count = (rows.end - first).min(16);
            for word in (0..words).step_by(16) {
                let mut columns = [_mm512_setzero_si512(); 16];
                for (index, column) in columns.iter_mut().enumerate() {
                    *column = gather_words::<HALF, true>(side, [first, count], [from + 2 * (word + index), end]);
                }
                for (index, words) in transpose(columns).into_iter().take(count).enumerate() {
                    _mm512_storeu_si512(to.add((16 * row + index) * depth + word).cast(), words);
                }
            }
        }
        MicroPanelA::new(to, [depth, 1])
    }
}

/// Packs rows as words: row-major if the values of a row are adjacent, else k-major as [`pack_k_major`] does.
///
/// # Safety
/// The conditions of [`pack_a`] hold, `HALF` is true exactly if A is bf16, and the CPU has AVX-512F, BW and VL (and
/// BF16 if `PAIRS`).
#[inline(always)]
unsafe fn pack_a_rows<const HALF: bool, const PAIRS: bool>(
    side: &Operand,
    rows: Range<usize>,
    [from, end]: [usize; 2],
    to: *mut u32,
) -> MicroPanelA {
    // SAFETY: `end - inner` is the number of values that exist from `inner` on, to which the loads are masked, and `to`
    // has room for all rows of `depth` words by the caller's guarantee; prefetches may take any address.
    unsafe {
        if side.strides[1] != 1 {
            pack_k_major::<HALF, PAIRS, PACK_MR>(side, rows, [from, end], to);
            return MicroPanelA::new(to, [1, PACK_MR]);
        }
        let pair = if PAIRS { 2 } else { 1 };
        let words = (end - from).div_ceil(pair);
        let depth = words.next_multiple_of(16);
        let tile = MR * side.strides[0] * if HALF { 2 } else { 4 };
        for (index, row) in rows.enumerate() {
            for word in (0..words).step_by(16) {
                let inner = from + word * pair;
                // Prefetch the rows of the next micro-panel while this one is multiplied.
                let ahead = side.ptr(row, inner).wrapping_add(tile);
                _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
                if PAIRS && !HALF {
                    _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(64).cast());
                }
                let part = load_along_k::<HALF, PAIRS>(side.ptr(row, inner), end - inner);
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
/// `vectors` and the range of k lie within `side`, `HALF` is true exactly if its values are bf16, `to` has room for
/// `LANES` words at each step (padded to a multiple of 16 steps if `PAIRS`, or if the values along k are adjacent), and
/// the CPU has AVX-512F, BW and VL (and BF16 if `PAIRS`).
#[inline(always)]
unsafe fn pack_k_major<const HALF: bool, const PAIRS: bool, const LANES: usize>(
    side: &Operand,
    vectors: Range<usize>,
    [from, end]: [usize; 2],
    to: *mut u32,
) {
    let pair = if PAIRS { 2 } else { 1 };
    let words = (end - from).div_ceil(pair);
    let depth = if PAIRS { words.next_multiple_of(16) } else { words };
    // SAFETY: `first` and `count` are clamped to `vectors`, loads along k are masked to the values before `end`, and
    // `to` has room for every step by the caller's guarantee.
    unsafe {
        for lane in (0..LANES).step_by(16) {
            let first = (vectors.start + lane).min(vectors.end);
            let count = (vectors.end - first).min(16);
            let to = to.add(lane);
            if count == 0 {
                for word in 0..depth {
                    _mm512_storeu_si512(to.add(word * LANES).cast(), _mm512_setzero_si512());
                }
            } else if side.strides[1] == 1 {
                for word in (0..words).step_by(16) {
                    let inner = from + word * pair;
                    let mut rows = [_mm512_setzero_si512(); 16];
                    for (index, row) in rows.iter_mut().enumerate().take(count) {
                        let values = side.ptr(first + index, inner);
                        _mm_prefetch::<_MM_HINT_T0>(values.wrapping_add(64 * PREFETCH_DISTANCE).cast());
                        *row = load_along_k::<HALF, PAIRS>(values, end - inner);
                    }
                    for (index, column) in transpose(rows).into_iter().enumerate() {
                        _mm512_storeu_si512(to.add((word + index) * LANES).cast(), column);
                    }
                }
            } else {
                for word in 0..depth {
                    let column = gather_words::<HALF, PAIRS>(side, [first, count], [from + word * pair, end]);
                    _mm512_storeu_si512(to.add(word * LANES).cast(), column);
                }
            }
        }
    }
}

/// Returns one word along k of each of 16 vectors from `first` on, of which `count` exist; zeros for the others and
/// beyond `end`.
///
/// # Safety
/// The `count` vectors and the values before `end` lie within `side`, `HALF` is true exactly if they are bf16, and the
/// CPU has AVX-512F, BW and VL (and BF16 if `PAIRS`).
#[inline(always)]
unsafe fn gather_words<const HALF: bool, const PAIRS: bool>(
    side: &Operand,
    [first, count]: [usize; 2],
    [inner, end]: [usize; 2],
) -> __m512i {
    // SAFETY: the conditions of `gather_values` are the same; it checks each of the two values along k against `end`.
    unsafe {
        let low = gather_values::<HALF, PAIRS>(side, [first, count], [inner, end]);
        if !PAIRS {
            return low;
        }
        let high = gather_values::<HALF, PAIRS>(side, [first, count], [inner + 1, end]);
        _mm512_or_si512(low, _mm512_slli_epi32::<16>(high))
    }
}

/// Returns one value along k of each of 16 vectors from `first` on, of which `count` exist; zeros for the others and
/// beyond `end`.
///
/// # Safety
/// The conditions of [`gather_words`] hold.
#[inline(always)]
unsafe fn gather_values<const HALF: bool, const PAIRS: bool>(
    side: &Operand,
    [first, count]: [usize; 2],
    [inner, end]: [usize; 2],
) -> __m512i {
    // SAFETY: `inner` is below `end` when memory is read, and the mask or the loop limits the reads to the `count`
    // vectors that exist.
    unsafe {
        if inner >= end {
            return _mm512_setzero_si512();
        }
        if side.strides[0] == 1 {
            return load_across_k::<HALF, PAIRS>(side.ptr(first, inner), lane_mask(count));
        }
        let mut words = [0; 16];
        for (index, word) in words.iter_mut().enumerate().take(count) {
            *word = load_one::<HALF, PAIRS>(side.ptr(first + index, inner));
        }
        _mm512_loadu_si512(words.as_ptr().cast())
    }
}

/// Loads 16 words of a vector whose values along k are adjacent and of which `left` values exist; zeros beyond them.
///
/// # Safety
/// `at` points to `left` values, bf16 if `HALF` and else f32, and the CPU has AVX-512F, BW and VL (and BF16 if
/// `PAIRS`).
#[inline(always)]
unsafe fn load_along_k<const HALF: bool, const PAIRS: bool>(at: *const u8, left: usize) -> __m512i {
    // SAFETY: the masks limit the loads to the `left` values that exist; masked-off lanes are not accessed.
    unsafe {
        match (HALF, PAIRS) {
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
/// `at` points to as many values as `mask` has bits, bf16 if `HALF` and else f32, and the CPU has AVX-512F, BW and VL
/// (and BF16 if `PAIRS`).
#[inline(always)]
unsafe fn load_across_k<const HALF: bool, const PAIRS: bool>(at: *const u8, mask: __mmask16) -> __m512i {
    // SAFETY: the mask limits the loads to the values that exist; masked-off lanes are not accessed.
    unsafe {
        match (HALF, PAIRS) {
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
/// `at` points to a value, bf16 if `HALF` and else f32.
#[inline(always)]
unsafe fn load_one<const HALF: bool, const PAIRS: bool>(at: *const u8) -> u32 {
    // SAFETY: `at` points to a value of this type by the caller's guarantee; the reads need no alignment.
    unsafe {
        match (HALF, PAIRS) {
            (false, false) => at.cast::<u32>().read_unaligned(),
            (true, false) => u32::from(at.cast::<u16>().read_unaligned()) << 16,
            (false, true) => half::bf16::from_f32(at.cast::<f32>().read_unaligned()).to_bits().into(),
            (true, true) => at.cast::<u16>().read_unaligned().into(),
        }
    }
}

/// Transposes 16 rows of 16 words.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline(always)]
pub(super) unsafe fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    // SAFETY: the intrinsics only work on registers, and the CPU has AVX-512F by the caller's guarantee.
    unsafe {
        let mut pairs = rows;
        for i in (0..16).step_by(2) {
            pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        // Lane l of register 4·g + c holds column 4·l + c of the rows 4·g to 4·g + 3.
        let mut fours = rows;
        for i in (0..16).step_by(4) {
            fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
            fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
            fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
            fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
        }
        let mut columns = rows;
        for c in 0..4 {
            let [a, b, c2, d] = [fours[c], fours[4 + c], fours[8 + c], fours[12 + c]];
            let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
            let (even2, odd2) = (_mm512_shuffle_i32x4::<0x88>(c2, d), _mm512_shuffle_i32x4::<0xdd>(c2, d));
            columns[c] = _mm512_shuffle_i32x4::<0x88>(even, even2);
            columns[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd, odd2);
            columns[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even, even2);
            columns[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd, odd2);
        }
        columns
    }
}
