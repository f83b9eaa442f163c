//! Root-mean-square normalisation in one pass over every row.

use super::{
    buffer::{contiguous, tensor, unwritten, values, widened},
    lanes::{add, dot, dot3, vectorized},
};
use burn_flex::FlexTensor;
use rayon::prelude::*;

/// Rows that a thread takes at a time; the gradient of the weight is summed in this order whatever the number of threads.
const ROWS: usize = 32;

pub(super) fn forward(x: FlexTensor, weight: FlexTensor, epsilon: f64) -> FlexTensor {
    let (x, weight) = (contiguous(x), contiguous(weight));
    let shape = x.layout().shape().clone();
    let (x, weight) = (values(&x), widened(&weight));
    let (width, mut out) = (weight.len(), unwritten(x.len()));
    out.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width)).for_each(|(out, x)| {
        vectorized(
            #[inline(always)]
            || {
                for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                    let r = inverse(x, epsilon);
                    for ((out, &x), &w) in out.iter_mut().zip(x).zip(weight.iter()) {
                        *out = x * r * w;
                    }
                }
            },
        )
    });
    tensor(out, &shape)
}

/// `1 / √(mean(x²) + eps)` of a row.
#[inline(always)]
pub(super) fn inverse(x: &[f32], epsilon: f64) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + epsilon as f32).sqrt()
}

/// In the place of what was found before, to which it adds, if nobody else holds that.
pub(super) fn backward(
    [x, weight, dy]: [FlexTensor; 3],
    found: Option<FlexTensor>,
    (epsilon, trained): (f64, bool),
) -> (FlexTensor, Option<FlexTensor>) {
    let (x, weight, dy) = (contiguous(x), contiguous(weight), contiguous(dy));
    let shape = x.layout().shape().clone();
    let (x, weight, dy) = (values(&x), widened(&weight), values(&dy));
    let (width, adds) = (weight.len(), found.is_some());
    let mut dx = found.map_or_else(|| tensor(unwritten(x.len()), &shape), contiguous);
    let parts: Vec<Vec<f32>> = dx
        .storage_mut::<f32>()
        .par_chunks_mut(ROWS * width)
        .zip(x.par_chunks(ROWS * width))
        .zip(dy.par_chunks(ROWS * width))
        .map(|((dx, x), dy)| {
            let mut dw = if trained { vec![0.0; width] } else { Vec::new() };
            vectorized(
                #[inline(always)]
                || rows((dx, adds), [x, dy, &weight], epsilon, &mut dw),
            );
            dw
        })
        .collect();
    let dw = trained.then(|| {
        let mut sum = vec![0.0; width];
        parts.iter().for_each(|part| add(&mut sum, part));
        tensor(sum, &[width])
    });
    (dx, dw)
}

/// The gradients of a block of rows; `dw` is empty when nobody asks for it.
#[inline(always)]
fn rows((dx, adds): (&mut [f32], bool), [x, dy, weight]: [&[f32]; 3], epsilon: f64, dw: &mut [f32]) {
    let width = weight.len();
    for ((dx, x), dy) in dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(dy.chunks_exact(width)) {
        let r = inverse(x, epsilon);
        let back = dot3(dy, weight, x) * r * r / width as f32;
        for (((dx, &x), &dy), &w) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
            let value = r * (dy * w - x * back);
            *dx = if adds { *dx + value } else { value };
        }
        for ((dw, &x), &dy) in dw.iter_mut().zip(x).zip(dy) {
            *dw += dy * x * r;
        }
    }
}
