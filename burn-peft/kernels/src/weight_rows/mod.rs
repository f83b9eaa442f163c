//! The rows of a weight as Flex stores them, in any format, and their decoders.

mod float_codec;

use crate::{
    WeightMatrix,
    gemm::{self, Matrix},
    instructions::vectorized,
    packed::{Codec, PackedWeight, RowCodec, WithRowCodec},
    scratch::with_scratch,
};
use burn::{
    backend::Flex,
    tensor::{DType, FloatDType, ops::FloatTensorOps},
};
use burn_flex::FlexTensor;
use rayon::prelude::*;

const _: () = assert!(cfg!(target_endian = "little"), "packed words are read as little-endian bytes");

/// Values in a tile of decoded rows: it stays in the L2 cache while it is multiplied.
const TILE_VALUES: usize = 1 << 18;
/// Values that a task decodes at a time.
pub(crate) const CHUNK_VALUES: usize = 1 << 15;
/// Bytes from the memory that is read to the memory that is prefetched; they cover its latency.
const PREFETCH_BYTES: usize = 1 << 12;

/// The format of a weight row.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RowFormat {
    Floats(DType),
    Packed(Codec),
}

impl RowFormat {
    fn row_bytes(self, features: usize) -> usize {
        match self {
            Self::Floats(dtype) => features * dtype.size(),
            Self::Packed(codec) => codec.row_bytes(features),
        }
    }

    pub(crate) fn dispatch<U: WithRowCodec>(self, user: U) -> U::Output {
        match self {
            Self::Floats(dtype) => float_codec::dispatch(dtype, user),
            Self::Packed(codec) => codec.dispatch(user),
        }
    }
}

/// The rows of a weight as they are stored.
#[derive(Debug)]
pub struct WeightRows {
    storage: FlexTensor,
    pub(crate) format: RowFormat,
    pub(crate) out: usize,
    pub(crate) features: usize,
    /// Bytes from one row to the next.
    stride: usize,
}

impl WeightRows {
    /// Takes the rows of a weight matrix.
    pub fn new(weight: WeightMatrix<Flex>) -> Self {
        match weight {
            WeightMatrix::Dense(weight) => Self::from_floats(weight),
            WeightMatrix::Packed(weight) => Self::from_packed(&weight),
        }
    }

    /// Returns the number of rows and the features of each.
    pub fn shape(&self) -> [usize; 2] {
        [self.out, self.features]
    }

    /// Decodes rows from `first` on, until `out` is full.
    ///
    /// # Panics
    /// If the weight has too few rows.
    pub fn decode(&self, first: usize, out: &mut [f32]) {
        let step = (CHUNK_VALUES / self.features).max(1);
        out.par_chunks_mut(step * self.features).enumerate().for_each(|(chunk, out)| {
            self.format.dispatch(DecodeRows { rows: self.raw_rows(first + chunk * step), out });
        });
    }

    /// Takes the rows of a float weight; f64 is cast to f32.
    pub(crate) fn from_floats(weight: FlexTensor) -> Self {
        let weight = if weight.dtype() == DType::F64 { Flex::float_cast(weight, FloatDType::F32) } else { weight };
        let (storage, format) = (weight.to_contiguous(), RowFormat::Floats(weight.dtype()));
        let [out, features] = storage.layout().shape().dims();
        Self { storage, format, out, features, stride: format.row_bytes(features) }
    }

    /// Takes the rows of a packed weight.
    pub(crate) fn from_packed(weight: &PackedWeight<Flex>) -> Self {
        let storage = weight.words().clone().into_primitive().to_contiguous();
        let ([out, features], [_, words]) = (weight.shape(), weight.words().dims());
        Self { storage, format: RowFormat::Packed(weight.codec()), out, features, stride: words * 4 }
    }

    /// Returns the rows as a matrix if GEMM reads them in place.
    pub(crate) fn as_matrix(&self) -> Option<Matrix<'_>> {
        match self.format {
            RowFormat::Floats(DType::F32) => Some(Matrix::new(self.storage.storage(), [self.out, self.features])),
            RowFormat::Floats(DType::BF16) if gemm::reads_bf16() => {
                Some(Matrix::from_bf16(self.storage.storage(), [self.out, self.features]))
            }
            _ => None,
        }
    }

    /// Returns the stored rows from row `first` on.
    pub(crate) fn raw_rows(&self, first: usize) -> RawRows<'_> {
        let bytes = &self.storage.bytes()[first * self.stride..];
        RawRows { bytes, stride: self.stride, row_len: self.format.row_bytes(self.features), features: self.features }
    }

    /// Calls `work` for every tile with its first row, its decoded values and the number of its rows.
    pub(crate) fn for_each_tile(&self, mut work: impl FnMut(usize, Matrix<'_>, usize)) {
        let step = (TILE_VALUES / self.features).max(1).min(self.out);
        with_scratch(step * self.features, |tile| {
            for first in (0..self.out).step_by(step) {
                let rows = step.min(self.out - first);
                let tile = &mut tile[..rows * self.features];
                self.decode(first, tile);
                work(first, Matrix::new(tile, [rows, self.features]), rows);
            }
        });
    }
}

/// Consecutive weight rows in their stored bytes.
#[derive(Clone, Copy)]
pub(crate) struct RawRows<'a> {
    bytes: &'a [u8],
    /// Bytes from one row to the next.
    stride: usize,
    /// Bytes in a row.
    row_len: usize,
    pub(crate) features: usize,
}

impl<'a> RawRows<'a> {
    /// Returns one row and prefetches the memory beyond it, for rows that are read in order.
    #[inline(always)]
    pub(crate) fn row(&self, index: usize) -> &'a [u8] {
        let row = self.row_unprefetched(index);
        (0..self.row_len).step_by(64).for_each(|line| prefetch(row.as_ptr().wrapping_add(PREFETCH_BYTES + line)));
        row
    }

    /// Returns one row without a prefetch, for callers that prefetch themselves.
    #[inline(always)]
    pub(crate) fn row_unprefetched(&self, index: usize) -> &'a [u8] {
        &self.bytes[index * self.stride..][..self.row_len]
    }
}

/// Prefetches the cache line at an address.
#[inline(always)]
pub(crate) fn prefetch(_line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch accesses no memory and may take any address, and every x86-64 CPU has the instruction (SSE).
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(_line.cast());
    }
}

/// Decodes rows until `out` is full.
struct DecodeRows<'a> {
    rows: RawRows<'a>,
    out: &'a mut [f32],
}

impl WithRowCodec for DecodeRows<'_> {
    type Output = ();

    fn with_row_codec<R: RowCodec>(self) {
        let Self { rows, out } = self;
        vectorized(
            #[inline(always)]
            || {
                for index in 0..out.len() / rows.features {
                    R::decode(rows.row(index), &mut out[index * rows.features..][..rows.features]);
                }
            },
        )
    }
}
