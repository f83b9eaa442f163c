//! Products of f32 tensors where they lie.

use super::tensor;
use crate::kernel::{
    Compute,
    matrix::{self, Matrix, Output, Threads},
    scratch::unwritten,
};
use burn_flex::FlexTensor;

/// `a·b`, `[m, k]·[k, n]`.
pub(super) fn product(a: Matrix<'_>, b: Matrix<'_>, compute: Compute) -> FlexTensor {
    let shape = [a.shape()[0], b.shape()[1]];
    let mut values = unwritten(shape[0] * shape[1]);
    let to = Output { values: &mut values, stride: shape[1], add: false };
    matrix::product_in(compute, to, a, b, 1.0, Threads::All);
    tensor(values, shape)
}

/// A contiguous tensor as a matrix.
pub(super) fn matrix(tensor: &FlexTensor) -> Matrix<'_> {
    Matrix::new(tensor.storage::<f32>(), tensor.layout().shape().dims())
}

/// Runs `work` on the tensor as a matrix; a view is put in order first unless it is a transposed matrix.
pub(super) fn with_matrix<R>(tensor: &FlexTensor, work: impl FnOnce(Matrix<'_>) -> R) -> R {
    let layout = tensor.layout();
    let turned = layout.transpose(0, 1);
    if !layout.is_contiguous() && turned.is_contiguous() && turned.start_offset() == 0 {
        return work(Matrix::new(tensor.storage::<f32>(), turned.shape().dims()).transposed());
    }
    work(matrix(&tensor.to_contiguous()))
}
