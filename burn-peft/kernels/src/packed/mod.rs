//! Frozen weights in packed form, as small as they are in the file: GGUF blocks and NF4.
//!
//! A row of a weight is a sequence of blocks. Every kernel decodes a few rows at a time into memory that it reuses, so
//! no f32 copy of the weight ever exists. The rows are stored as 32-bit words of an integer tensor: every backend can
//! hold and shift those, and no optimizer or gradient sees them.

mod block;
mod decode;
mod encode;
pub mod nf4;

pub use block::BlockType;

use burn::tensor::{
    DType, Int, Tensor, TensorData,
    backend::{AutodiffBackend, Backend},
    s,
};
use std::ops::Range;

/// The format in which the rows of a weight are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// The blocks of a GGUF file.
    Blocks(BlockType),
    /// The 4-bit NormalFloat of QLoRA: see [`nf4`].
    Nf4,
}

impl From<BlockType> for Codec {
    fn from(kind: BlockType) -> Self {
        Self::Blocks(kind)
    }
}

impl std::fmt::Display for Codec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Blocks(kind) => write!(f, "{kind:?}"),
            Self::Nf4 => f.write_str("NF4"),
        }
    }
}

impl Codec {
    /// Returns the block length; the features of a weight are a multiple of it.
    pub const fn block_len(self) -> usize {
        match self {
            Self::Blocks(kind) => kind.block_len(),
            Self::Nf4 => nf4::BLOCK_SIZE,
        }
    }

    /// Returns the bytes of a row of `features` values.
    pub const fn row_bytes(self, features: usize) -> usize {
        match self {
            Self::Blocks(kind) => features / kind.block_len() * kind.block_bytes(),
            Self::Nf4 => nf4::row_bytes(features),
        }
    }

    /// Decodes one row into `out`, exactly as the format defines it.
    ///
    /// # Panics
    /// If `bytes` is not a row of `out.len()` features.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        struct DecodeRow<'a>(&'a [u8], &'a mut [f32]);
        impl WithRowCodec for DecodeRow<'_> {
            type Output = ();

            fn with_row_codec<R: RowCodec>(self) {
                R::decode(self.0, self.1);
            }
        }
        assert_eq!(bytes.len(), self.row_bytes(out.len()), "{self}: not a row of {} features", out.len());
        self.dispatch(DecodeRow(bytes, out));
    }

    /// Calls `user` with the row codec of this format as a type, so that a loop over many rows is compiled for it.
    pub(crate) fn dispatch<U: WithRowCodec>(self, user: U) -> U::Output {
        match self {
            Self::Blocks(kind) => kind.dispatch(user),
            Self::Nf4 => user.with_row_codec::<nf4::Nf4Codec>(),
        }
    }
}

/// Decoder of the rows of one format.
pub(crate) trait RowCodec {
    /// Decodes a row into `out`.
    fn decode(bytes: &[u8], out: &mut [f32]);

    /// Returns the dot product of a row with `x`.
    fn dot(bytes: &[u8], x: &[f32]) -> f32;
}

/// An operation that is generic over the row codec.
pub(crate) trait WithRowCodec {
    /// The result of the operation.
    type Output;

    /// Runs the operation with a row codec.
    fn with_row_codec<R: RowCodec>(self) -> Self::Output;
}

/// The number of independent accumulators of a dot product: two registers of AVX2, one of AVX-512.
pub(crate) const LANES: usize = 16;

/// Adds the products `aᵢ·bᵢ` to the accumulators in turn.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // As in the decoders.
pub(crate) fn accumulate_dot<const LEN: usize>(sums: &mut [f32; LANES], a: &[f32; LEN], b: &[f32; LEN]) {
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    for chunk in 0..a.len() {
        for lane in 0..LANES {
            sums[lane] += a[chunk][lane] * b[chunk][lane];
        }
    }
    for index in 0..a_rest.len() {
        sums[index] += a_rest[index] * b_rest[index];
    }
}

/// A packed weight `[out, in]`, or some rows of one.
#[derive(Debug, Clone)]
pub struct PackedWeight<B: Backend> {
    codec: Codec,
    features: usize,
    /// `[out, words of a row]`: little-endian, the last word of a row padded with zeros.
    words: Tensor<B, 2, Int>,
}

impl<B: Backend> PackedWeight<B> {
    /// Creates a weight from the bytes of its rows.
    ///
    /// # Panics
    /// If a row does not hold `features` values.
    pub fn new<'a>(
        codec: Codec,
        features: usize,
        rows: impl IntoIterator<Item = &'a [u8]>,
        device: &B::Device,
    ) -> Self {
        assert!(features.is_multiple_of(codec.block_len()), "{codec}: {features} features are not whole blocks");
        let (bytes, mut words, mut out) = (codec.row_bytes(features), Vec::new(), 0);
        for row in rows {
            assert_eq!(row.len(), bytes, "{codec}: a row of {features} features");
            let (whole, rest) = row.as_chunks::<4>();
            words.extend(whole.iter().map(|&word| i32::from_le_bytes(word)));
            if !rest.is_empty() {
                let mut last = [0; 4];
                last[..rest.len()].copy_from_slice(rest);
                words.push(i32::from_le_bytes(last));
            }
            out += 1;
        }
        let data = TensorData::new(words, [out, bytes.div_ceil(4)]);
        Self::from_words(codec, features, Tensor::from_data(data, (device, DType::I32)))
    }

    pub(crate) fn from_words(codec: Codec, features: usize, words: Tensor<B, 2, Int>) -> Self {
        Self { codec, features, words }
    }

    /// Encodes `values [out, features]` as NF4.
    ///
    /// # Errors
    /// Returns the first value that is not finite.
    pub fn nf4(values: &[f32], features: usize, device: &B::Device) -> Result<Self, f32> {
        let bytes = nf4::encode(values, features)?;
        let rows = bytes.chunks_exact(nf4::row_bytes(features).max(1));
        Ok(Self::new(Codec::Nf4, features, rows, device))
    }

    /// Returns the format of the rows.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Returns `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.words.dims()[0], self.features]
    }

    /// Returns the device of the rows.
    pub fn device(&self) -> B::Device {
        self.words.device()
    }

    /// Returns the bytes that the weight occupies.
    pub fn num_bytes(&self) -> usize {
        self.words.dims().iter().product::<usize>() * 4
    }

    /// Returns the words `[out, words of a row]`.
    pub fn words(&self) -> &Tensor<B, 2, Int> {
        &self.words
    }

    /// Creates a weight of the same format and features from other words `[out, words of a row]`, for instance on
    /// another device or backend.
    pub fn with_words<C: Backend>(&self, words: Tensor<C, 2, Int>) -> PackedWeight<C> {
        PackedWeight::from_words(self.codec, self.features, words)
    }

    /// Returns a range of rows.
    pub fn slice(&self, range: Range<usize>) -> Self {
        self.with_words(self.words.clone().slice(s![range, ..]))
    }

    /// Returns the rows with the given indices, in that order.
    pub fn select(&self, ids: Tensor<B, 1, Int>) -> Self {
        self.with_words(self.words.clone().select(0, ids))
    }
}

impl<B: AutodiffBackend> PackedWeight<B> {
    /// Returns the same weight on the backend without gradients.
    pub fn inner(&self) -> PackedWeight<B::InnerBackend> {
        self.with_words(self.words.clone().inner())
    }

    /// Returns the same weight on the backend with gradients.
    pub fn from_inner(inner: PackedWeight<B::InnerBackend>) -> Self {
        PackedWeight::from_words(inner.codec, inner.features, Tensor::from_inner(inner.words))
    }
}
