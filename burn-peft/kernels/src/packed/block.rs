//! The block formats of GGUF tensors.
//!
//! A format packs `block_len` consecutive elements of a row into `block_bytes` bytes. The layouts are those of ggml's
//! `block_q*` structures; results equal `gguf.quants.dequantize` bit for bit.

use super::{
    RowCodec, WithRowCodec,
    decode::{self, BlockCodec},
};

/// The storage format of a tensor's elements.
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
    /// 32 elements: `f16` scale, 4-bit integers minus 8.
    Q4_0,
    /// 32 elements: `f16` scale and minimum, 4-bit integers.
    Q4_1,
    /// 32 elements: `f16` scale, 5-bit integers minus 16, with the fifth bits stored separately.
    Q5_0,
    /// 32 elements: `f16` scale and minimum, 5-bit integers, with the fifth bits stored separately.
    Q5_1,
    /// 256 elements in eight groups: 6-bit scales and minima, 4-bit integers.
    Q4_K,
    /// 256 elements in sixteen groups: 8-bit scales, 6-bit integers minus 32.
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

    /// Returns the number of elements in a block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => 32,
            Self::Q4_K | Self::Q6_K => 256,
        }
    }

    /// Returns the number of bytes in a block.
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

    /// Returns the `ggml_type` number of the format.
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

    /// Returns the format with this `ggml_type` number.
    ///
    /// # Errors
    /// Returns the name of any other number, for an error message.
    pub fn from_ggml(number: u32) -> Result<Self, String> {
        Self::ALL.into_iter().find(|kind| kind.ggml() == number).ok_or_else(|| ggml_name(number))
    }

    /// Lists the supported formats, for an error message.
    pub fn supported() -> String {
        let names: Vec<_> = Self::ALL.iter().map(|kind| format!("{kind:?}")).collect();
        format!("a tensor type out of {}", names.join(", "))
    }

    /// Decodes whole blocks to `f32`.
    ///
    /// # Panics
    ///
    /// If `bytes` does not hold exactly the blocks of `out.len()` elements.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        let blocks = bytes.len() / self.block_bytes();
        assert!(
            bytes.len() == blocks * self.block_bytes() && out.len() == blocks * self.block_len(),
            "{self:?}: {} bytes do not make {} elements",
            bytes.len(),
            out.len()
        );
        struct Dequantize<'a>(&'a [u8], &'a mut [f32]);
        impl WithRowCodec for Dequantize<'_> {
            type Output = ();

            fn with_row_codec<R: RowCodec>(self) {
                R::decode(self.0, self.1);
            }
        }
        self.dispatch(Dequantize(bytes, out));
    }

    /// Calls `user` with the row codec of this format as a type.
    pub(super) fn dispatch<U: WithRowCodec>(self, user: U) -> U::Output {
        match self {
            Self::F32 => user.with_row_codec::<BlockCodec<decode::F32, 4, 1>>(),
            Self::F16 => user.with_row_codec::<BlockCodec<decode::F16, 2, 1>>(),
            Self::BF16 => user.with_row_codec::<BlockCodec<decode::BF16, 2, 1>>(),
            Self::Q8_0 => user.with_row_codec::<BlockCodec<decode::Q8_0, 34, 32>>(),
            Self::Q4_0 => user.with_row_codec::<BlockCodec<decode::Q4_0, 18, 32>>(),
            Self::Q4_1 => user.with_row_codec::<BlockCodec<decode::Q4_1, 20, 32>>(),
            Self::Q5_0 => user.with_row_codec::<BlockCodec<decode::Q5_0, 22, 32>>(),
            Self::Q5_1 => user.with_row_codec::<BlockCodec<decode::Q5_1, 24, 32>>(),
            Self::Q4_K => user.with_row_codec::<BlockCodec<decode::Q4_K, 144, 256>>(),
            Self::Q6_K => user.with_row_codec::<BlockCodec<decode::Q6_K, 210, 256>>(),
        }
    }
}

/// Returns the name of a `ggml_type` that is not supported here.
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
    }

    #[test]
    fn numbers_and_formats_are_a_bijection_and_others_are_named() {
        for kind in BlockType::ALL {
            assert_eq!(BlockType::from_ggml(kind.ggml()), Ok(kind));
        }
        assert_eq!(BlockType::from_ggml(13), Err("Q5_K (ggml type 13)".to_owned()));
        assert_eq!(BlockType::from_ggml(77), Err("unknown ggml type 77".to_owned()));
    }
}
