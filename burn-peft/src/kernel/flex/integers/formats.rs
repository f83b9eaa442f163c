//! Rows of blocks as unsigned bytes beside their scales. The layouts are those of [`BlockType`](crate::packed::BlockType).
//!
//! 128 weights are decoded at a time, in the order of [`Group`]: lanes `4·b` to `4·b + 3` belong to block `b` of 32.

use super::fixed::Group;
use std::arch::x86_64::*;

/// How rows are packed.
pub(super) trait Format {
    /// Groups of activations that meet a part of a row.
    const GROUPS: usize;
    /// The bytes of that part.
    const BYTES: usize;

    /// Adds the products of a part of a row, or of the whole blocks that are left of it, with its activations.
    ///
    /// # Safety
    /// It is [`available`](super::available).
    unsafe fn add(sums: __m512, bytes: &[u8], x: &[Group]) -> __m512;
}

/// `Q4_0`, `Q4_1`, `Q5_0` and `Q5_1`: blocks of so many 16-bit words, whether they have a minimum, and whether fifth bits.
/// The words are, in this order: scale, minimum, two of fifth bits, eight of four bits each.
pub(super) struct Nibbles<const WORDS: usize, const MINIMUM: bool, const FIFTH: bool>;

/// For each of 32 words, which of the 64 words of two registers it is.
type Places = [u16; 32];

/// The places of `count` words of each of four blocks of so many words, from word `first` on or all of them that one.
const fn places(words: usize, first: usize, count: usize, same: bool) -> Places {
    let (mut places, mut index) = ([0; 32], 0);
    while index < 4 * count {
        let word = if same { first } else { first + index % count };
        places[index] = (index / count * words + word) as u16;
        index += 1;
    }
    places
}

/// The first `at` of some places, then others.
const fn joined(mut places: Places, at: usize, others: Places) -> Places {
    let mut index = at;
    while index < 32 {
        places[index] = others[index - at];
        index += 1;
    }
    places
}

impl<const WORDS: usize, const MINIMUM: bool, const FIFTH: bool> Nibbles<WORDS, MINIMUM, FIFTH> {
    /// Words before the fifth bits.
    const SCALES: usize = 1 + MINIMUM as usize;
    /// The four bits of all weights.
    const QUANTS: Places = places(WORDS, Self::SCALES + 2 * FIFTH as usize, 8, false);
    /// The scales of all lanes, then the minima.
    const HALVES: Places = joined(places(WORDS, 0, 4, true), 16, places(WORDS, Self::SCALES - 1, 4, true));
    /// The fifth bits of all first halves of blocks, then of the second.
    const FIFTHS: Places = joined(places(WORDS, Self::SCALES, 1, true), 4, places(WORDS, Self::SCALES + 1, 1, true));
}

/// The lower, then the upper four bits of all bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn nibbles(bytes: __m512i) -> [__m512i; 2] {
    let low = _mm512_set1_epi8(15);
    [_mm512_and_si512(bytes, low), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low)]
}

/// Adds 16 where an element's bit is set.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn with_fifth(quants: __m512i, bits: i64) -> __m512i {
    _mm512_or_si512(quants, _mm512_maskz_set1_epi8(bits as u64, 16))
}

impl<const WORDS: usize, const MINIMUM: bool, const FIFTH: bool> Format for Nibbles<WORDS, MINIMUM, FIFTH> {
    const GROUPS: usize = 1;
    const BYTES: usize = 4 * 2 * WORDS;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn add(sums: __m512, bytes: &[u8], x: &[Group]) -> __m512 {
        let x = &x[0];
        let present = u64::MAX >> (64 - bytes.len() / 2);
        let start = bytes.as_ptr().cast::<i16>();
        // SAFETY: the masks keep to the bytes.
        let words = unsafe {
            let first = _mm512_maskz_loadu_epi16(present as u32, start);
            [first, _mm512_maskz_loadu_epi16((present >> 32) as u32, start.wrapping_add(32))]
        };
        let mut weights = nibbles(pick(words, &Self::QUANTS));
        if FIFTH {
            let bits = _mm512_castsi512_si128(pick(words, &Self::FIFTHS));
            weights[0] = with_fifth(weights[0], _mm_cvtsi128_si64(bits));
            weights[1] = with_fifth(weights[1], _mm_extract_epi64(bits, 1));
        }
        let (dot, halves) = (x.dots(weights), pick(words, &Self::HALVES));
        let scale = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), x.scales());
        if MINIMUM {
            let minimum = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)), x.scales());
            return add(add(sums, minimum, x.both()), scale, dot);
        }
        // Weights without a minimum are stored 8 or 16 above what they stand for.
        let eight = _mm512_slli_epi32(x.both(), 3);
        let above = if FIFTH { _mm512_add_epi32(eight, eight) } else { eight };
        add(sums, scale, _mm512_sub_epi32(dot, above))
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn pick(words: [__m512i; 2], places: &Places) -> __m512i {
    // SAFETY: there are as many.
    let places = unsafe { _mm512_loadu_si512(places.as_ptr().cast()) };
    _mm512_permutex2var_epi16(words[0], places, words[1])
}

/// `Q8_0`: blocks of a scale and signed bytes.
pub(super) struct Q8;

impl Format for Q8 {
    const GROUPS: usize = 1;
    const BYTES: usize = 4 * 34;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn add(sums: __m512, bytes: &[u8], x: &[Group]) -> __m512 {
        let x = &x[0];
        let first = _mm512_inserti64x4(_mm512_castsi256_si512(q8(bytes, 0)), q8(bytes, 1), 1);
        let second = _mm512_inserti64x4(_mm512_castsi256_si512(q8(bytes, 2)), q8(bytes, 3), 1);
        // 128 above the signed byte.
        let ([first, second], above) = (halves(first, second), _mm512_set1_epi8(i8::MIN));
        let weights = [_mm512_xor_si512(first, above), _mm512_xor_si512(second, above)];
        let dot = _mm512_sub_epi32(x.dots(weights), _mm512_slli_epi32(x.both(), 7));
        let scales = [q8_scale(bytes, 0), q8_scale(bytes, 1), q8_scale(bytes, 2), q8_scale(bytes, 3)];
        let scales = _mm_set_epi16(0, 0, 0, 0, scales[3], scales[2], scales[1], scales[0]);
        let scales = _mm512_mul_ps(spread(_mm_cvtph_ps(scales)), x.scales());
        add(sums, scales, dot)
    }
}

/// The signed bytes of a block, zeros where there is none.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn q8(bytes: &[u8], block: usize) -> __m256i {
    let mask = if block < bytes.len() / 34 { u32::MAX } else { 0 };
    // SAFETY: the mask keeps to the bytes.
    unsafe { _mm256_maskz_loadu_epi8(mask, bytes.as_ptr().wrapping_add(block * 34 + 2).cast()) }
}

/// The scale of a block, zero where there is none.
#[inline(always)]
fn q8_scale(bytes: &[u8], block: usize) -> i16 {
    if block < bytes.len() / 34 { i16::from_le_bytes([bytes[block * 34], bytes[block * 34 + 1]]) } else { 0 }
}

/// `Q4_K`: 256 weights with six-bit scales and minima for each 32, which are a block here.
pub(super) struct Q4K;

impl Format for Q4K {
    const GROUPS: usize = 2;
    const BYTES: usize = 144;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn add(mut sums: __m512, bytes: &[u8], x: &[Group]) -> __m512 {
        let halves = _mm_cvtph_ps(_mm_cvtsi32_si128(word(bytes, 0) as i32));
        let (factor, factor_of_minima) =
            (_mm512_broadcastss_ps(halves), _mm512_broadcastss_ps(_mm_movehdup_ps(halves)));
        let last = word(bytes, 12);
        let (scales, minima) = (six(word(bytes, 4), last), six(word(bytes, 8), last >> 4));
        for part in 0..2 {
            let x = &x[part];
            // SAFETY: half of the 128 bytes that hold all four bits.
            let quants = unsafe { _mm512_loadu_si512(bytes[16 + part * 64..][..64].as_ptr().cast()) };
            // Blocks 0 and 2, then 1 and 3.
            let [even, odd] = nibbles(quants);
            let weights = [
                _mm512_permutex2var_epi64(even, _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), odd),
                _mm512_permutex2var_epi64(even, _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15), odd),
            ];
            let scale = _mm512_mul_ps(_mm512_mul_ps(spread_bytes(scales[part], false), factor), x.scales());
            sums = add(sums, scale, x.dots(weights));
            let minimum = _mm512_mul_ps(_mm512_mul_ps(spread_bytes(minima[part], false), factor_of_minima), x.scales());
            sums = _mm512_fnmadd_ps(minimum, _mm512_cvtepi32_ps(x.both()), sums);
        }
        sums
    }
}

/// Four bytes of a block.
#[inline(always)]
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Eight numbers of six bits: the upper four have their lower four bits in the other word, and two more above the bits of
/// the lower four.
#[inline(always)]
pub(super) fn six(word: u32, last: u32) -> [u32; 2] {
    [word & 0x3f3f_3f3f, last & 0x0f0f_0f0f | (word >> 6 & 0x0303_0303) << 4]
}

/// `Q6_K`: 256 weights with eight-bit scales for each 16, which are half a block here.
pub(super) struct Q6K;

impl Format for Q6K {
    const GROUPS: usize = 2;
    const BYTES: usize = 210;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn add(mut sums: __m512, bytes: &[u8], x: &[Group]) -> __m512 {
        let high = _mm512_set1_epi8(0x30);
        // From where blocks 0 and 1, then 2 and 3, have their upper bits to where they belong.
        let left = _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_set1_epi16(2), 1);
        let right = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
        let half = i32::from(u16::from_le_bytes([bytes[208], bytes[209]]));
        let factor = _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
        for part in 0..2 {
            let x = &x[part];
            // SAFETY: half of the 128 bytes that hold the lower four bits, and half of the 64 that hold the upper two.
            let (quants, bits) = unsafe {
                let bits = _mm256_loadu_si256(bytes[128 + part * 32..][..32].as_ptr().cast());
                (_mm512_loadu_si512(bytes[part * 64..][..64].as_ptr().cast()), _mm512_broadcast_i64x4(bits))
            };
            let [first, second] = nibbles(quants);
            let first = _mm512_or_si512(first, _mm512_and_si512(_mm512_sllv_epi16(bits, left), high));
            let second = _mm512_or_si512(second, _mm512_and_si512(_mm512_srlv_epi16(bits, right), high));
            let weights = halves(first, second);
            let (scales, factor) = (&bytes[192 + part * 8..][..8], _mm512_mul_ps(factor, x.scales()));
            for half in 0..2 {
                let four = u32::from_le_bytes([scales[half], scales[half + 2], scales[half + 4], scales[half + 6]]);
                // The weights are stored 32 above what they stand for.
                let dot = _mm512_sub_epi32(x.dot(half, weights[half]), _mm512_slli_epi32(x.sums(half), 5));
                sums = add(sums, _mm512_mul_ps(spread_bytes(four, true), factor), dot);
            }
        }
        sums
    }
}

/// The first and the second halves of four blocks in order.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves(first: __m512i, second: __m512i) -> [__m512i; 2] {
    [_mm512_shuffle_i64x2(first, second, 0b10_00_10_00), _mm512_shuffle_i64x2(first, second, 0b11_01_11_01)]
}

/// One number for each block, in each of its lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn spread(blocks: __m128) -> __m512 {
    let lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(blocks))
}

/// [`spread`] of bytes, with a sign or without.
#[inline]
#[target_feature(enable = "avx512f")]
fn spread_bytes(blocks: u32, signed: bool) -> __m512 {
    let bytes = _mm_cvtsi32_si128(blocks as i32);
    spread(_mm_cvtepi32_ps(if signed { _mm_cvtepi8_epi32(bytes) } else { _mm_cvtepu8_epi32(bytes) }))
}

/// Adds integers times what they stand for.
#[inline]
#[target_feature(enable = "avx512f")]
fn add(sums: __m512, scale: __m512, integers: __m512i) -> __m512 {
    _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(integers), sums)
}
