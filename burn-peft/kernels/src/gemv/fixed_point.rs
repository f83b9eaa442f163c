//! Activations in 16-bit fixed point, as all integer kernels take them.
//!
//! The weights stay the small integers of their blocks. Every 32 activations become 16-bit integers times a common
//! scale, with an error of at most `1/65278` of the largest of them. Sums of 4 or 8 products are exact; they are scaled
//! and accumulated in f32. Every row is summed by itself, so results do not depend on how the rows are distributed over
//! threads.

/// Activations that share a scale: the length of the smallest blocks of weights.
pub(super) const BLOCK_LEN: usize = 32;
/// The largest integer: both its upper byte and its signed lower byte are 127.
pub(super) const MAX_INTEGER: f32 = 32639.0;
/// The smallest maximum of magnitudes that a scale is computed from, so that its inverse is finite. In blocks below it,
/// activations are off by up to 2^-116.
pub(super) const MIN_ABSMAX: f32 = f32::from_bits((127 - 100) << 23);

/// Unpacks eight six-bit numbers. The lower four lie in `word`; the upper four have their lower four bits in `last` and
/// their upper two bits in the top bits of `word`.
#[inline(always)]
pub(super) fn unpack_6bit(word: u32, last: u32) -> [u32; 2] {
    [word & 0x3f3f_3f3f, last & 0x0f0f_0f0f | (word >> 6 & 0x0303_0303) << 4]
}
