//! Activations as two bytes each.

use super::super::fixed_point::{BLOCK_LEN, MAX_INTEGER, MIN_ABSMAX};
use std::arch::x86_64::*;

/// Activations in a group: four blocks.
pub(super) const GROUP_LEN: usize = 128;

/// Four blocks of activations, their first halves apart from their second halves: 64 bytes of either fill a register,
/// and lanes `4·b` to `4·b + 3` of four bytes belong to block `b`. Blocks that do not exist are zero.
#[derive(Clone)]
#[repr(C, align(64))]
pub(super) struct ActivationGroup {
    /// The upper bytes: an integer is `256·upper + lower`, where both bytes are signed.
    upper: [[i8; 64]; 2],
    /// The lower bytes.
    lower: [[i8; 64]; 2],
    /// The sums of the four integers in each lane.
    lane_sums: [[i32; 16]; 2],
    /// The scale of the integers in each lane. NaN if an activation of the block is not finite, which makes every
    /// product NaN.
    scales: [f32; 16],
}

const EMPTY: ActivationGroup =
    ActivationGroup { upper: [[0; 64]; 2], lower: [[0; 64]; 2], lane_sums: [[0; 16]; 2], scales: [0.0; 16] };

/// Quantizes every row of `features` activations to groups, which replace the contents of `groups`.
///
/// # Safety
/// [`has_avx512_vnni`](super::has_avx512_vnni) returns true.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn quantize_rows(groups: &mut Vec<ActivationGroup>, x: &[f32], features: usize) {
    groups.clear();
    groups.resize(x.len() / features * features.div_ceil(GROUP_LEN), EMPTY);
    let parts = x.chunks_exact(features).flat_map(|row| row.chunks(GROUP_LEN));
    for (group, x) in groups.iter_mut().zip(parts) {
        for (index, x) in x.as_chunks::<BLOCK_LEN>().0.iter().enumerate() {
            quantize_block(x, index, group);
        }
        sum_lanes(group);
    }
}

/// Quantizes one of the four blocks of a group.
///
/// # Safety
/// [`has_avx512_vnni`](super::has_avx512_vnni) returns true.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn quantize_block(x: &[f32; BLOCK_LEN], index: usize, group: &mut ActivationGroup) {
    // SAFETY: the two loads cover the 32 values of the block and need no alignment.
    let halves = unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x[16..].as_ptr())] };
    // Magnitudes of floats, read as integers, keep their order; infinity and NaN are above all others.
    let (a, b) = (_mm512_castps_si512(_mm512_abs_ps(halves[0])), _mm512_castps_si512(_mm512_abs_ps(halves[1])));
    let largest = f32::from_bits(_mm512_reduce_max_epu32(_mm512_max_epu32(a, b)));
    let scale = if largest.is_finite() { largest.max(MIN_ABSMAX) / MAX_INTEGER } else { f32::NAN };
    let inverse = _mm512_set1_ps(1.0 / scale);
    for half in 0..2 {
        let integers = _mm512_cvtps_epi32(_mm512_mul_ps(halves[half], inverse));
        let upper = _mm512_srai_epi32(_mm512_add_epi32(integers, _mm512_set1_epi32(128)), 8);
        let (to_lower, to_upper) =
            (&mut group.lower[half][index * 16..][..16], &mut group.upper[half][index * 16..][..16]);
        // SAFETY: both slices have the 16 bytes that a store writes, and the stores need no alignment.
        unsafe {
            _mm_storeu_si128(to_lower.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(integers));
            _mm_storeu_si128(to_upper.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(upper));
        }
    }
    group.scales[index * 4..(index + 1) * 4].fill(scale);
}

/// Computes the sums of the lanes once all blocks are quantized.
///
/// # Safety
/// [`has_avx512_vnni`](super::has_avx512_vnni) returns true.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn sum_lanes(group: &mut ActivationGroup) {
    let ones = _mm512_set1_epi8(1);
    let sums = [group.dot_half(0, ones), group.dot_half(1, ones)];
    // SAFETY: each array of 16 i32 has the size of the register that is stored to it.
    unsafe {
        _mm512_storeu_si512(group.lane_sums[0].as_mut_ptr().cast(), sums[0]);
        _mm512_storeu_si512(group.lane_sums[1].as_mut_ptr().cast(), sums[1]);
    }
}

impl ActivationGroup {
    /// Returns the products of one half of the blocks with unsigned bytes, summed in each lane. They stay below `4 ·
    /// 255 · 2^15 < 2^25`, so neither they nor the offsets that are subtracted from them overflow.
    ///
    /// # Safety
    /// [`has_avx512_vnni`](super::has_avx512_vnni) returns true.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) fn dot_half(&self, half: usize, weights: __m512i) -> __m512i {
        let upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, load_bytes(&self.upper[half]));
        _mm512_dpbusd_epi32(_mm512_slli_epi32(upper, 8), weights, load_bytes(&self.lower[half]))
    }

    /// Returns the sum of [`ActivationGroup::dot_half`] over both halves.
    ///
    /// # Safety
    /// [`has_avx512_vnni`](super::has_avx512_vnni) returns true.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) fn dot_both(&self, weights: [__m512i; 2]) -> __m512i {
        let upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights[0], load_bytes(&self.upper[0]));
        let upper = _mm512_dpbusd_epi32(upper, weights[1], load_bytes(&self.upper[1]));
        let lower = _mm512_dpbusd_epi32(_mm512_slli_epi32(upper, 8), weights[0], load_bytes(&self.lower[0]));
        _mm512_dpbusd_epi32(lower, weights[1], load_bytes(&self.lower[1]))
    }

    /// Returns the sums of the integers in each lane of one half.
    ///
    /// # Safety
    /// The CPU has AVX-512F.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn lane_sums(&self, half: usize) -> __m512i {
        // SAFETY: the array of 16 i32 has the size of the register.
        unsafe { _mm512_loadu_si512(self.lane_sums[half].as_ptr().cast()) }
    }

    /// Returns the sum of [`ActivationGroup::lane_sums`] over both halves.
    ///
    /// # Safety
    /// The CPU has AVX-512F.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn total_lane_sums(&self) -> __m512i {
        _mm512_add_epi32(self.lane_sums(0), self.lane_sums(1))
    }

    /// Returns the scale of the integers in each lane.
    ///
    /// # Safety
    /// The CPU has AVX-512F.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn scales(&self) -> __m512 {
        // SAFETY: the array of 16 f32 has the size of the register.
        unsafe { _mm512_loadu_ps(self.scales.as_ptr()) }
    }
}

/// Loads 64 bytes into a register.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_bytes(bytes: &[i8; 64]) -> __m512i {
    // SAFETY: the array of 64 bytes has the size of the register.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}
