//! Products with weight rows of any format. Many rows of activations are multiplied with tiles of decoded weights
//! (GEMM), few with every stored row ([`gemv`]). Rows of f32, and of bf16 where the kernels read them, are multiplied in
//! place.

use super::{dense, tensor, unique_values_mut};
use crate::{
    MatmulPrecision,
    gemm::{GemmOutput, Matrix, Threads, gemm},
    gemv::{self, Gemv},
    linear_kernels::add_accumulated,
    scratch::uninit_vec,
    weight_rows::WeightRows,
};
use burn::backend::Flex;
use burn_flex::FlexTensor;

/// Up to this many rows of activations use [`gemv`].
const GEMV_MAX_TOKENS: usize = 8;

/// Decodes all rows, `[out, in]`.
pub(super) fn unpack(rows: &WeightRows) -> FlexTensor {
    let [out, features] = rows.shape();
    let mut values = uninit_vec(out * features);
    rows.decode(0, &mut values);
    tensor(values, [out, features])
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
