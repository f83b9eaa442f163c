//! A weight matrix in the form in which the kernels take it.

use super::{LinearKernels, tensor};
use crate::PackedWeight;
use burn::tensor::{Int, Tensor, TensorMetadata, backend::Backend, ops::FloatTensor, s};
use std::ops::Range;

/// A weight matrix `[out, in]` whose rows are floats or packed.
#[derive(Debug, Clone)]
pub enum WeightMatrix<B: Backend> {
    /// A float tensor of f32, f16 or bf16.
    Dense(FloatTensor<B>),
    /// Rows packed as GGUF blocks or NF4.
    Packed(PackedWeight<B>),
}

impl<B: LinearKernels> WeightMatrix<B> {
    /// Returns `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => weight.shape().dims(),
            Self::Packed(rows) => rows.shape(),
        }
    }

    /// Returns a range of rows, in the type in which they are stored, or in f32 if they are packed.
    pub fn rows(&self, range: Range<usize>) -> Tensor<B, 2> {
        match self {
            Self::Dense(weight) => tensor::<B, 2>(weight.clone()).slice(s![range, ..]),
            Self::Packed(rows) => rows.slice(range).values(),
        }
    }

    /// Returns the rows with the given indices, in the type that [`WeightMatrix::rows`] returns.
    pub fn select(&self, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        match self {
            Self::Dense(weight) => tensor::<B, 2>(weight.clone()).select(0, ids),
            Self::Packed(rows) => rows.select(ids).values(),
        }
    }
}
