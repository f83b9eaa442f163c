//! Activations in 16-bit fixed point.

use std::arch::x86_64::*;

/// Activations of a group: four blocks.
pub(super) const LENGTH: usize = 128;
/// Activations that share a scale: the smallest blocks of weights have as many.
const BLOCK: usize = 32;
/// The largest integer: its bytes, the lower one signed, are both 127.
pub(super) const LARGEST: f32 = 32639.0;
/// Scales are those of at least this largest value, so that their inverses are finite: below it, activations are off by up
/// to 2^-116.
pub(super) const FLOOR: f32 = f32::from_bits((127 - 100) << 23);

/// Four blocks of activations, their first and their second halves apart: 64 bytes of either are a register, and lanes `4·b`
/// to `4·b + 3` of four bytes are block `b`. Where fewer than four exist, the rest is zero.
#[derive(Clone)]
#[repr(C, align(64))]
pub(super) struct Group {
    /// The upper bytes: an integer is `256·upper + lower`, either byte with a sign.
    upper: [[i8; 64]; 2],
    /// The lower bytes.
    lower: [[i8; 64]; 2],
    /// The sums of the four integers in each lane.
    sums: [[i32; 16]; 2],
    /// What an integer stands for, in each lane. NaN if an activation of the block is not finite: so is every product.
    scales: [f32; 16],
}

const EMPTY: Group = Group { upper: [[0; 64]; 2], lower: [[0; 64]; 2], sums: [[0; 16]; 2], scales: [0.0; 16] };

/// The groups of every row of `features` activations, in place of what `groups` held.
///
/// # Safety
/// It is [`available`](super::available).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn fill(groups: &mut Vec<Group>, x: &[f32], features: usize) {
    groups.clear();
    groups.resize(x.len() / features * features.div_ceil(LENGTH), EMPTY);
    let parts = x.chunks_exact(features).flat_map(|row| row.chunks(LENGTH));
    for (group, x) in groups.iter_mut().zip(parts) {
        for (index, x) in x.as_chunks::<BLOCK>().0.iter().enumerate() {
            block(x, index, group);
        }
        finish(group);
    }
}

/// Writes one of the four blocks.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn block(x: &[f32; BLOCK], index: usize, group: &mut Group) {
    // SAFETY: sixteen values each.
    let halves = unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x[16..].as_ptr())] };
    // As integers, the magnitudes of floats are in order, infinity and NaN above all others.
    let (a, b) = (_mm512_castps_si512(_mm512_abs_ps(halves[0])), _mm512_castps_si512(_mm512_abs_ps(halves[1])));
    let largest = f32::from_bits(_mm512_reduce_max_epu32(_mm512_max_epu32(a, b)));
    let scale = if largest.is_finite() { largest.max(FLOOR) / LARGEST } else { f32::NAN };
    let inverse = _mm512_set1_ps(1.0 / scale);
    for half in 0..2 {
        let integers = _mm512_cvtps_epi32(_mm512_mul_ps(halves[half], inverse));
        let upper = _mm512_srai_epi32(_mm512_add_epi32(integers, _mm512_set1_epi32(128)), 8);
        let (to_lower, to_upper) =
            (&mut group.lower[half][index * 16..][..16], &mut group.upper[half][index * 16..][..16]);
        // SAFETY: sixteen bytes each.
        unsafe {
            _mm_storeu_si128(to_lower.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(integers));
            _mm_storeu_si128(to_upper.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(upper));
        }
    }
    group.scales[index * 4..(index + 1) * 4].fill(scale);
}

/// Writes the sums, once all blocks are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn finish(group: &mut Group) {
    let ones = _mm512_set1_epi8(1);
    let sums = [group.dot(0, ones), group.dot(1, ones)];
    // SAFETY: sixteen values each.
    unsafe {
        _mm512_storeu_si512(group.sums[0].as_mut_ptr().cast(), sums[0]);
        _mm512_storeu_si512(group.sums[1].as_mut_ptr().cast(), sums[1]);
    }
}

impl Group {
    /// The products of one half with unsigned bytes, summed in each lane. They stay below `4 · 255 · 2^15 < 2^25`, so that
    /// neither they nor what is taken off them overflow.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) fn dot(&self, half: usize, weights: __m512i) -> __m512i {
        let upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, bytes(&self.upper[half]));
        _mm512_dpbusd_epi32(_mm512_slli_epi32(upper, 8), weights, bytes(&self.lower[half]))
    }

    /// [`Group::dot`] of both halves together.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) fn dots(&self, weights: [__m512i; 2]) -> __m512i {
        let upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights[0], bytes(&self.upper[0]));
        let upper = _mm512_dpbusd_epi32(upper, weights[1], bytes(&self.upper[1]));
        let lower = _mm512_dpbusd_epi32(_mm512_slli_epi32(upper, 8), weights[0], bytes(&self.lower[0]));
        _mm512_dpbusd_epi32(lower, weights[1], bytes(&self.lower[1]))
    }

    /// The sums of the integers in each lane of one half.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn sums(&self, half: usize) -> __m512i {
        // SAFETY: it holds as many.
        unsafe { _mm512_loadu_si512(self.sums[half].as_ptr().cast()) }
    }

    /// [`Group::sums`] of both halves together.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn both(&self) -> __m512i {
        _mm512_add_epi32(self.sums(0), self.sums(1))
    }

    /// What an integer in each lane stands for.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn scales(&self) -> __m512 {
        // SAFETY: it holds as many.
        unsafe { _mm512_loadu_ps(self.scales.as_ptr()) }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn bytes(bytes: &[i8; 64]) -> __m512i {
    // SAFETY: it holds as many.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}
