//! Products with weight rows of any format. Many rows of activations are multiplied with tiles of decoded weights
//! (GEMM), few with every stored row ([`gemv`]). Rows of f32, and of bf16 where the kernels read them, are multiplied
//! in place.

use super::{dense, tensor, unique_values_mut};
use crate::{
    MatmulPrecision,
    gemm::{GemmOptions, GemmOutput, Matrix, gemm},
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
    // SAFETY: `decode` writes all rows.
    let mut values = unsafe { uninit_vec(out * features) };
    rows.decode(0, &mut values);
    tensor(values, [out, features])
}

/// Returns `x·Wᵀ [tokens, out]`.
pub(super) fn forward(x: &FlexTensor, rows: &WeightRows, precision: MatmulPrecision) -> FlexTensor {
    let [tokens, features] = x.layout().shape().dims();
    assert_eq!(features, rows.features, "activations have {features} features, the weight takes {}", rows.features);
    let options = GemmOptions::new(precision);
    // SAFETY: each of the three products below overwrites all values.
    let mut y = unsafe { uninit_vec(tokens * rows.out) };
    if tokens <= GEMV_MAX_TOKENS {
        let x = x.to_contiguous();
        gemv::gemv_batch([Gemv { weight: rows, x: x.storage(), y: &mut y }]);
    } else if let Some(weight) = rows.as_matrix() {
        let out = GemmOutput { values: &mut y, stride: rows.out, accumulate: false };
        dense::with_matrix(x, |x| gemm(out, x, weight.transposed(), options));
    } else {
        dense::with_matrix(x, |x| {
            rows.for_each_tile(|first, tile, _| {
                let out = GemmOutput { values: &mut y[first..], stride: rows.out, accumulate: false };
                gemm(out, x, tile.transposed(), options);
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
    precision: MatmulPrecision,
) -> FlexTensor {
    let ([tokens, out], features) = (dy.layout().shape().dims(), rows.features);
    assert_eq!(out, rows.out, "the gradient has {out} outputs, the weight has {}", rows.out);
    let options = GemmOptions::new(precision);
    let product = |values: &mut [f32], accumulate: bool| {
        if let Some(weight) = rows.as_matrix() {
            let out = GemmOutput { values, stride: features, accumulate };
            return dense::with_matrix(dy, |dy| gemm(out, dy, weight, options));
        }
        let dy = dy.to_contiguous();
        if tokens > 0 {
            rows.for_each_tile(|first, tile, count| {
                let out = GemmOutput { values: &mut *values, stride: features, accumulate: accumulate || first > 0 };
                let part = Matrix::strided(&dy.storage::<f32>()[first..], [tokens, count], rows.out);
                gemm(out, part, tile, options);
            });
        }
    };
    let shared = match accumulate_into {
        Some(mut sum) => match unique_values_mut(&mut sum) {
            Some(values) => {
                product(values, true);
                return sum;
            }
            None => Some(sum),
        },
        None => None,
    };
    // SAFETY: the product overwrites all values, the first tile if there are several.
    let mut values = unsafe { uninit_vec(tokens * features) };
    product(&mut values, false);
    add_accumulated::<Flex>(tensor(values, [tokens, features]), shared)
}
