//! Operands of tiles that are as exact as f32: each value is the sum of three bf16, which lie in three words of depth that follow
//! each other in blocks of [`tiles::WORDS`].
//!
//! The first holds the upper half of the value's bits, the second the rest rounded to nearest, the third what is left, which fits
//! it. A value that is not finite leaves NaN in the second.

use super::{
    Side, WIDTH,
    micro::{Left, pack_mask},
    pack::{AHEAD, transpose},
    tiles::{ROWS, WORDS},
};
use std::{arch::x86_64::*, ops::Range};

/// bf16 that make an f32.
pub(super) const PARTS: usize = 3;
/// The upper half of an f32's bits, a bf16.
const UPPER: i32 = 0xffff_0000_u32 as i32;
/// Words of a tile, and of the two of a part.
const TILE: usize = 16 * WORDS;
const PART: usize = 2 * TILE;

/// The parts of 16 pairs, as words.
#[inline(always)]
unsafe fn split(low: __m512i, high: __m512i) -> [__m512i; PARTS] {
    // SAFETY: the callers run where the instructions are.
    unsafe {
        let [low_rest, high_rest] = [rest(low, low), rest(high, high)];
        let half = _mm512_set1_epi32(0x8000);
        let [low_near, high_near] = [_mm512_add_epi32(low_rest, half), _mm512_add_epi32(high_rest, half)];
        let [low_last, high_last] = [rest(low_rest, low_near), rest(high_rest, high_near)];
        [pair(low, high), pair(low_near, high_near), pair(low_last, high_last)]
    }
}

/// What the upper half of `part` leaves of an f32.
#[inline(always)]
unsafe fn rest(value: __m512i, part: __m512i) -> __m512i {
    // SAFETY: the callers run where the instructions are.
    unsafe {
        let upper = _mm512_and_si512(part, _mm512_set1_epi32(UPPER));
        _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(value), _mm512_castsi512_ps(upper)))
    }
}

/// The upper halves of two, those of the first below.
#[inline(always)]
unsafe fn pair(low: __m512i, high: __m512i) -> __m512i {
    // SAFETY: the callers run where the instructions are; of three bits a, b, c it is a | b & c.
    unsafe { _mm512_ternarylogic_epi32::<0xf8>(_mm512_srli_epi32::<16>(low), high, _mm512_set1_epi32(UPPER)) }
}

/// 16 inner values of 16 vectors from `first` on, of which `count` exist: in a register one value of each. Zeros beyond the end.
#[inline(always)]
unsafe fn columns(side: &Side, [first, count]: [usize; 2], [inner, end]: [usize; 2]) -> [__m512i; 16] {
    // SAFETY: masks keep to the values that exist.
    unsafe {
        let mut values = [_mm512_setzero_si512(); 16];
        let inners = end.saturating_sub(inner).min(16);
        if side.strides[1] == 1 {
            let mask = pack_mask(inners);
            for (index, row) in values.iter_mut().enumerate().take(count) {
                let at = side.at(first + index, inner);
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(64 * AHEAD).cast());
                *row = _mm512_maskz_loadu_epi32(mask, at.cast());
            }
            return transpose(values);
        }
        for (index, column) in values.iter_mut().enumerate().take(inners) {
            if side.strides[0] == 1 {
                _mm_prefetch::<_MM_HINT_T0>(side.at(first, inner + index + 2 * AHEAD).cast());
                *column = _mm512_maskz_loadu_epi32(pack_mask(count), side.at(first, inner + index).cast());
            } else {
                let mut words = [0; 16];
                for (vector, word) in words.iter_mut().enumerate().take(count) {
                    *word = side.at(first + vector, inner + index).cast::<u32>().read_unaligned();
                }
                *column = _mm512_loadu_si512(words.as_ptr().cast());
            }
        }
        values
    }
}

/// Writes panels of f32, `inner` values deep and `room` words apart: for every block of depth its parts, of each a tile for the
/// first 16 vectors and one for the rest.
///
/// # Safety
/// `to` has room for as many words, a multiple of [`WORDS`] deep; the machine has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn panels(side: &Side, panels: Range<usize>, [from, end]: [usize; 2], (to, room): (*mut u32, usize)) {
    let (count, blocks) = (panels.len(), (end - from).div_ceil(2 * WORDS));
    for step in 0..count * blocks {
        // Memory is read in its order: vectors one after the other, or a block of all panels before the next.
        let (index, block) =
            if side.strides[0] == 1 { (step % count, step / count) } else { (step / blocks, step % blocks) };
        let inner = from + block * 2 * WORDS;
        for group in 0..2 {
            let first = ((panels.start + index) * WIDTH + 16 * group).min(side.count);
            let vectors = [first, (side.count - first).min(16)];
            for half in 0..2 {
                // SAFETY: by the caller.
                unsafe {
                    let to = to.add(index * room + block * PARTS * PART + group * TILE + 8 * half * 16);
                    let values = columns(side, vectors, [inner + 16 * half, end]);
                    for pair in 0..8 {
                        put(split(values[2 * pair], values[2 * pair + 1]), to.add(pair * 16));
                    }
                }
            }
        }
    }
}

/// Writes rows of f32 as blocks of words, `inner` values deep: for every block of depth its parts, of each a tile for the first 16
/// rows and one for the rest.
///
/// # Safety
/// As for [`panels`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn stage(side: &Side, lines: Range<usize>, [from, end]: [usize; 2], to: *mut u32) -> Left {
    // SAFETY: by the caller.
    unsafe {
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
        for (block, inner) in (from..end).step_by(2 * WORDS).enumerate() {
            let masks = [pack_mask(end - inner), pack_mask((end - inner).saturating_sub(16))];
            for (group, first) in lines.clone().step_by(16).enumerate() {
                let count = (lines.end - first).min(16);
                let to = to.add(block * PARTS * PART + group * TILE);
                if side.strides[1] == 1 {
                    for row in 0..count {
                        let values = side.at(first + row, inner);
                        // The rows after these come into the cache while these are multiplied.
                        let ahead = values.wrapping_add(4 * ROWS * side.strides[0]);
                        _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
                        _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(64).cast());
                        let lower = _mm512_maskz_loadu_epi32(masks[0], values.cast());
                        let upper = _mm512_maskz_loadu_epi32(masks[1], values.wrapping_add(64).cast());
                        let low = _mm512_permutex2var_epi32(lower, even, upper);
                        let high = _mm512_permutex2var_epi32(lower, odd, upper);
                        put(split(low, high), to.add(row * 16));
                    }
                    continue;
                }
                let lower = transpose(columns(side, [first, count], [inner, end]));
                let upper = transpose(columns(side, [first, count], [inner + 16, end]));
                for row in 0..count {
                    let low = _mm512_permutex2var_epi32(lower[row], even, upper[row]);
                    let high = _mm512_permutex2var_epi32(lower[row], odd, upper[row]);
                    put(split(low, high), to.add(row * 16));
                }
            }
        }
    }
    Left { upper: TILE, ..Left::new(to, [16, 1]) }
}

/// Writes the words of a row of a tile in all parts.
#[inline(always)]
unsafe fn put(words: [__m512i; PARTS], to: *mut u32) {
    // SAFETY: by the callers.
    unsafe {
        for (part, words) in words.into_iter().enumerate() {
            _mm512_store_si512(to.add(part * PART).cast(), words);
        }
    }
}
