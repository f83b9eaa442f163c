//! Products with weight rows of any format. Many rows of activations are multiplied with tiles of decoded weights
//! (GEMM), few with every stored row ([gemv]). Rows of f32, and of bf16 where the kernels read them, are multiplied in
//! place.

use super::{
    dense, float_codec,
    gemv::{self, Gemv},
    tensor, to_f32, unique_values_mut,
};
use crate::{
    kernel::{
        MatmulPrecision, WeightMatrix, add_accumulated,
        gemm::{self, GemmOutput, Matrix, Threads, gemm},
        scratch::{uninit_vec, vectorized, with_scratch},
    },
    packed::{Codec, PackedWeight, RowCodec, WithRowCodec},
};
use burn::{backend::Flex, tensor::DType};
use burn_flex::FlexTensor;
use rayon::prelude::*;

const _: () = assert!(cfg!(target_endian = "little"), "packed words are read as little-endian bytes");

/// Up to this many rows of activations use [`gemv`].
const GEMV_MAX_TOKENS: usize = 8;
/// Values in a tile of decoded rows: it stays in the L2 cache while it is multiplied.
const TILE_VALUES: usize = 1 << 18;
/// Values that a task decodes at a time.
pub(super) const CHUNK_VALUES: usize = 1 << 15;
/// Bytes from the memory that is read to the memory that is prefetched; they cover its latency.
const PREFETCH_BYTES: usize = 1 << 12;
/// The format of a weight row.
#[derive(Debug, Clone, Copy)]
pub(super) enum RowFormat {
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

    pub(super) fn dispatch<U: WithRowCodec>(self, user: U) -> U::Output {
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
    pub(super) format: RowFormat,
    pub(super) out: usize,
    pub(super) features: usize,
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
    pub(super) fn from_floats(weight: FlexTensor) -> Self {
        let weight = if weight.dtype() == DType::F64 { to_f32(weight) } else { weight };
        let (stored, kind) = (weight.to_contiguous(), RowFormat::Floats(weight.dtype()));
        let [out, features] = stored.layout().shape().dims();
        Self { storage: stored, format: kind, out, features, stride: kind.row_bytes(features) }
    }

    /// Takes the rows of a packed weight.
    pub(super) fn from_packed(weight: &PackedWeight<Flex>) -> Self {
        let stored = weight.words().clone().into_primitive().to_contiguous();
        let ([out, features], [_, words]) = (weight.shape(), weight.words().dims());
        Self { storage: stored, format: RowFormat::Packed(weight.codec()), out, features, stride: words * 4 }
    }

    /// Decodes all rows, `[out, in]`.
    pub(super) fn unpack(&self) -> FlexTensor {
        let mut values = uninit_vec(self.out * self.features);
        self.decode(0, &mut values);
        tensor(values, [self.out, self.features])
    }

    /// Returns the rows as a matrix if GEMM reads them in place.
    fn as_matrix(&self) -> Option<Matrix<'_>> {
        match self.format {
            RowFormat::Floats(DType::F32) => Some(dense::as_matrix(&self.storage)),
            RowFormat::Floats(DType::BF16) if gemm::reads_bf16() => {
                Some(Matrix::from_bf16(self.storage.storage(), [self.out, self.features]))
            }
            _ => None,
        }
    }

    /// Returns the stored rows from row `first` on.
    pub(super) fn raw_rows(&self, first: usize) -> RawRows<'_> {
        let bytes = &self.storage.bytes()[first * self.stride..];
        RawRows { bytes, stride: self.stride, row_len: self.format.row_bytes(self.features), features: self.features }
    }

    /// Calls `work` for every tile with its first row, its decoded values and the number of its rows.
    fn for_each_tile(&self, mut work: impl FnMut(usize, Matrix<'_>, usize)) {
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
pub(super) struct RawRows<'a> {
    bytes: &'a [u8],
    /// Bytes from one row to the next.
    stride: usize,
    /// Bytes in a row.
    row_len: usize,
    pub(super) features: usize,
}

impl<'a> RawRows<'a> {
    /// Returns one row and prefetches the memory beyond it, for rows that are read in order.
    #[inline(always)]
    pub(super) fn row(&self, index: usize) -> &'a [u8] {
        let row = self.row_unprefetched(index);
        (0..self.row_len).step_by(64).for_each(|line| prefetch(row.as_ptr().wrapping_add(PREFETCH_BYTES + line)));
        row
    }

    /// Returns one row without a prefetch, for callers that prefetch themselves.
    #[inline(always)]
    pub(super) fn row_unprefetched(&self, index: usize) -> &'a [u8] {
        &self.bytes[index * self.stride..][..self.row_len]
    }
}

/// Prefetches the cache line at an address.
#[inline(always)]
pub(super) fn prefetch(_line: *const u8) {
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

/// Returns `x·Wᵀ [tokens, out]`.
pub(super) fn forward(x: &FlexTensor, rows: &WeightRows, compute: MatmulPrecision) -> FlexTensor {
    let [tokens, features] = x.layout().shape().dims();
    assert_eq!(features, rows.features, "activations have {features} features, the weight takes {}", rows.features);
    let mut y = uninit_vec(tokens * rows.out);
    if tokens <= GEMV_MAX_TOKENS {
        let x = x.to_contiguous();
        gemv::gemv_batch([Gemv { weight: rows, x: x.storage(), y: &mut y }]);
    } else if let Some(weight) = rows.as_matrix() {
        let to = GemmOutput { values: &mut y, stride: rows.out, accumulate: false };
        dense::with_matrix(x, |x| gemm(compute, to, x, weight.transposed(), 1.0, Threads::All));
    } else {
        dense::with_matrix(x, |x| {
            rows.for_each_tile(|first, tile, _| {
                let to = GemmOutput { values: &mut y[first..], stride: rows.out, accumulate: false };
                gemm(compute, to, x, tile.transposed(), 1.0, Threads::All);
            });
        });
    }
    tensor(y, [tokens, rows.out])
}

/// Returns `dy·W [tokens, in]`, added to `accumulate_into` if there is one.
pub(super) fn backward_input(
    dy: &FlexTensor,
    rows: &WeightRows,
    accumulate_into: Option<FlexTensor>,
    compute: MatmulPrecision,
) -> FlexTensor {
    let ([tokens, out], features) = (dy.layout().shape().dims(), rows.features);
    assert_eq!(out, rows.out, "the gradient has {out} outputs, the weight has {}", rows.out);
    let product = |values: &mut [f32], add: bool| {
        if let Some(weight) = rows.as_matrix() {
            let to = GemmOutput { values, stride: features, accumulate: add };
            return dense::with_matrix(dy, |dy| gemm(compute, to, dy, weight, 1.0, Threads::All));
        }
        let dy = dy.to_contiguous();
        if tokens > 0 {
            rows.for_each_tile(|first, tile, count| {
                let to = GemmOutput { values: &mut *values, stride: features, accumulate: add || first > 0 };
                let part = Matrix::strided(&dy.storage::<f32>()[first..], [tokens, count], out);
                gemm(compute, to, part, tile, 1.0, Threads::All);
            });
        }
    };
    let mut found = accumulate_into;
    if let Some(values) = found.as_mut().and_then(unique_values_mut) {
        product(values, true);
    } else {
        let mut values = uninit_vec(tokens * features);
        product(&mut values, false);
        let dx = tensor(values, [tokens, features]);
        found = Some(add_accumulated::<Flex>(dx, found));
    }
    found.expect("either branch sets it")
}
