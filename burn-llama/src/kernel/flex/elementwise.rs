//! Rotary position embedding and the gated activation, each in one pass.

use super::{
    buffer::{contiguous, tensor, unwritten, values},
    lanes::{exp, vectorized},
};
use burn::tensor::{DType, TensorData, bf16};
use burn_flex::FlexTensor;
use rayon::prelude::*;

/// Values that a thread takes at a time.
const BLOCK: usize = 1 << 14;

/// Rotates in place where nobody else holds the tensor.
pub(super) fn rope(x: FlexTensor, cos: FlexTensor, sin: FlexTensor) -> FlexTensor {
    let (mut x, cos, sin) = (contiguous(x), contiguous(cos), contiguous(sin));
    let [_, heads, dim] = x.layout().shape().dims();
    let (cos, sin, width) = (values(&cos), values(&sin), heads * dim);
    let token = |x: &mut [f32], index: usize| {
        let at = index * (dim / 2)..(index + 1) * (dim / 2);
        let (cos, sin) = (&cos[at.clone()], &sin[at]);
        vectorized(
            #[inline(always)]
            || x.chunks_exact_mut(dim).for_each(|head| rotate(head, cos, sin)),
        )
    };
    x.storage_mut::<f32>().par_chunks_mut(width).with_min_len(16).enumerate().for_each(|(index, x)| token(x, index));
    x
}

#[inline(always)]
pub(super) fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

pub(super) fn swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
    let (gate, up) = (contiguous(gate), contiguous(up));
    let shape = gate.layout().shape().clone();
    let (gate, up) = (values(&gate), values(&up));
    let mut out = unwritten(gate.len());
    out.par_chunks_mut(BLOCK).zip(gate.par_chunks(BLOCK)).zip(up.par_chunks(BLOCK)).for_each(|((out, gate), up)| {
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
pub(super) fn halved(x: FlexTensor) -> FlexTensor {
    let x = contiguous(x);
    let (shape, x) = (x.layout().shape().clone(), values(&x));
    let mut out = Vec::with_capacity(x.len());
    let room = &mut out.spare_capacity_mut()[..x.len()];
    room.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(out, x)| {
        vectorized(
            #[inline(always)]
            || {
                for (out, &x) in out.iter_mut().zip(x) {
                    out.write(bf16::from_bits(rounded(x)));
                }
            },
        )
    });
    // SAFETY: every value was written.
    unsafe { out.set_len(x.len()) };
    FlexTensor::from_data(TensorData::new(out, shape))
}

/// The bits of the nearest bf16, ties to even; a NaN stays one.
#[inline(always)]
fn rounded(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { (bits >> 16) as u16 | 0x40 } else { nearest as u16 }
}

#[inline(always)]
fn widened(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Of gate and up in f32, in their place where nobody else holds them, or both in bf16.
pub(super) fn swiglu_backward(gate: FlexTensor, up: FlexTensor, dy: FlexTensor) -> (FlexTensor, FlexTensor) {
    let (mut gate, mut up, dy) = (contiguous(gate), contiguous(up), contiguous(dy));
    let shape = gate.layout().shape().clone();
    let dy = values(&dy).par_chunks(BLOCK);
    if gate.dtype() == DType::F32 {
        let inputs = gate.storage_mut::<f32>().par_chunks_mut(BLOCK).zip(up.storage_mut::<f32>().par_chunks_mut(BLOCK));
        inputs.zip(dy).for_each(|((gate, up), dy)| {
            vectorized(
                #[inline(always)]
                || gate.iter_mut().zip(up).zip(dy).for_each(|((gate, up), &dy)| (*gate, *up) = gated(*gate, *up, dy)),
            )
        });
        return (gate, up);
    }
    let (gate, up) = (gate.storage::<bf16>(), up.storage::<bf16>());
    let (mut d_gate, mut d_up) = (unwritten(gate.len()), unwritten(gate.len()));
    let outputs = d_gate.par_chunks_mut(BLOCK).zip(d_up.par_chunks_mut(BLOCK));
    outputs.zip(gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)).zip(dy)).for_each(
        |((d_gate, d_up), ((gate, up), dy))| {
            vectorized(
                #[inline(always)]
                || {
                    let inputs = gate.iter().zip(up).zip(dy);
                    for ((d_gate, d_up), ((&gate, &up), &dy)) in d_gate.iter_mut().zip(d_up).zip(inputs) {
                        (*d_gate, *d_up) = gated(widened(gate), widened(up), dy);
                    }
                },
            )
        },
    );
    (tensor(d_gate, &shape), tensor(d_up, &shape))
}

/// The gradients of gate and up.
#[inline(always)]
fn gated(gate: f32, up: f32, dy: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + exp(-gate));
    let a = gate * s;
    (dy * up * (s + a * (1.0 - s)), dy * a)
}
