//! Decoders of the block formats to `f32`.
//!
//! They are loops over array indices, because iterators that the compiler does not inline prevent vectorization.
#![allow(clippy::needless_range_loop)]

use super::{LANES, RowCodec, accumulate_dot};
use std::marker::PhantomData;

/// Decoder of one block: a type and not a function, so that the compiler always inlines it.
pub(super) trait BlockDecoder<const BYTES: usize, const LEN: usize> {
    fn decode(bytes: &[u8; BYTES], out: &mut [f32; LEN]);
}

/// Row codec of a block format.
pub(super) struct BlockCodec<D, const BYTES: usize, const LEN: usize>(PhantomData<D>);

impl<D: BlockDecoder<BYTES, LEN>, const BYTES: usize, const LEN: usize> RowCodec for BlockCodec<D, BYTES, LEN> {
    #[inline(always)]
    fn decode(bytes: &[u8], out: &mut [f32]) {
        let (bytes, _) = bytes.as_chunks::<BYTES>();
        let (out, _) = out.as_chunks_mut::<LEN>();
        for index in 0..bytes.len().min(out.len()) {
            D::decode(&bytes[index], &mut out[index]);
        }
    }

    #[inline(always)]
    fn dot(bytes: &[u8], x: &[f32]) -> f32 {
        let (bytes, _) = bytes.as_chunks::<BYTES>();
        let (x, _) = x.as_chunks::<LEN>();
        let mut sums = [0.0; LANES];
        for index in 0..bytes.len().min(x.len()) {
            let mut values = [0.0; LEN];
            D::decode(&bytes[index], &mut values);
            accumulate_dot(&mut sums, &values, &x[index]);
        }
        sums.iter().sum()
    }
}

macro_rules! formats {
    ($($name:ident $bytes:literal $len:literal $decode:ident;)*) => {$(
        #[allow(non_camel_case_types)] // The formats' own names.
        pub(super) struct $name;

        impl BlockDecoder<$bytes, $len> for $name {
            #[inline(always)]
            fn decode(bytes: &[u8; $bytes], out: &mut [f32; $len]) {
                $decode(bytes, out);
            }
        }
    )*};
}

formats! {
    F32 4 1 f32;
    F16 2 1 f16;
    BF16 2 1 bf16;
    Q8_0 34 32 q8_0;
    Q4_0 18 32 q4_0;
    Q4_1 20 32 q4_1;
    Q5_0 22 32 q5_0;
    Q5_1 24 32 q5_1;
    Q4_K 144 256 q4_k;
    Q6_K 210 256 q6_k;
}

#[inline(always)]
fn f32(bytes: &[u8; 4], out: &mut [f32; 1]) {
    out[0] = f32::from_le_bytes(*bytes);
}

#[inline(always)]
fn f16(bytes: &[u8; 2], out: &mut [f32; 1]) {
    out[0] = read_f16(bytes, 0);
}

#[inline(always)]
fn bf16(bytes: &[u8; 2], out: &mut [f32; 1]) {
    out[0] = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
}

/// Converts the f16 at byte `at` to f32 with integer operations. A decoder must be vectorized as a whole, which a call
/// to the CPU's own conversion, selected at run time, would prevent.
#[inline(always)]
fn read_f16(bytes: &[u8], at: usize) -> f32 {
    let half = u32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let (exponent, mantissa) = (half & 0x7c00, half & 0x03ff);
    // 2^112 is the difference of the exponent biases; the product is exact for subnormal numbers too.
    let finite = f32::from_bits((half & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let magnitude = if exponent == 0x7c00 { 0x7f80_0000 | mantissa << 13 } else { finite.to_bits() };
    f32::from_bits(magnitude | (half & 0x8000) << 16)
}

#[inline(always)]
fn q8_0(bytes: &[u8; 34], out: &mut [f32; 32]) {
    let scale = read_f16(bytes, 0);
    for index in 0..32 {
        out[index] = scale * f32::from(bytes[2 + index] as i8);
    }
}

#[inline(always)]
fn q4_0(bytes: &[u8; 18], out: &mut [f32; 32]) {
    let (scale, quants) = (read_f16(bytes, 0), nibbles(&bytes[2..]));
    for index in 0..32 {
        out[index] = scale * (f32::from(quants[index]) - 8.0);
    }
}

#[inline(always)]
fn q4_1(bytes: &[u8; 20], out: &mut [f32; 32]) {
    let (scale, minimum, quants) = (read_f16(bytes, 0), read_f16(bytes, 2), nibbles(&bytes[4..]));
    for index in 0..32 {
        out[index] = scale * f32::from(quants[index]) + minimum;
    }
}

#[inline(always)]
fn q5_0(bytes: &[u8; 22], out: &mut [f32; 32]) {
    let (scale, quants) = (read_f16(bytes, 0), with_fifth_bit(nibbles(&bytes[6..]), &bytes[2..6]));
    for index in 0..32 {
        out[index] = scale * (f32::from(quants[index]) - 16.0);
    }
}

#[inline(always)]
fn q5_1(bytes: &[u8; 24], out: &mut [f32; 32]) {
    let (scale, minimum) = (read_f16(bytes, 0), read_f16(bytes, 2));
    let quants = with_fifth_bit(nibbles(&bytes[8..]), &bytes[4..8]);
    for index in 0..32 {
        out[index] = scale * f32::from(quants[index]) + minimum;
    }
}

/// Adds 16 to each element whose bit in `fifth` is set.
#[inline(always)]
fn with_fifth_bit(mut quants: [u8; 32], fifth: &[u8]) -> [u8; 32] {
    let fifth = u32::from_le_bytes([fifth[0], fifth[1], fifth[2], fifth[3]]);
    for index in 0..32 {
        quants[index] |= ((fifth >> index) as u8 & 1) << 4;
    }
    quants
}

/// Unpacks the 4-bit integers of 16 bytes: the lower halves are the first 16 elements, the upper halves the other 16.
#[inline(always)]
fn nibbles(bytes: &[u8]) -> [u8; 32] {
    // Two separate loops over bytes are vectorized, which a single loop is not.
    let mut quants = [0u8; 32];
    for index in 0..16 {
        quants[index] = bytes[index] & 0x0f;
    }
    for index in 0..16 {
        quants[index + 16] = bytes[index] >> 4;
    }
    quants
}

#[inline(always)]
fn q4_k(bytes: &[u8; 144], out: &mut [f32; 256]) {
    let (scale, minimum) = (read_f16(bytes, 0), read_f16(bytes, 2));
    let (quants, _) = bytes[16..].as_chunks::<32>();
    let (out, _) = out.as_chunks_mut::<32>();
    for group in 0..8 {
        let (six_scale, six_minimum) = q4_k_scale(&bytes[4..16], group);
        let (scale, minimum) = (scale * f32::from(six_scale), minimum * f32::from(six_minimum));
        // 32 bytes hold two groups: their lower halves the even one, their upper halves the odd one.
        let (pair, shift, mut quants) = (&quants[group / 2], group % 2 * 4, [0u8; 32]);
        for index in 0..32 {
            quants[index] = pair[index] >> shift & 0x0f;
        }
        for index in 0..32 {
            out[group][index] = scale * f32::from(quants[index]) - minimum;
        }
    }
}

/// Unpacks the 6-bit scale and minimum of a group from the 12 bytes that hold all eight pairs.
///
/// Groups 0 to 3 use the lower six bits of bytes 0 to 7. Groups 4 to 7 use the 4-bit halves of bytes 8 to 11, and the
/// upper two bits of bytes 0 to 7.
#[inline(always)]
fn q4_k_scale(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let halves = packed[group + 4];
        ((halves & 0x0f) | (packed[group - 4] >> 6 << 4), (halves >> 4) | (packed[group] >> 6 << 4))
    }
}

#[inline(always)]
fn q6_k(bytes: &[u8; 210], out: &mut [f32; 256]) {
    let scale = read_f16(bytes, 208);
    let (out, _) = out.as_chunks_mut::<16>();
    // Each half of the block has 64 bytes of low bits and 32 of high bits; each of its quarters is 32 elements in two
    // groups.
    for part in 0..2 {
        let (low, high) = (&bytes[part * 64..][..64], &bytes[128 + part * 32..][..32]);
        let mut quants = [0u8; 128];
        for i in 0..32 {
            quants[i] = low[i] & 0x0f | (high[i] & 3) << 4;
        }
        for i in 0..32 {
            quants[i + 32] = low[i + 32] & 0x0f | (high[i] >> 2 & 3) << 4;
        }
        for i in 0..32 {
            quants[i + 64] = low[i] >> 4 | (high[i] >> 4 & 3) << 4;
        }
        for i in 0..32 {
            quants[i + 96] = low[i + 32] >> 4 | high[i] >> 6 << 4;
        }
        let (quants, _) = quants.as_chunks::<16>();
        for group in 0..8 {
            let scale = scale * f32::from(bytes[192 + part * 8 + group] as i8);
            for i in 0..16 {
                out[part * 8 + group][i] = scale * (f32::from(quants[group][i]) - 32.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    #[test]
    fn scales_of_six_bits_are_unpacked() {
        // The scale of group 4 has its low bits in byte 8 and its upper two bits in byte 0.
        let packed = [0b1000_0001, 0, 0, 0, 0b0100_0010, 0, 0, 0, 0x5a, 0, 0, 0];
        assert_eq!(q4_k_scale(&packed, 0), (1, 2));
        assert_eq!(q4_k_scale(&packed, 4), (0x2a, 0x15));
    }

    #[test]
    fn every_half_is_widened_as_it_should_be() {
        for bits in 0..=u16::MAX {
            let (found, expected) = (read_f16(&bits.to_le_bytes(), 0), f16::from_bits(bits).to_f32());
            assert!(found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()), "{bits:#x}");
        }
    }
}
