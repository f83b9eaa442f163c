//! Decoders of packed blocks to unsigned bytes and their scales. The block layouts are those of
//! [`BlockType`](crate::packed::BlockType).
//!
//! 128 weights are decoded at a time, in the order of [`ActivationGroup`]: lanes `4·b` to `4·b + 3` belong to block `b`
//! of 32.

use super::{super::fixed_point::unpack_6bit, activations::ActivationGroup};
use std::arch::x86_64::*;

/// A block format with a byte kernel. A *part* of a row is the run of blocks that is multiplied at a time.
pub(super) trait Int8Format {
    /// Groups of activations that belong to a part of a row.
    const GROUPS: usize;
    /// Bytes in a part of a row.
    const BYTES: usize;

    /// Accumulates the products of a part of a row, or of the whole blocks that are left of it, with its activations.
    ///
    /// # Safety
    /// [`has_avx512_vnni`](super::has_avx512_vnni) returns true.
    unsafe fn accumulate(sums: __m512, bytes: &[u8], x: &[ActivationGroup]) -> __m512;
}

/// `Q4_0`, `Q4_1`, `Q5_0` and `Q5_1`: a block has `WORDS` 16-bit words; it has a minimum if `HAS_MIN`, and fifth bits
/// if `HAS_FIFTH_BIT`. The words are, in this order: scale, minimum, two of fifth bits, eight of four bits per weight.
pub(super) struct NibblesInt8<const WORDS: usize, const HAS_MIN: bool, const HAS_FIFTH_BIT: bool>;

/// For each of 32 words, its index among the 64 words of two registers.
type WordIndices = [u16; 32];

/// Returns the indices of `count` words from word `first` on, in each of four blocks of `words` words; if `same`, that
/// one word `count` times.
const fn word_indices(words: usize, first: usize, count: usize, same: bool) -> WordIndices {
    let (mut places, mut index) = ([0; 32], 0);
    while index < 4 * count {
        let word = if same { first } else { first + index % count };
        places[index] = (index / count * words + word) as u16;
        index += 1;
    }
    places
}

/// Returns the first `at` indices of one list, followed by those of another.
const fn concat_indices(mut places: WordIndices, at: usize, others: WordIndices) -> WordIndices {
    let mut index = at;
    while index < 32 {
        places[index] = others[index - at];
        index += 1;
    }
    places
}

impl<const WORDS: usize, const HAS_MIN: bool, const HAS_FIFTH_BIT: bool> NibblesInt8<WORDS, HAS_MIN, HAS_FIFTH_BIT> {
    /// Words before the fifth bits.
    const HEADER_WORDS: usize = 1 + HAS_MIN as usize;
    /// Indices of the words with the four low bits of all weights.
    const QUANTS: WordIndices = word_indices(WORDS, Self::HEADER_WORDS + 2 * HAS_FIFTH_BIT as usize, 8, false);
    /// Indices of the scales of all lanes, then of the minima.
    const SCALES_AND_MINIMA: WordIndices =
        concat_indices(word_indices(WORDS, 0, 4, true), 16, word_indices(WORDS, Self::HEADER_WORDS - 1, 4, true));
    /// Indices of the fifth bits of the first halves of all blocks, then of the second halves.
    const FIFTH_BITS: WordIndices = concat_indices(
        word_indices(WORDS, Self::HEADER_WORDS, 1, true),
        4,
        word_indices(WORDS, Self::HEADER_WORDS + 1, 1, true),
    );
}

/// Returns the lower and the upper four bits of all bytes.
///
/// # Safety
/// The CPU has AVX-512F and AVX-512BW.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn nibbles(bytes: __m512i) -> [__m512i; 2] {
    let low = _mm512_set1_epi8(15);
    [_mm512_and_si512(bytes, low), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low)]
}

/// Adds 16 to each element whose bit is set.
///
/// # Safety
/// The CPU has AVX-512F and AVX-512BW.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn with_fifth_bit(quants: __m512i, bits: i64) -> __m512i {
    _mm512_or_si512(quants, _mm512_maskz_set1_epi8(bits as u64, 16))
}

impl<const WORDS: usize, const HAS_MIN: bool, const HAS_FIFTH_BIT: bool> Int8Format
    for NibblesInt8<WORDS, HAS_MIN, HAS_FIFTH_BIT>
{
    const GROUPS: usize = 1;
    const BYTES: usize = 4 * 2 * WORDS;

    /// # Safety
    /// [`has_avx512_vnni`](super::has_avx512_vnni) returns true.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn accumulate(sums: __m512, bytes: &[u8], x: &[ActivationGroup]) -> __m512 {
        let x = &x[0];
        let present = u64::MAX >> (64 - bytes.len() / 2);
        let start = bytes.as_ptr().cast::<i16>();
        // SAFETY: the masks limit the loads to the `bytes.len() / 2` words of the slice; masked-off lanes are not
        // accessed.
        let words = unsafe {
            let first = _mm512_maskz_loadu_epi16(present as u32, start);
            [first, _mm512_maskz_loadu_epi16((present >> 32) as u32, start.wrapping_add(32))]
        };
        let mut weights = nibbles(permute_words(words, &Self::QUANTS));
        if HAS_FIFTH_BIT {
            let bits = _mm512_castsi512_si128(permute_words(words, &Self::FIFTH_BITS));
            weights[0] = with_fifth_bit(weights[0], _mm_cvtsi128_si64(bits));
            weights[1] = with_fifth_bit(weights[1], _mm_extract_epi64(bits, 1));
        }
        let (dot, halves) = (x.dot_both(weights), permute_words(words, &Self::SCALES_AND_MINIMA));
        let scale = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), x.scales());
        if HAS_MIN {
            let minimum = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)), x.scales());
            return add_scaled(add_scaled(sums, minimum, x.total_lane_sums()), scale, dot);
        }
        // Formats without a minimum store a weight plus 8, or plus 16 if they have fifth bits.
        let eight = _mm512_slli_epi32(x.total_lane_sums(), 3);
        let above = if HAS_FIFTH_BIT { _mm512_add_epi32(eight, eight) } else { eight };
        add_scaled(sums, scale, _mm512_sub_epi32(dot, above))
    }
}

/// Gathers the words of two registers at the given indices.
///
/// # Safety
/// The CPU has AVX-512F and AVX-512BW.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn permute_words(words: [__m512i; 2], places: &WordIndices) -> __m512i {
    // SAFETY: the array of 32 16-bit indices has the size of the register.
    let places = unsafe { _mm512_loadu_si512(places.as_ptr().cast()) };
    _mm512_permutex2var_epi16(words[0], places, words[1])
}

/// `Q8_0`: a block has a scale and 32 signed bytes.
pub(super) struct Q8Int8;

impl Int8Format for Q8Int8 {
    const GROUPS: usize = 1;
    const BYTES: usize = 4 * 34;

    /// # Safety
    /// [`has_avx512_vnni`](super::has_avx512_vnni) returns true.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn accumulate(sums: __m512, bytes: &[u8], x: &[ActivationGroup]) -> __m512 {
        let x = &x[0];
        let first = _mm512_inserti64x4(_mm512_castsi256_si512(load_q8_block(bytes, 0)), load_q8_block(bytes, 1), 1);
        let second = _mm512_inserti64x4(_mm512_castsi256_si512(load_q8_block(bytes, 2)), load_q8_block(bytes, 3), 1);
        // Flipping the highest bit adds 128 and makes the signed bytes unsigned.
        let ([first, second], above) = (split_halves(first, second), _mm512_set1_epi8(i8::MIN));
        let weights = [_mm512_xor_si512(first, above), _mm512_xor_si512(second, above)];
        let dot = _mm512_sub_epi32(x.dot_both(weights), _mm512_slli_epi32(x.total_lane_sums(), 7));
        let scales =
            [load_q8_scale(bytes, 0), load_q8_scale(bytes, 1), load_q8_scale(bytes, 2), load_q8_scale(bytes, 3)];
        let scales = _mm_set_epi16(0, 0, 0, 0, scales[3], scales[2], scales[1], scales[0]);
        let scales = _mm512_mul_ps(broadcast_to_lanes(_mm_cvtph_ps(scales)), x.scales());
        add_scaled(sums, scales, dot)
    }
}

/// Loads the signed bytes of a block, zeros if it does not exist.
///
/// # Safety
/// The CPU has AVX-512F, AVX-512BW and AVX-512VL.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn load_q8_block(bytes: &[u8], block: usize) -> __m256i {
    let mask = if block < bytes.len() / 34 { u32::MAX } else { 0 };
    // SAFETY: the mask is empty unless the slice holds the whole block; masked-off lanes are not accessed.
    unsafe { _mm256_maskz_loadu_epi8(mask, bytes.as_ptr().wrapping_add(block * 34 + 2).cast()) }
}

/// Loads the scale of a block, zero if it does not exist.
#[inline(always)]
fn load_q8_scale(bytes: &[u8], block: usize) -> i16 {
    if block < bytes.len() / 34 { i16::from_le_bytes([bytes[block * 34], bytes[block * 34 + 1]]) } else { 0 }
}

/// `Q4_K`: 256 weights with six-bit scales and minima for each 32, which are a block here.
pub(super) struct Q4KInt8;

impl Int8Format for Q4KInt8 {
    const GROUPS: usize = 2;
    const BYTES: usize = 144;

    /// # Safety
    /// [`has_avx512_vnni`](super::has_avx512_vnni) returns true.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn accumulate(mut sums: __m512, bytes: &[u8], x: &[ActivationGroup]) -> __m512 {
        let halves = _mm_cvtph_ps(_mm_cvtsi32_si128(read_u32(bytes, 0) as i32));
        let (factor, factor_of_minima) =
            (_mm512_broadcastss_ps(halves), _mm512_broadcastss_ps(_mm_movehdup_ps(halves)));
        let last = read_u32(bytes, 12);
        let (scales, minima) = (unpack_6bit(read_u32(bytes, 4), last), unpack_6bit(read_u32(bytes, 8), last >> 4));
        for part in 0..2 {
            let x = &x[part];
            // SAFETY: the slice of 64 bytes, half of the four-bit weights, has the size of the register.
            let quants = unsafe { _mm512_loadu_si512(bytes[16 + part * 64..][..64].as_ptr().cast()) };
            // The lower halves of bytes are blocks 0 and 2, the upper halves blocks 1 and 3.
            let [even, odd] = nibbles(quants);
            let weights = [
                _mm512_permutex2var_epi64(even, _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), odd),
                _mm512_permutex2var_epi64(even, _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15), odd),
            ];
            let scale = _mm512_mul_ps(_mm512_mul_ps(broadcast_bytes_to_lanes(scales[part], false), factor), x.scales());
            sums = add_scaled(sums, scale, x.dot_both(weights));
            let minimum = _mm512_mul_ps(
                _mm512_mul_ps(broadcast_bytes_to_lanes(minima[part], false), factor_of_minima),
                x.scales(),
            );
            sums = _mm512_fnmadd_ps(minimum, _mm512_cvtepi32_ps(x.total_lane_sums()), sums);
        }
        sums
    }
}

/// Reads four bytes as a little-endian word.
#[inline(always)]
fn read_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// `Q6_K`: 256 weights with eight-bit scales for each 16, which are half a block here.
pub(super) struct Q6KInt8;

impl Int8Format for Q6KInt8 {
    const GROUPS: usize = 2;
    const BYTES: usize = 210;

    /// # Safety
    /// [`has_avx512_vnni`](super::has_avx512_vnni) returns true.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn accumulate(mut sums: __m512, bytes: &[u8], x: &[ActivationGroup]) -> __m512 {
        let high = _mm512_set1_epi8(0x30);
        // Shifts that move the upper two bits of blocks 0 and 1, then of 2 and 3, to bits 4 and 5.
        let left = _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_set1_epi16(2), 1);
        let right = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
        let half = i32::from(u16::from_le_bytes([bytes[208], bytes[209]]));
        let factor = _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
        for part in 0..2 {
            let x = &x[part];
            // SAFETY: the slices, half of the 128 bytes of lower four bits and half of the 64 bytes of upper two bits,
            // have the sizes of the registers.
            let (quants, bits) = unsafe {
                let bits = _mm256_loadu_si256(bytes[128 + part * 32..][..32].as_ptr().cast());
                (_mm512_loadu_si512(bytes[part * 64..][..64].as_ptr().cast()), _mm512_broadcast_i64x4(bits))
            };
            let [first, second] = nibbles(quants);
            let first = _mm512_or_si512(first, _mm512_and_si512(_mm512_sllv_epi16(bits, left), high));
            let second = _mm512_or_si512(second, _mm512_and_si512(_mm512_srlv_epi16(bits, right), high));
            let weights = split_halves(first, second);
            let (scales, factor) = (&bytes[192 + part * 8..][..8], _mm512_mul_ps(factor, x.scales()));
            for half in 0..2 {
                let four = u32::from_le_bytes([scales[half], scales[half + 2], scales[half + 4], scales[half + 6]]);
                // Weights are stored plus 32.
                let dot = _mm512_sub_epi32(x.dot_half(half, weights[half]), _mm512_slli_epi32(x.lane_sums(half), 5));
                sums = add_scaled(sums, _mm512_mul_ps(broadcast_bytes_to_lanes(four, true), factor), dot);
            }
        }
        sums
    }
}

/// Returns the first and the second halves of four blocks in order.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline]
#[target_feature(enable = "avx512f")]
fn split_halves(first: __m512i, second: __m512i) -> [__m512i; 2] {
    [_mm512_shuffle_i64x2(first, second, 0b10_00_10_00), _mm512_shuffle_i64x2(first, second, 0b11_01_11_01)]
}

/// Broadcasts one number per block to all lanes of the block.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast_to_lanes(blocks: __m128) -> __m512 {
    let lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(blocks))
}

/// Broadcasts one byte per block to all lanes of the block, as f32; signed or unsigned.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast_bytes_to_lanes(blocks: u32, signed: bool) -> __m512 {
    let bytes = _mm_cvtsi32_si128(blocks as i32);
    broadcast_to_lanes(_mm_cvtepi32_ps(if signed { _mm_cvtepi8_epi32(bytes) } else { _mm_cvtepu8_epi32(bytes) }))
}

/// Accumulates integers times their scale.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_scaled(sums: __m512, scale: __m512, integers: __m512i) -> __m512 {
    _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(integers), sums)
}
