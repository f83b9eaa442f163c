//! Operands in the order in which a tile reads them.

use super::{
    Arithmetic, ROWS, Side, WIDTH, Work,
    micro::{Left, Right, STAGE, pack_mask},
    narrow, parts, tiles,
};
use crate::kernel::Compute;
use std::{arch::x86_64::*, ops::Range};

/// A line of memory is asked for so many steps before it is read.
pub(super) const AHEAD: usize = 4;

/// Writes panels of the vector side, `inner` values deep and `room` words apart: for every word of depth the words of all its
/// vectors, zeros for those that are not there. Pairs are followed by zeros to a multiple of 16 words of depth.
///
/// # Safety
/// `to` has room for as many words, a multiple of 16 deep; the machine has the instructions.
pub(super) unsafe fn panels(work: &Work, panels: Range<usize>, inner: [usize; 2], (to, room): (*mut u32, usize)) {
    let side = &work.vectors;
    // SAFETY: by the caller.
    unsafe {
        match (side.half, work.arithmetic) {
            (_, Arithmetic::Narrow(compute)) => narrow::pack::panels(work, compute, panels, inner, (to.cast(), room)),
            (false, Arithmetic::F32) => panels_f32::<false>(side, panels, inner, (to, room)),
            (true, Arithmetic::F32) => panels_f32::<true>(side, panels, inner, (to, room)),
            (false, _) if side.parts > 1 => parts::panels(side, panels, inner, (to, room)),
            (false, _) => panels_bf16::<false>(side, panels, inner, (to, room)),
            (true, _) => panels_bf16::<true>(side, panels, inner, (to, room)),
        }
    }
}

/// Whether a panel can be read in its place: whole, of f32 and side by side.
pub(super) fn lies(work: &Work, panel: usize) -> bool {
    let side = &work.vectors;
    let plain = matches!(work.arithmetic, Arithmetic::F32 | Arithmetic::Narrow(Compute::F32));
    !side.half && plain && side.strides[0] == 1 && (panel + 1) * work.arithmetic.width() <= side.count
}

/// A panel in its place, if it [`lies`] there.
pub(super) fn where_it_lies(work: &Work, panel: usize, inner: [usize; 2]) -> Right {
    let side = &work.vectors;
    Right { words: side.at(panel * work.arithmetic.width(), inner[0]).cast(), stride: side.strides[1] }
}

/// The rows of the broadcast side as words, `inner` values deep: where they lie if they can be read there, else in `stage`. For
/// tiles the words of a row lie side by side and are followed by zeros to a multiple of 16. `next` is the first of the rows that
/// are staged after these.
///
/// # Safety
/// As for [`panels`]; `stage` has room for [`Arithmetic::staged`] times that many words.
pub(super) unsafe fn stage(
    work: &Work,
    (rows, next): (Range<usize>, usize),
    inner: [usize; 2],
    stage: *mut u32,
) -> Left {
    let side = &work.broadcast;
    // SAFETY: by the caller.
    unsafe {
        let words = side.at(rows.start, inner[0]).cast();
        match (side.half, work.arithmetic) {
            (_, Arithmetic::Narrow(compute)) => narrow::pack::stage(work, compute, rows, inner, stage.cast()),
            (false, Arithmetic::F32) if side.strides[0] == 1 && rows.len() == ROWS => {
                stage_across(side, rows, inner, stage)
            }
            (false, Arithmetic::F32) => {
                Left { ahead: side.at(next, inner[0]).cast(), ..Left::new(words, side.strides) }
            }
            (true, Arithmetic::F32) => stage_f32(side, rows, inner, stage),
            (false, Arithmetic::Tiles) if side.parts > 1 => parts::stage(side, rows, inner, stage),
            (true, _) if lie_in_pairs(work, rows.len(), inner) => Left::new(words, [side.strides[0] / 2, 1]),
            (false, Arithmetic::Pairs) => stage_bf16::<false>(side, rows, inner, stage),
            (true, Arithmetic::Pairs) => stage_bf16::<true>(side, rows, inner, stage),
            (false, Arithmetic::Tiles) => stage_tiles::<false>(side, rows, inner, stage),
            (true, Arithmetic::Tiles) => stage_tiles::<true>(side, rows, inner, stage),
        }
    }
}

/// Whether rows of bf16 are words as they lie; for tiles they must also fill them.
fn lie_in_pairs(work: &Work, rows: usize, [from, end]: [usize; 2]) -> bool {
    let side = &work.broadcast;
    let fill = rows == tiles::ROWS && (end - from).is_multiple_of(2 * tiles::WORDS);
    side.strides[1] == 1
        && side.strides[0].is_multiple_of(2)
        && end.is_multiple_of(2)
        && (work.arithmetic != Arithmetic::Tiles || fill)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn panels_f32<const HALF: bool>(side: &Side, panels: Range<usize>, inner: [usize; 2], to: (*mut u32, usize)) {
    // SAFETY: by the caller of [`panels`].
    unsafe { lay_panels::<HALF, false>(side, panels, inner, to) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn panels_bf16<const HALF: bool>(side: &Side, panels: Range<usize>, inner: [usize; 2], to: (*mut u32, usize)) {
    // SAFETY: by the caller of [`panels`].
    unsafe { lay_panels::<HALF, true>(side, panels, inner, to) }
}

/// Memory is read in its order: vectors one after the other, or a word of depth of all panels before the next.
#[inline(always)]
unsafe fn lay_panels<const HALF: bool, const PAIRS: bool>(
    side: &Side,
    panels: Range<usize>,
    [from, end]: [usize; 2],
    (to, room): (*mut u32, usize),
) {
    let [pair, deep] = if PAIRS { [2, 16] } else { [1, 1] };
    let count = panels.len();
    // SAFETY: by the caller of [`panels`].
    unsafe {
        if side.strides[0] != 1 {
            for panel in 0..count {
                let start = (panels.start + panel) * WIDTH;
                let vectors = start..side.count.min(start + WIDTH);
                lay::<HALF, PAIRS, WIDTH>(side, vectors, [from, end], to.add(panel * room));
            }
            return;
        }
        for word in 0..(end - from).div_ceil(pair).next_multiple_of(deep) {
            for lane in (0..count * WIDTH).step_by(16) {
                let first = (panels.start * WIDTH + lane).min(side.count);
                let place = [first, (side.count - first).min(16)];
                _mm_prefetch::<_MM_HINT_T0>(side.at(first, from + (word + AHEAD) * pair).cast());
                let words = word_of::<HALF, PAIRS>(side, place, [from + word * pair, end]);
                _mm512_storeu_si512(to.add(lane / WIDTH * room + word * WIDTH + lane % WIDTH).cast(), words);
            }
        }
    }
}

/// [`ROWS`] rows of f32 that lie side by side, as they do, step after step: there they are some lines for each.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn stage_across(side: &Side, rows: Range<usize>, [from, end]: [usize; 2], to: *mut u32) -> Left {
    // SAFETY: by the caller of [`stage`]; masks keep to the rows.
    unsafe {
        for inner in from..end {
            _mm_prefetch::<_MM_HINT_T0>(side.at(rows.start, inner + 2 * AHEAD).cast());
            let words = _mm512_maskz_loadu_epi32(pack_mask(ROWS), side.at(rows.start, inner).cast());
            _mm512_mask_storeu_epi32(to.add((inner - from) * ROWS).cast(), pack_mask(ROWS), words);
        }
    }
    Left::new(to, [1, ROWS])
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn stage_f32(side: &Side, rows: Range<usize>, inner: [usize; 2], to: *mut u32) -> Left {
    // SAFETY: by the caller of [`stage`].
    unsafe { place::<true, false>(side, rows, inner, to) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn stage_bf16<const HALF: bool>(side: &Side, rows: Range<usize>, inner: [usize; 2], to: *mut u32) -> Left {
    // SAFETY: by the caller of [`stage`].
    unsafe { place::<HALF, true>(side, rows, inner, to) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn stage_tiles<const HALF: bool>(side: &Side, rows: Range<usize>, inner: [usize; 2], to: *mut u32) -> Left {
    // SAFETY: by the caller of [`stage`].
    unsafe {
        if side.strides[1] == 1 {
            return place::<HALF, true>(side, rows, inner, to);
        }
        let [from, end] = inner;
        let words = (end - from).div_ceil(2);
        let depth = words.next_multiple_of(16);
        for (row, first) in rows.clone().step_by(16).enumerate() {
            let count = (rows.end - first).min(16);
            for word in (0..words).step_by(16) {
                let mut columns = [_mm512_setzero_si512(); 16];
                for (index, column) in columns.iter_mut().enumerate() {
                    *column = word_of::<HALF, true>(side, [first, count], [from + 2 * (word + index), end]);
                }
                for (index, words) in transpose(columns).into_iter().take(count).enumerate() {
                    _mm512_storeu_si512(to.add((16 * row + index) * depth + word).cast(), words);
                }
            }
        }
        Left::new(to, [depth, 1])
    }
}

/// Writes rows of a side as words: one after the other if their values lie side by side, else as [`lay`] does.
#[inline(always)]
unsafe fn place<const HALF: bool, const PAIRS: bool>(
    side: &Side,
    rows: Range<usize>,
    [from, end]: [usize; 2],
    to: *mut u32,
) -> Left {
    // SAFETY: by the caller of [`stage`].
    unsafe {
        if side.strides[1] != 1 {
            lay::<HALF, PAIRS, STAGE>(side, rows, [from, end], to);
            return Left::new(to, [1, STAGE]);
        }
        let pair = if PAIRS { 2 } else { 1 };
        let words = (end - from).div_ceil(pair);
        let depth = words.next_multiple_of(16);
        let tile = ROWS * side.strides[0] * if HALF { 2 } else { 4 };
        for (index, row) in rows.enumerate() {
            for word in (0..words).step_by(16) {
                let inner = from + word * pair;
                // The tile after this one comes into the cache while this one is multiplied.
                let ahead = side.at(row, inner).wrapping_add(tile);
                _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
                if PAIRS && !HALF {
                    _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(64).cast());
                }
                let part = along::<HALF, PAIRS>(side.at(row, inner), end - inner);
                _mm512_storeu_si512(to.add(index * depth + word).cast(), part);
            }
        }
        Left::new(to, [depth, 1])
    }
}

/// Writes `vectors` of a side as words (of bf16 if `PAIRS`), `LANES` words for every word of depth.
#[inline(always)]
unsafe fn lay<const HALF: bool, const PAIRS: bool, const LANES: usize>(
    side: &Side,
    vectors: Range<usize>,
    [from, end]: [usize; 2],
    to: *mut u32,
) {
    let pair = if PAIRS { 2 } else { 1 };
    let words = (end - from).div_ceil(pair);
    let depth = if PAIRS { words.next_multiple_of(16) } else { words };
    // SAFETY: by the callers; masks keep to the values that exist.
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
                        let values = side.at(first + index, inner);
                        _mm_prefetch::<_MM_HINT_T0>(values.wrapping_add(64 * AHEAD).cast());
                        *row = along::<HALF, PAIRS>(values, end - inner);
                    }
                    for (index, column) in transpose(rows).into_iter().enumerate() {
                        _mm512_storeu_si512(to.add((word + index) * LANES).cast(), column);
                    }
                }
            } else {
                for word in 0..depth {
                    let column = word_of::<HALF, PAIRS>(side, [first, count], [from + word * pair, end]);
                    _mm512_storeu_si512(to.add(word * LANES).cast(), column);
                }
            }
        }
    }
}

/// A word of depth of 16 vectors from `first` on, of which `count` exist; zeros beyond the end.
#[inline(always)]
unsafe fn word_of<const HALF: bool, const PAIRS: bool>(
    side: &Side,
    [first, count]: [usize; 2],
    [inner, end]: [usize; 2],
) -> __m512i {
    // SAFETY: masks keep to the values that exist.
    unsafe {
        let low = values_of::<HALF, PAIRS>(side, [first, count], [inner, end]);
        if !PAIRS {
            return low;
        }
        let high = values_of::<HALF, PAIRS>(side, [first, count], [inner + 1, end]);
        _mm512_or_si512(low, _mm512_slli_epi32::<16>(high))
    }
}

/// One value of each of 16 vectors, as [`word_of`].
#[inline(always)]
unsafe fn values_of<const HALF: bool, const PAIRS: bool>(
    side: &Side,
    [first, count]: [usize; 2],
    [inner, end]: [usize; 2],
) -> __m512i {
    // SAFETY: masks keep to the values that exist.
    unsafe {
        if inner >= end {
            return _mm512_setzero_si512();
        }
        if side.strides[0] == 1 {
            return across::<HALF, PAIRS>(side.at(first, inner), pack_mask(count));
        }
        let mut words = [0; 16];
        for (index, word) in words.iter_mut().enumerate().take(count) {
            *word = one::<HALF, PAIRS>(side.at(first + index, inner));
        }
        _mm512_loadu_si512(words.as_ptr().cast())
    }
}

/// 16 words of a vector whose values lie side by side, of which `left` values exist.
#[inline(always)]
unsafe fn along<const HALF: bool, const PAIRS: bool>(at: *const u8, left: usize) -> __m512i {
    // SAFETY: masks keep to the values that exist.
    unsafe {
        match (HALF, PAIRS) {
            (false, false) => _mm512_maskz_loadu_epi32(pack_mask(left), at.cast()),
            (true, false) => {
                _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(pack_mask(left), at.cast())))
            }
            (false, true) => {
                let low = _mm512_maskz_loadu_ps(pack_mask(left), at.cast());
                let high = _mm512_maskz_loadu_ps(pack_mask(left.saturating_sub(16)), at.cast::<f32>().wrapping_add(16));
                std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
            }
            (true, true) => {
                let mask = if left >= 32 { !0 } else { (1u32 << left) - 1 };
                _mm512_maskz_loadu_epi16(mask, at.cast())
            }
        }
    }
}

/// One value of each of 16 vectors that lie side by side: f32, or bf16 in the lower halves.
#[inline(always)]
unsafe fn across<const HALF: bool, const PAIRS: bool>(at: *const u8, mask: __mmask16) -> __m512i {
    // SAFETY: masks keep to the values that exist.
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

/// One value: an f32, or a bf16 in the lower half.
#[inline(always)]
unsafe fn one<const HALF: bool, const PAIRS: bool>(at: *const u8) -> u32 {
    // SAFETY: the value exists, by the caller.
    unsafe {
        match (HALF, PAIRS) {
            (false, false) => at.cast::<u32>().read_unaligned(),
            (true, false) => u32::from(at.cast::<u16>().read_unaligned()) << 16,
            (false, true) => half::bf16::from_f32(at.cast::<f32>().read_unaligned()).to_bits().into(),
            (true, true) => at.cast::<u16>().read_unaligned().into(),
        }
    }
}

/// 16 rows of 16 words → 16 columns.
#[inline(always)]
pub(super) unsafe fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    // SAFETY: the callers run where the instructions are.
    unsafe {
        let mut pairs = rows;
        for i in (0..16).step_by(2) {
            pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        // In lane l of register 4·g + c: column 4·l + c of the rows 4·g to 4·g + 3.
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
