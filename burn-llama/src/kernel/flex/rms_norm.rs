//! Root-mean-square normalisation in one pass over each row.

use super::{
    buffer::{contiguous, tensor, to_f32, uninit_vec, values},
    vector_ops::{add, dot, dot3, vectorized},
};
use crate::kernel::RmsNormGradient;
use burn::backend::Flex;
use burn_flex::FlexTensor;
use rayon::prelude::*;

/// The number of rows per task. It is fixed, so that the order in which the gradient of the weight is summed does not
/// depend on the number of threads.
const ROWS_PER_TASK: usize = 32;

pub(super) fn forward(x: FlexTensor, weight: FlexTensor, epsilon: f64) -> FlexTensor {
    let (x, weight) = (contiguous(x), contiguous(weight));
    let shape = x.layout().shape().clone();
    let (x, weight) = (values(&x), to_f32(&weight));
    let width = weight.len();
    // SAFETY: all values are written below, row by row.
    let mut out = unsafe { uninit_vec(x.len()) };
    out.par_chunks_mut(ROWS_PER_TASK * width).zip(x.par_chunks(ROWS_PER_TASK * width)).for_each(|(out, x)| {
        vectorized(
            #[inline(always)]
            || {
                for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                    let r = inverse_rms(x, epsilon);
                    for ((out, &x), &w) in out.iter_mut().zip(x).zip(weight.iter()) {
                        *out = x * r * w;
                    }
                }
            },
        )
    });
    tensor(out, &shape)
}

/// Computes `1 / √(mean(x²) + eps)` of a row.
#[inline(always)]
pub(super) fn inverse_rms(x: &[f32], epsilon: f64) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + epsilon as f32).sqrt()
}

/// Computes the gradients of the input and, if it is trained, of the weight. The first is added to the gradient that
/// was accumulated before, in place if that has no other owner.
pub(super) fn backward(
    x: FlexTensor,
    weight: FlexTensor,
    gradient: RmsNormGradient<Flex>,
) -> (FlexTensor, Option<FlexTensor>) {
    let RmsNormGradient { dy, accumulated, epsilon, weight_trained } = gradient;
    let (x, weight, dy) = (contiguous(x), contiguous(weight), contiguous(dy));
    let shape = x.layout().shape().clone();
    let (x, weight, dy) = (values(&x), to_f32(&weight), values(&dy));
    let (width, accumulates) = (weight.len(), accumulated.is_some());
    // SAFETY: all values are written below, row by row; they are read only if there is an accumulated gradient.
    let mut dx = accumulated.map_or_else(|| tensor(unsafe { uninit_vec(x.len()) }, &shape), contiguous);
    let parts: Vec<Vec<f32>> = dx
        .storage_mut::<f32>()
        .par_chunks_mut(ROWS_PER_TASK * width)
        .zip(x.par_chunks(ROWS_PER_TASK * width))
        .zip(dy.par_chunks(ROWS_PER_TASK * width))
        .map(|((dx, x), dy)| {
            let mut dw = if weight_trained { vec![0.0; width] } else { Vec::new() };
            vectorized(
                #[inline(always)]
                || RowBlock { x, dy, weight: &weight, epsilon }.backward(accumulates, dx, &mut dw),
            );
            dw
        })
        .collect();
    let dw = weight_trained.then(|| {
        let mut sum = vec![0.0; width];
        parts.iter().for_each(|part| add(&mut sum, part));
        tensor(sum, &[width])
    });
    (dx, dw)
}

/// A block of rows with the gradients of their outputs.
struct RowBlock<'a> {
    x: &'a [f32],
    dy: &'a [f32],
    weight: &'a [f32],
    epsilon: f64,
}

impl RowBlock<'_> {
    /// Computes the gradients of the rows, and adds them to `dx` if `accumulates`. The gradient of the weight is added
    /// to `dw`, which is empty if it is not wanted.
    #[inline(always)]
    fn backward(&self, accumulates: bool, dx: &mut [f32], dw: &mut [f32]) {
        let Self { x, dy, weight, epsilon } = *self;
        let width = weight.len();
        for ((dx, x), dy) in dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(dy.chunks_exact(width)) {
            let r = inverse_rms(x, epsilon);
            let back = dot3(dy, weight, x) * r * r / width as f32;
            for (((dx, &x), &dy), &w) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
                let value = r * (dy * w - x * back);
                *dx = if accumulates { *dx + value } else { value };
            }
            for ((dw, &x), &dy) in dw.iter_mut().zip(x).zip(dy) {
                *dw += dy * x * r;
            }
        }
    }
}
