//! Products of f32 tensors in place.

use super::tensor;
use crate::{
    MatmulPrecision,
    gemm::{GemmOptions, GemmOutput, Matrix, gemm},
    scratch::uninit_vec,
};
use burn_flex::FlexTensor;

/// Returns `a·b`, `[m, k]·[k, n]`.
pub(super) fn matmul(a: Matrix<'_>, b: Matrix<'_>, precision: MatmulPrecision) -> FlexTensor {
    let shape = [a.shape()[0], b.shape()[1]];
    // SAFETY: the product overwrites all values.
    let mut values = unsafe { uninit_vec(shape[0] * shape[1]) };
    let out = GemmOutput { values: &mut values, stride: shape[1], accumulate: false };
    gemm(out, a, b, GemmOptions::new(precision));
    tensor(values, shape)
}

/// Returns a contiguous tensor as a matrix.
pub(super) fn as_matrix(tensor: &FlexTensor) -> Matrix<'_> {
    Matrix::new(tensor.storage::<f32>(), tensor.layout().shape().dims())
}

/// Calls `work` with the tensor as a matrix. A view is copied to contiguous memory first, unless it is a transposed
/// matrix.
pub(super) fn with_matrix<R>(tensor: &FlexTensor, work: impl FnOnce(Matrix<'_>) -> R) -> R {
    let layout = tensor.layout();
    let turned = layout.transpose(0, 1);
    if !layout.is_contiguous() && turned.is_contiguous() && turned.start_offset() == 0 {
        return work(Matrix::new(tensor.storage::<f32>(), turned.shape().dims()).transposed());
    }
    work(as_matrix(&tensor.to_contiguous()))
}
