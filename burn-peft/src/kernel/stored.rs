//! A weight as a kernel takes it.

use super::{LinearKernels, tensor};
use crate::packed::Packed;
use burn::tensor::{Int, Tensor, TensorMetadata, backend::Backend, ops::FloatTensor, s};
use std::ops::Range;

/// A matrix `[out, in]` whose rows are floats or packed.
#[derive(Debug, Clone)]
pub enum Stored<B: Backend> {
    /// f32, f16 or bf16.
    Dense(FloatTensor<B>),
    /// GGUF's blocks or NF4.
    Packed(Packed<B>),
}

impl<B: LinearKernels> Stored<B> {
    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => weight.shape().dims(),
            Self::Packed(rows) => rows.shape(),
        }
    }

    /// Some rows one after the other, in the type in which they are stored, or f32 if they are packed.
    pub fn rows(&self, range: Range<usize>) -> Tensor<B, 2> {
        match self {
            Self::Dense(weight) => tensor::<B, 2>(weight.clone()).slice(s![range, ..]),
            Self::Packed(rows) => rows.slice(range).values(),
        }
    }

    /// The rows of the given numbers, as [`Stored::rows`].
    pub fn select(&self, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        match self {
            Self::Dense(weight) => tensor::<B, 2>(weight.clone()).select(0, ids),
            Self::Packed(rows) => rows.select(ids).values(),
        }
    }
}
