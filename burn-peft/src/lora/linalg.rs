//! Linear algebra on rows of f64, shared by the initializations.

use burn::tensor::{Tensor, backend::Backend};

/// Two factors of a matrix of rank `r`.
pub(crate) struct Factors<B: Backend> {
    /// `A [r, in]`.
    pub a: Tensor<B, 2>,
    /// `B [out, r]`.
    pub b: Tensor<B, 2>,
}

/// Makes the rows orthonormal by the Gram-Schmidt process, with a second pass against rounding errors.
pub(super) fn orthonormalise(rows: &mut [Vec<f64>]) {
    for row in 0..rows.len() {
        let (before, rest) = rows.split_at_mut(row);
        let row = &mut rest[0];
        for _ in 0..2 {
            for other in before.iter() {
                let share = dot(row, other);
                row.iter_mut().zip(other).for_each(|(x, y)| *x -= share * y);
            }
        }
        let length = dot(row, row).sqrt();
        // A row that depends linearly on the rows before it becomes zero.
        let inverse = if length > 1e-30 { 1.0 / length } else { 0.0 };
        row.iter_mut().for_each(|x| *x *= inverse);
    }
}

/// Computes `Σ xᵢ·yᵢ` in eight independent accumulators, because a single chain of additions is bound by their latency.
pub(super) fn dot(x: &[f64], y: &[f64]) -> f64 {
    let ((x, x_rest), (y, y_rest), mut sums) = (x.as_chunks::<8>(), y.as_chunks::<8>(), [0.0; 8]);
    for (x, y) in x.iter().zip(y) {
        for lane in 0..8 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f64>() + x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum::<f64>()
}
