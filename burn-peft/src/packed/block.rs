//! The storage formats of GGUF tensors, and how each becomes `f32`.
//!
//! A format packs `block_len` consecutive elements of a row into `block_bytes` bytes. The layouts are those of
//! ggml's `block_q*` structures; results equal `gguf.quants.dequantize` bit for bit.

use half::bf16;

/// How a tensor's elements are stored.
#[allow(non_camel_case_types)] // The formats' own names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockType {
    /// 32-bit floats.
    F32,
    /// 16-bit IEEE floats.
    F16,
    /// 16-bit brain floats.
    BF16,
    /// 32 elements: `f16` scale, 8-bit signed integers.
    Q8_0,
    /// 32 elements: `f16` scale, 4-bit integers less 8.
    Q4_0,
    /// 32 elements: `f16` scale and minimum, 4-bit integers.
    Q4_1,
    /// 32 elements: `f16` scale, 5-bit integers less 16, the fifth bits apart.
    Q5_0,
    /// 32 elements: `f16` scale and minimum, 5-bit integers, the fifth bits apart.
    Q5_1,
    /// 256 elements in eight groups: 6-bit scales and minima, 4-bit integers.
    Q4_K,
    /// 256 elements in sixteen groups: 8-bit scales, 6-bit integers less 32.
    Q6_K,
}

impl BlockType {
    /// Every supported format.
    pub const ALL: [Self; 10] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4_K,
        Self::Q6_K,
    ];

    /// Elements in a block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => 32,
            Self::Q4_K | Self::Q6_K => 256,
        }
    }

    /// Bytes in a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 2 + 32,
            Self::Q4_0 => 2 + 16,
            Self::Q4_1 => 2 + 2 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 2 + 2 + 4 + 16,
            Self::Q4_K => 2 + 2 + 12 + 128,
            Self::Q6_K => 128 + 64 + 16 + 2,
        }
    }

    /// The `ggml_type` number of the format.
    pub const fn ggml(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q4_K => 12,
            Self::Q6_K => 14,
            Self::BF16 => 30,
        }
    }

    /// The format with this `ggml_type` number; for any other number its name, for a message.
    ///
    /// # Errors
    /// That name.
    pub fn from_ggml(number: u32) -> Result<Self, String> {
        Self::ALL.into_iter().find(|kind| kind.ggml() == number).ok_or_else(|| ggml_name(number))
    }

    /// The supported formats, for a message.
    pub fn supported() -> String {
        let names: Vec<_> = Self::ALL.iter().map(|kind| format!("{kind:?}")).collect();
        format!("a tensor type out of {}", names.join(", "))
    }

    /// Writes the `f32` values of whole blocks.
    ///
    /// # Panics
    ///
    /// If `bytes` does not hold exactly the blocks of `out.len()` elements.
    #[inline(always)]
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        let blocks = bytes.len() / self.block_bytes();
        assert!(
            bytes.len() == blocks * self.block_bytes() && out.len() == blocks * self.block_len(),
            "{self:?}: {} bytes do not make {} elements",
            bytes.len(),
            out.len()
        );
        self.decoded(Dequantize { bytes, out });
    }

    /// Calls `user` with the function that decodes one block.
    #[inline(always)]
    pub(super) fn decoded<U: Decoded>(self, user: U) -> U::Output {
        match self {
            Self::F32 => user.with(|bytes: &[u8; 4], out: &mut [f32; 1]| out[0] = f32::from_le_bytes(*bytes)),
            Self::F16 => user.with(|bytes: &[u8; 2], out: &mut [f32; 1]| out[0] = half_at(bytes, 0)),
            Self::BF16 => {
                user.with(|bytes: &[u8; 2], out: &mut [f32; 1]| out[0] = bf16::from_le_bytes(*bytes).to_f32())
            }
            Self::Q8_0 => user.with(q8_0),
            Self::Q4_0 => user.with(q4_0),
            Self::Q4_1 => user.with(q4_1),
            Self::Q5_0 => user.with(q5_0),
            Self::Q5_1 => user.with(q5_1),
            Self::Q4_K => user.with(q4_k),
            Self::Q6_K => user.with(q6_k),
        }
    }
}

/// What is done with the decoder of a format.
pub(super) trait Decoded {
    /// What comes out.
    type Output;

    /// Does it; a block of `BYTES` bytes holds `LEN` elements.
    fn with<const BYTES: usize, const LEN: usize>(self, decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]))
    -> Self::Output;
}

struct Dequantize<'a> {
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl Decoded for Dequantize<'_> {
    type Output = ();

    #[inline(always)]
    fn with<const BYTES: usize, const LEN: usize>(self, decode: impl Fn(&[u8; BYTES], &mut [f32; LEN])) {
        let (bytes, _) = self.bytes.as_chunks::<BYTES>();
        let (out, _) = self.out.as_chunks_mut::<LEN>();
        for (bytes, out) in bytes.iter().zip(out) {
            decode(bytes, out);
        }
    }
}

/// The half at byte `at`, widened. By integers: a decoder must be vectorized whole, which a call to the machine's own conversion,
/// looked up at run time, prevents.
#[inline(always)]
fn half_at(bytes: &[u8], at: usize) -> f32 {
    let half = u32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let (exponent, mantissa) = (half & 0x7c00, half & 0x03ff);
    // 2^112 is what the exponents' biases differ by; the product is exact for subnormal numbers too.
    let finite = f32::from_bits((half & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let magnitude = if exponent == 0x7c00 { 0x7f80_0000 | mantissa << 13 } else { finite.to_bits() };
    f32::from_bits(magnitude | (half & 0x8000) << 16)
}

#[inline(always)]
fn q8_0(bytes: &[u8; 34], out: &mut [f32; 32]) {
    let scale = half_at(bytes, 0);
    for (value, byte) in out.iter_mut().zip(&bytes[2..]) {
        *value = scale * f32::from(*byte as i8);
    }
}

#[inline(always)]
fn q4_0(bytes: &[u8; 18], out: &mut [f32; 32]) {
    let scale = half_at(bytes, 0);
    nibbles(&bytes[2..], out, |_, low| scale * (f32::from(low) - 8.0));
}

#[inline(always)]
fn q4_1(bytes: &[u8; 20], out: &mut [f32; 32]) {
    let (scale, minimum) = (half_at(bytes, 0), half_at(bytes, 2));
    nibbles(&bytes[4..], out, |_, low| scale * f32::from(low) + minimum);
}

#[inline(always)]
fn q5_0(bytes: &[u8; 22], out: &mut [f32; 32]) {
    let scale = half_at(bytes, 0);
    let fifth = u32::from_le_bytes([bytes[2], bytes[3], bytes[4], bytes[5]]);
    nibbles(&bytes[6..], out, |index, low| scale * (f32::from(low | fifth_bit(fifth, index)) - 16.0));
}

#[inline(always)]
fn q5_1(bytes: &[u8; 24], out: &mut [f32; 32]) {
    let (scale, minimum) = (half_at(bytes, 0), half_at(bytes, 2));
    let fifth = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    nibbles(&bytes[8..], out, |index, low| scale * f32::from(low | fifth_bit(fifth, index)) + minimum);
}

/// Bit `index` of `fifth` as the value 16 or 0.
#[inline(always)]
fn fifth_bit(fifth: u32, index: usize) -> u8 {
    ((fifth >> index) as u8 & 1) << 4
}

/// Low halves of 16 bytes are the first 16 elements, high halves the other 16.
#[inline(always)]
fn nibbles(bytes: &[u8], out: &mut [f32; 32], value: impl Fn(usize, u8) -> f32) {
    let (bytes, _) = bytes.as_chunks::<16>();
    // First all bytes, then all floats: two loops that become vector instructions, which one loop does not.
    let mut quants = [0u8; 32];
    for (quant, byte) in quants.iter_mut().zip(&bytes[0]) {
        *quant = byte & 0x0f;
    }
    for (quant, byte) in quants[16..].iter_mut().zip(&bytes[0]) {
        *quant = byte >> 4;
    }
    for index in 0..32 {
        out[index] = value(index, quants[index]);
    }
}

#[inline(always)]
fn q4_k(bytes: &[u8; 144], out: &mut [f32; 256]) {
    let (scale, minimum) = (half_at(bytes, 0), half_at(bytes, 2));
    let (quants, _) = bytes[16..].as_chunks::<32>();
    let (out, _) = out.as_chunks_mut::<32>();
    for group in 0..8 {
        let (six_scale, six_minimum) = q4_k_scale(&bytes[4..16], group);
        let (scale, minimum) = (scale * f32::from(six_scale), minimum * f32::from(six_minimum));
        // 32 bytes serve two groups: their low halves the even one, their high halves the odd one.
        let pair = &quants[group / 2];
        let quants: [u8; 32] = if group % 2 == 0 { pair.map(|byte| byte & 0x0f) } else { pair.map(|byte| byte >> 4) };
        for index in 0..32 {
            out[group][index] = scale * f32::from(quants[index]) - minimum;
        }
    }
}

/// The 6-bit scale and minimum of a group out of the 12 bytes that hold all eight pairs.
///
/// Groups 0 to 3 use the low six bits of bytes 0 to 7; groups 4 to 7 the halves of bytes 8 to 11, with their upper
/// two bits in what bytes 0 to 7 leave free.
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
    let scale = half_at(bytes, 208);
    let (out, _) = out.as_chunks_mut::<16>();
    // Each half of the block has 64 bytes of low bits and 32 of high bits; a quarter of it is 32 elements in two groups.
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
        for (group, quants) in quants.iter().enumerate() {
            let scale = scale * f32::from(bytes[192 + part * 8 + group] as i8);
            for i in 0..16 {
                out[part * 8 + group][i] = scale * (f32::from(quants[i]) - 32.0);
            }
        }
    }
}

/// The name of a `ggml_type` that is not supported here.
fn ggml_name(number: u32) -> String {
    let name = match number {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        13 => "Q5_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("unknown ggml type {number}"),
    };
    format!("{name} (ggml type {number})")
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    #[test]
    fn blocks_decode_to_values_worked_out_by_hand() {
        let one = f16::from_f32(1.0).to_le_bytes();
        let mut block = one.to_vec();
        block.extend((0..16).map(|index| index | (15 - index) << 4));
        let mut out = [0.0; 32];
        BlockType::Q4_0.dequantize(&block, &mut out);
        assert_eq!((out[0], out[15], out[16], out[31]), (-8.0, 7.0, 7.0, -8.0));

        // Group 4's scale has its low bits in byte 8 and its upper two in byte 0.
        let packed = [0b1000_0001, 0, 0, 0, 0b0100_0010, 0, 0, 0, 0x5a, 0, 0, 0];
        assert_eq!(q4_k_scale(&packed, 0), (1, 2));
        assert_eq!(q4_k_scale(&packed, 4), (0x2a, 0x15));
    }

    #[test]
    fn numbers_and_formats_are_a_bijection_and_others_are_named() {
        for kind in BlockType::ALL {
            assert_eq!(BlockType::from_ggml(kind.ggml()), Ok(kind));
        }
        assert_eq!(BlockType::from_ggml(13), Err("Q5_K (ggml type 13)".to_owned()));
        assert_eq!(BlockType::from_ggml(77), Err("unknown ggml type 77".to_owned()));
    }

    #[test]
    fn every_half_is_widened_as_it_should_be() {
        for bits in 0..=u16::MAX {
            let (found, expected) = (half_at(&bits.to_le_bytes(), 0), f16::from_bits(bits).to_f32());
            assert!(found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()), "{bits:#x}");
        }
    }
}
