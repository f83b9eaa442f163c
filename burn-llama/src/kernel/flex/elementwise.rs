//! Rotary position embedding and the gated activation (SwiGLU), each in one pass.

use super::{
    buffer::{contiguous, tensor, uninit_vec, values},
    vector_ops::{exp, vectorized},
};
use burn::tensor::{DType, TensorData, bf16};
use burn_flex::FlexTensor;
use rayon::prelude::*;

/// The number of values per task.
const VALUES_PER_TASK: usize = 1 << 14;

/// Applies rotary position embedding, in place if the tensor has no other owner.
pub(super) fn rope(x: FlexTensor, cos: FlexTensor, sin: FlexTensor) -> FlexTensor {
    let (mut x, cos, sin) = (contiguous(x), contiguous(cos), contiguous(sin));
    let [_, heads, dim] = x.layout().shape().dims();
    let (cos, sin, width) = (values(&cos), values(&sin), heads * dim);
    let token = |x: &mut [f32], index: usize| {
        let at = index * (dim / 2)..(index + 1) * (dim / 2);
        let (cos, sin) = (&cos[at.clone()], &sin[at]);
        vectorized(
            #[inline(always)]
            || x.chunks_exact_mut(dim).for_each(|head| rotate_head(head, cos, sin)),
        )
    };
    x.storage_mut::<f32>().par_chunks_mut(width).with_min_len(16).enumerate().for_each(|(index, x)| token(x, index));
    x
}

/// Rotates the halves of one head.
#[inline(always)]
pub(super) fn rotate_head(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

pub(super) fn swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
    let (gate, up) = (contiguous(gate), contiguous(up));
    let shape = gate.layout().shape().clone();
    let (gate, up) = (values(&gate), values(&up));
    // SAFETY: all values are written below.
    let mut out = unsafe { uninit_vec(gate.len()) };
    out.par_chunks_mut(VALUES_PER_TASK)
        .zip(gate.par_chunks(VALUES_PER_TASK))
        .zip(up.par_chunks(VALUES_PER_TASK))
        .for_each(|((out, gate), up)| {
            vectorized(
                #[inline(always)]
                || {
                    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                        *out = gate / (1.0 + exp(-gate)) * up;
                    }
                },
            )
        });
    tensor(out, &shape)
}

/// Rounds to bf16.
pub(super) fn to_bf16(x: FlexTensor) -> FlexTensor {
    let x = contiguous(x);
    let (shape, x) = (x.layout().shape().clone(), values(&x));
    let mut out = Vec::with_capacity(x.len());
    let spare = &mut out.spare_capacity_mut()[..x.len()];
    spare.par_chunks_mut(VALUES_PER_TASK).zip(x.par_chunks(VALUES_PER_TASK)).for_each(|(out, x)| {
        vectorized(
            #[inline(always)]
            || {
                for (out, &x) in out.iter_mut().zip(x) {
                    out.write(bf16::from_bits(bf16_bits(x)));
                }
            },
        )
    });
    // SAFETY: `x.len()` values were reserved, and the zip of equally long chunks above wrote each of them.
    unsafe { out.set_len(x.len()) };
    FlexTensor::from_data(TensorData::new(out, shape))
}

/// Returns the bits of the nearest bf16, ties to even; a NaN stays a NaN.
#[inline(always)]
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { (bits >> 16) as u16 | 0x40 } else { nearest as u16 }
}

#[inline(always)]
fn bf16_to_f32(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Computes the gradients of gate and up, in their place if they are f32 and have no other owner. Both may be bf16
/// instead.
pub(super) fn swiglu_backward(gate: FlexTensor, up: FlexTensor, dy: FlexTensor) -> (FlexTensor, FlexTensor) {
    let (mut gate, mut up, dy) = (contiguous(gate), contiguous(up), contiguous(dy));
    let shape = gate.layout().shape().clone();
    let dy = values(&dy).par_chunks(VALUES_PER_TASK);
    if gate.dtype() == DType::F32 {
        let inputs = gate
            .storage_mut::<f32>()
            .par_chunks_mut(VALUES_PER_TASK)
            .zip(up.storage_mut::<f32>().par_chunks_mut(VALUES_PER_TASK));
        inputs.zip(dy).for_each(|((gate, up), dy)| {
            vectorized(
                #[inline(always)]
                || {
                    gate.iter_mut()
                        .zip(up)
                        .zip(dy)
                        .for_each(|((gate, up), &dy)| (*gate, *up) = swiglu_gradient(*gate, *up, dy))
                },
            )
        });
        return (gate, up);
    }
    let (gate, up) = (gate.storage::<bf16>(), up.storage::<bf16>());
    // SAFETY: all values of both are written below.
    let (mut d_gate, mut d_up) = unsafe { (uninit_vec(gate.len()), uninit_vec(gate.len())) };
    let outputs = d_gate.par_chunks_mut(VALUES_PER_TASK).zip(d_up.par_chunks_mut(VALUES_PER_TASK));
    outputs.zip(gate.par_chunks(VALUES_PER_TASK).zip(up.par_chunks(VALUES_PER_TASK)).zip(dy)).for_each(
        |((d_gate, d_up), ((gate, up), dy))| {
            vectorized(
                #[inline(always)]
                || {
                    let inputs = gate.iter().zip(up).zip(dy);
                    for ((d_gate, d_up), ((&gate, &up), &dy)) in d_gate.iter_mut().zip(d_up).zip(inputs) {
                        (*d_gate, *d_up) = swiglu_gradient(bf16_to_f32(gate), bf16_to_f32(up), dy);
                    }
                },
            )
        },
    );
    (tensor(d_gate, &shape), tensor(d_up, &shape))
}

/// Computes the gradients of one value of gate and of up.
#[inline(always)]
fn swiglu_gradient(gate: f32, up: f32, dy: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + exp(-gate));
    let a = gate * s;
    (dy * up * (s + a * (1.0 - s)), dy * a)
}
