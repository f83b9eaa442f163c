//! Frozen weights that stay as small as they are in the file: GGUF's blocks, and NF4.
//!
//! A row of a weight is a run of blocks; every kernel decodes a few rows at a time into memory that it reuses, so no f32 copy of
//! the weight ever exists. The rows travel as 32-bit words of an integer tensor: every backend can hold and shift those, and no
//! optimizer or gradient sees them.

mod block;
mod encode;
mod expand;
pub mod nf4;

pub use block::BlockType;
pub(crate) use expand::{backward_input, forward, unpack};

use crate::kernel::{self, Compute, LinearKernels};
use burn::tensor::{
    DType, Int, Tensor, TensorData,
    backend::{AutodiffBackend, Backend},
    s,
};
use std::ops::Range;

/// How the rows of a weight are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// As a GGUF file stores them.
    Blocks(BlockType),
    /// As QLoRA stores them: see [`nf4`].
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
    /// What the features of a weight have to be a multiple of.
    pub const fn block_len(self) -> usize {
        match self {
            Self::Blocks(kind) => kind.block_len(),
            Self::Nf4 => nf4::BLOCK,
        }
    }

    /// Bytes of a row of so many features.
    pub const fn row_bytes(self, features: usize) -> usize {
        match self {
            Self::Blocks(kind) => features / kind.block_len() * kind.block_bytes(),
            Self::Nf4 => nf4::row_bytes(features),
        }
    }

    /// Decodes one row into `out`, exactly as the format says.
    ///
    /// # Panics
    /// If the bytes are not those of a row of `out.len()` features.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        struct Row<'a>(&'a [u8], &'a mut [f32]);
        impl RowUser for Row<'_> {
            type Output = ();

            fn with<R: RowCodec>(self) {
                R::decode(self.0, self.1);
            }
        }
        assert_eq!(bytes.len(), self.row_bytes(out.len()), "{self}: {} features are another row", out.len());
        self.rows(Row(bytes, out));
    }

    /// Calls `user` with the codec as a type, so that a loop over many rows is compiled for it.
    pub(crate) fn rows<U: RowUser>(self, user: U) -> U::Output {
        match self {
            Self::Blocks(kind) => kind.rows(user),
            Self::Nf4 => user.with::<nf4::Rows>(),
        }
    }
}

/// What decodes a row.
pub(crate) trait RowCodec {
    /// Decodes a row into `out`.
    fn decode(bytes: &[u8], out: &mut [f32]);

    /// The product of a row with `x`.
    fn dot(bytes: &[u8], x: &[f32]) -> f32;
}

/// What is done with rows.
pub(crate) trait RowUser {
    /// What comes out.
    type Output;

    /// Does it.
    fn with<R: RowCodec>(self) -> Self::Output;
}

/// Independent sums of a product: two registers of AVX2, one of AVX-512.
pub(crate) const LANES: usize = 16;

/// Adds `Σ aᵢ·bᵢ` to the sums, one after the other.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // As in the decoders.
pub(crate) fn accumulate<const LEN: usize>(sums: &mut [f32; LANES], a: &[f32; LEN], b: &[f32; LEN]) {
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

/// A weight `[out, in]` in packed rows, or some rows of one.
#[derive(Debug, Clone)]
pub struct Packed<B: Backend> {
    codec: Codec,
    features: usize,
    /// `[out, words of a row]`: little-endian, the last word of a row filled up with zeros.
    words: Tensor<B, 2, Int>,
}

impl<B: Backend> Packed<B> {
    /// A weight of the given rows of bytes.
    ///
    /// # Panics
    /// If a row does not hold `features` values.
    pub fn new<'a>(
        codec: Codec,
        features: usize,
        rows: impl IntoIterator<Item = &'a [u8]>,
        device: &B::Device,
    ) -> Self {
        assert!(features.is_multiple_of(codec.block_len()), "{codec}: {features} features are no whole blocks");
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
        Self::of(codec, features, Tensor::from_data(data, (device, DType::I32)))
    }

    pub(crate) fn of(codec: Codec, features: usize, words: Tensor<B, 2, Int>) -> Self {
        Self { codec, features, words }
    }

    /// `values [out, features]` as NF4.
    ///
    /// # Errors
    /// The first value that is not finite.
    pub fn nf4(values: &[f32], features: usize, device: &B::Device) -> Result<Self, f32> {
        let bytes = nf4::encode(values, features)?;
        let rows = bytes.chunks_exact(nf4::row_bytes(features).max(1));
        Ok(Self::new(Codec::Nf4, features, rows, device))
    }

    /// How the rows are packed.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.words.dims()[0], self.features]
    }

    /// Where the rows are.
    pub fn device(&self) -> B::Device {
        self.words.device()
    }

    /// The bytes that the weight takes.
    pub fn bytes(&self) -> usize {
        self.words.dims().iter().product::<usize>() * 4
    }

    /// `[out, words of a row]`.
    pub fn words(&self) -> &Tensor<B, 2, Int> {
        &self.words
    }

    /// The same packing over other words.
    pub(crate) fn with<C: Backend>(&self, words: Tensor<C, 2, Int>) -> Packed<C> {
        Packed::of(self.codec, self.features, words)
    }

    /// Some rows one after the other.
    pub fn slice(&self, range: Range<usize>) -> Self {
        self.with(self.words.clone().slice(s![range, ..]))
    }

    /// The rows of the given numbers, in that order.
    pub fn select(&self, ids: Tensor<B, 1, Int>) -> Self {
        self.with(self.words.clone().select(0, ids))
    }
}

impl<B: LinearKernels> Packed<B> {
    /// The values `[out, in]` in f32, for the moment.
    pub fn values(&self) -> Tensor<B, 2> {
        kernel::tensor(B::unpack(self))
    }

    /// `x [tokens, in]` → `x·Wᵀ [tokens, out]`.
    ///
    /// # Panics
    /// If the inner dimensions differ.
    pub fn linear(&self, x: Tensor<B, 2>, compute: Compute) -> Tensor<B, 2> {
        let (features, [out, inner]) = (x.dims()[1], self.shape());
        assert_eq!(features, inner, "activations have {features} features, the weight [{out}, {inner}] takes {inner}");
        kernel::tensor(B::packed_forward(x.into_primitive().tensor(), self, compute))
    }
}

impl<B: AutodiffBackend> Packed<B> {
    /// The same rows on the backend without gradients.
    pub fn inner(&self) -> Packed<B::InnerBackend> {
        self.with(self.words.clone().inner())
    }

    /// The same rows on the backend with gradients.
    pub fn from_inner(inner: Packed<B::InnerBackend>) -> Self {
        Packed::of(inner.codec, inner.features, Tensor::from_inner(inner.words))
    }
}
