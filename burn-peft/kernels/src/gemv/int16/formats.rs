//! Decoders of packed blocks to 16-bit words and their scales. The block layouts are those of
//! [`BlockType`](crate::packed::BlockType).

use super::{
    super::fixed_point::unpack_6bit, ACCUMULATORS, BlockPtr, BlockScale, Int16Block, Int16Format, RowAccumulators,
};
use std::arch::x86_64::*;

/// Multiplies 16 words with half a block of activations and sums pairs of products, in eight lanes.
///
/// # Safety
/// The CPU has AVX2, `x` points to a block, and `half` is 0 or 1.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn madd_half(words: __m256i, x: *const Int16Block, half: usize) -> __m256i {
    // SAFETY: each half of the block is 16 words, the size of the register, and blocks are aligned to 64 bytes.
    _mm256_madd_epi16(words, unsafe { _mm256_load_si256(x.cast::<__m256i>().add(half)) })
}

/// Loads sixteen bytes as words.
///
/// # Safety
/// The CPU has AVX2, and `bytes` points to 16 bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_bytes_as_words(bytes: *const u8) -> __m256i {
    // SAFETY: 16 bytes are readable by the caller's guarantee; the load needs no alignment.
    _mm256_cvtepu8_epi16(unsafe { _mm_loadu_si128(bytes.cast()) })
}

/// Returns the lower four bits of words, and the next four, where all higher bits are zero.
///
/// # Safety
/// The CPU has AVX2.
#[inline]
#[target_feature(enable = "avx2")]
fn nibbles(words: __m256i) -> [__m256i; 2] {
    [_mm256_and_si256(words, _mm256_set1_epi16(15)), _mm256_srli_epi16::<4>(words)]
}

/// Loads two adjacent f16 as f32, followed by zeros.
///
/// # Safety
/// The CPU has AVX2 and F16C, and `bytes` points to 4 bytes.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn load_two_f16(bytes: *const u8) -> __m128 {
    // SAFETY: 4 bytes are readable by the caller's guarantee; the read needs no alignment.
    _mm_cvtph_ps(_mm_cvtsi32_si128(unsafe { bytes.cast::<i32>().read_unaligned() }))
}

/// `Q4_0`, `Q4_1`, `Q5_0` and `Q5_1`: a block has a scale, a minimum if `HAS_MIN`, fifth bits if `HAS_FIFTH_BIT`, and
/// four bits of each weight.
pub(super) struct NibblesInt16<const HAS_MIN: bool, const HAS_FIFTH_BIT: bool>;

impl<const HAS_MIN: bool, const HAS_FIFTH_BIT: bool> Int16Format for NibblesInt16<HAS_MIN, HAS_FIFTH_BIT> {
    const BLOCKS: usize = 1;
    const BYTES: usize = 2 + 2 * HAS_MIN as usize + 4 * HAS_FIFTH_BIT as usize + 16;

    /// # Safety
    /// The CPU has AVX2, FMA and F16C, `bytes` points to a block, and `x` to a block of activations.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn accumulate(sums: &mut RowAccumulators, index: usize, bytes: *const u8, x: BlockPtr) {
        // SAFETY: all offsets lie within the `BYTES` bytes of the block and within one block of activations and its two
        // scales, which exist by the caller's guarantee.
        unsafe {
            let mut weights = nibbles(load_bytes_as_words(bytes.add(Self::BYTES - 16)));
            if HAS_FIFTH_BIT {
                let bits = bytes.add(Self::BYTES - 20).cast::<[i16; 2]>().read_unaligned();
                weights = [with_fifth_bit(weights[0], bits[0]), with_fifth_bit(weights[1], bits[1])];
            }
            // The scale and the minimum, times the scale and the scaled sum of the activations.
            let mut scales = _mm_mul_ps(load_two_f16(bytes), _mm_castsi128_ps(_mm_loadl_epi64(x.scales.cast())));
            if HAS_MIN {
                sums.minima = _mm_add_ps(sums.minima, _mm_blend_ps::<1>(scales, _mm_setzero_ps()));
            } else {
                // Formats without a minimum store a weight plus 8, or plus 16 if they have fifth bits.
                let above = _mm256_set1_epi16(if HAS_FIFTH_BIT { 16 } else { 8 });
                weights = [_mm256_sub_epi16(weights[0], above), _mm256_sub_epi16(weights[1], above)];
                scales = _mm_mul_ss(load_two_f16(bytes), _mm_load_ss(x.scales.cast()));
            }
            let dot = _mm256_add_epi32(madd_half(weights[0], x.integers, 0), madd_half(weights[1], x.integers, 1));
            let scale = _mm256_broadcastss_ps(scales);
            sums.dots[index] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dot), sums.dots[index]);
        }
    }
}

/// Adds 16 to each word whose bit is set.
///
/// # Safety
/// The CPU has AVX2.
#[inline]
#[target_feature(enable = "avx2")]
fn with_fifth_bit(words: __m256i, bits: i16) -> __m256i {
    let own = _mm256_setr_epi16(
        1,
        2,
        4,
        8,
        0x10,
        0x20,
        0x40,
        0x80,
        0x100,
        0x200,
        0x400,
        0x800,
        0x1000,
        0x2000,
        0x4000,
        i16::MIN,
    );
    let set = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(bits), own), own);
    _mm256_or_si256(words, _mm256_and_si256(set, _mm256_set1_epi16(16)))
}

/// `Q8_0`: a block has a scale and 32 signed bytes.
pub(super) struct Q8Int16;

impl Int16Format for Q8Int16 {
    const BLOCKS: usize = 1;
    const BYTES: usize = 34;

    /// # Safety
    /// The CPU has AVX2, FMA and F16C, `bytes` points to a block, and `x` to a block of activations.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn accumulate(sums: &mut RowAccumulators, index: usize, bytes: *const u8, x: BlockPtr) {
        // SAFETY: all offsets lie within the `BYTES` bytes of the block and within one block of activations and its
        // scales, which exist by the caller's guarantee.
        unsafe {
            let weights = |half: usize| _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes.add(2 + 16 * half).cast()));
            let dot = _mm256_add_epi32(madd_half(weights(0), x.integers, 0), madd_half(weights(1), x.integers, 1));
            let scale = _mm256_broadcastss_ps(_mm_mul_ss(load_two_f16(bytes), _mm_load_ss(x.scales.cast())));
            sums.dots[index] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dot), sums.dots[index]);
        }
    }
}

/// Loads the scales of eight blocks of activations, and their scaled sums.
///
/// # Safety
/// The CPU has AVX2, and `scales` points to eight pairs.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_8_scales(scales: *const BlockScale) -> [__m256; 2] {
    // SAFETY: the two loads cover the eight pairs, which exist by the caller's guarantee, and need no alignment.
    let (a, b) = unsafe { (_mm256_loadu_ps(scales.cast()), _mm256_loadu_ps(scales.add(4).cast())) };
    let [first, second] = [_mm256_shuffle_ps::<0x88>(a, b), _mm256_shuffle_ps::<0xdd>(a, b)];
    let sorted = |pairs: __m256| _mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(pairs));
    [_mm256_castpd_ps(sorted(first)), _mm256_castpd_ps(sorted(second))]
}

/// `Q4_K`: 256 weights with six-bit scales and minima for each 32.
pub(super) struct Q4KInt16;

impl Int16Format for Q4KInt16 {
    const BLOCKS: usize = 8;
    const BYTES: usize = 144;

    /// # Safety
    /// The CPU has AVX2, FMA and F16C, `bytes` points to a block, and `x` to eight blocks of activations.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn accumulate(sums: &mut RowAccumulators, _: usize, bytes: *const u8, x: BlockPtr) {
        // SAFETY: all offsets lie within the `BYTES` bytes of the block and within eight blocks of activations and
        // their scales, which exist by the caller's guarantee; the transmuted types have the same size.
        unsafe {
            let [scale, sum] = load_8_scales(x.scales);
            let both = load_two_f16(bytes);
            let word = |at: usize| bytes.add(at).cast::<u32>().read_unaligned();
            let last = word(12);
            let (scales, minima) = (unpack_6bit(word(4), last), unpack_6bit(word(8), last >> 4));
            let numbers = |[low, high]: [u32; 2]| {
                let bytes = _mm_cvtsi64_si128((u64::from(high) << 32 | u64::from(low)) as i64);
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))
            };
            let least = _mm256_mul_ps(_mm256_broadcastss_ps(_mm_movehdup_ps(both)), numbers(minima));
            let least = _mm256_mul_ps(least, sum);
            let least = _mm_add_ps(_mm256_castps256_ps128(least), _mm256_extractf128_ps::<1>(least));
            sums.minima = _mm_sub_ps(sums.minima, least);
            let factors = _mm256_mul_ps(_mm256_mul_ps(_mm256_broadcastss_ps(both), numbers(scales)), scale);
            let factors: [f32; 8] = std::mem::transmute(factors);
            for pair in 0..4 {
                let quants = bytes.add(16 + 32 * pair);
                let ([a, c], [b, d]) =
                    (nibbles(load_bytes_as_words(quants)), nibbles(load_bytes_as_words(quants.add(16))));
                let (even, odd) = (x.integers.add(2 * pair), x.integers.add(2 * pair + 1));
                let dots = [
                    _mm256_add_epi32(madd_half(a, even, 0), madd_half(b, even, 1)),
                    _mm256_add_epi32(madd_half(c, odd, 0), madd_half(d, odd, 1)),
                ];
                for half in 0..2 {
                    let (factor, dot) = (_mm256_set1_ps(factors[2 * pair + half]), _mm256_cvtepi32_ps(dots[half]));
                    let to = (2 * pair + half) % ACCUMULATORS;
                    sums.dots[to] = _mm256_fmadd_ps(factor, dot, sums.dots[to]);
                }
            }
        }
    }
}

/// `Q6_K`: 256 weights with eight-bit scales for each 16.
pub(super) struct Q6KInt16;

impl Int16Format for Q6KInt16 {
    const BLOCKS: usize = 8;
    const BYTES: usize = 210;

    /// # Safety
    /// The CPU has AVX2, FMA and F16C, `bytes` points to a block, and `x` to eight blocks of activations.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn accumulate(sums: &mut RowAccumulators, _: usize, bytes: *const u8, x: BlockPtr) {
        // SAFETY: all offsets lie within the `BYTES` bytes of the block and within eight blocks of activations and
        // their scales, which exist by the caller's guarantee; `factors` has room for both stores.
        unsafe {
            let [scale, _] = load_8_scales(x.scales);
            let half = bytes.add(208).cast::<u16>().read_unaligned();
            let scale = _mm256_mul_ps(_mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(half)))), scale);
            // Each scale of 32 activations twice, for the two scales of their weights.
            let [low, high] = [_mm256_unpacklo_ps(scale, scale), _mm256_unpackhi_ps(scale, scale)];
            let twice = [_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high)];
            let mut factors = [0f32; 16];
            for half in 0..2 {
                let own = _mm256_cvtepi8_epi32(_mm_loadl_epi64(bytes.add(192 + 8 * half).cast()));
                let own = _mm256_mul_ps(_mm256_cvtepi32_ps(own), twice[half]);
                _mm256_storeu_ps(factors.as_mut_ptr().add(8 * half), own);
            }
            let above = _mm256_set1_epi16(32);
            let upper = _mm256_set1_epi16(0x30);
            for part in 0..2 {
                for sixteen in 0..2 {
                    let quants = bytes.add(64 * part + 16 * sixteen);
                    let ([a, c], [b, d]) =
                        (nibbles(load_bytes_as_words(quants)), nibbles(load_bytes_as_words(quants.add(32))));
                    let bits = load_bytes_as_words(bytes.add(128 + 32 * part + 16 * sixteen));
                    let bits = [
                        _mm256_slli_epi16::<4>(bits),
                        _mm256_slli_epi16::<2>(bits),
                        bits,
                        _mm256_srli_epi16::<2>(bits),
                    ];
                    let quants = [a, b, c, d];
                    for block in 0..4 {
                        let weights = _mm256_or_si256(quants[block], _mm256_and_si256(bits[block], upper));
                        let weights = _mm256_sub_epi16(weights, above);
                        let dot = madd_half(weights, x.integers.add(4 * part + block), sixteen);
                        let factor = _mm256_set1_ps(factors[8 * part + 2 * block + sixteen]);
                        sums.dots[block] = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(dot), sums.dots[block]);
                    }
                }
            }
        }
    }
}
