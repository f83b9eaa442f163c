//! The kernels on Flex's buffers: one pass over memory each, vector instructions, all cores.
//!
//! They take f32. Other float types go through the tensor operations of the default bodies.

mod attention;
mod buffer;
mod cross_entropy;
mod elementwise;
mod embedding;
mod lanes;
mod rms_norm;
mod steps;
mod visible;

use super::{F, Kernels, Losses, Steps, Targets, Visibility};
use crate::Llama;
use burn::{
    backend::Flex,
    tensor::{DType, FloatDType, Slice, ops::FloatTensorOps},
};
use burn_flex::FlexTensor;
use burn_peft::kernel::{Compute, Stored};

/// Whether all are f32.
fn plain(tensors: &[&FlexTensor]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype() == DType::F32)
}

impl Kernels for Flex {
    fn steps(model: &Llama<Self>, rows: usize) -> Option<Box<dyn Steps<Self>>> {
        Some(Box::new(steps::Plan::of(model, rows)?))
    }

    fn embed_backward(rows: usize, ids: FlexTensor, dy: FlexTensor) -> FlexTensor {
        if plain(&[&dy]) {
            return embedding::backward(rows, ids, dy);
        }
        super::embed_backward::<Self>(rows, ids, dy)
    }

    fn rms_norm(x: FlexTensor, weight: FlexTensor, epsilon: f64) -> FlexTensor {
        if plain(&[&x]) {
            return rms_norm::forward(x, weight, epsilon);
        }
        super::rms_norm::forward::<Self>(x, weight, epsilon)
    }

    fn rms_norm_backward(
        x: FlexTensor,
        weight: FlexTensor,
        (dy, found): (FlexTensor, Option<FlexTensor>),
        rule: (f64, bool),
    ) -> (FlexTensor, Option<FlexTensor>) {
        if plain(&[&x, &dy]) && found.iter().all(|found| plain(&[found])) {
            return rms_norm::backward([x, weight, dy], found, rule);
        }
        super::rms_norm::backward::<Self>(x, weight, (dy, found), rule)
    }

    fn rope(x: FlexTensor, cos: FlexTensor, sin: FlexTensor) -> FlexTensor {
        if plain(&[&x, &cos, &sin]) {
            elementwise::rope(x, cos, sin)
        } else {
            super::rope::forward::<Self>(x, cos, sin)
        }
    }

    fn put(mut cache: FlexTensor, new: FlexTensor, slot: usize) -> FlexTensor {
        if plain(&[&cache, &new]) && buffer::put(&mut cache, &new, slot) {
            return cache;
        }
        let [rows, n, heads, dim] = new.layout().shape().dims();
        Self::float_slice_assign(cache, &[0..rows, slot..slot + n, 0..heads, 0..dim].map(Slice::from), new)
    }

    fn swiglu(gate: FlexTensor, up: FlexTensor, _: Compute) -> FlexTensor {
        if plain(&[&gate, &up]) { elementwise::swiglu(gate, up) } else { super::swiglu::forward::<Self>(gate, up) }
    }

    fn swiglu_backward(gate: FlexTensor, up: FlexTensor, dy: FlexTensor) -> (FlexTensor, FlexTensor) {
        let halves = [&gate, &up].iter().all(|kept| kept.dtype() == DType::BF16);
        if plain(&[&dy]) && (halves || plain(&[&gate, &up])) {
            return elementwise::swiglu_backward(gate, up, dy);
        }
        super::swiglu::backward::<Self>(gate, up, dy)
    }

    fn halved(x: FlexTensor) -> FlexTensor {
        if plain(&[&x]) { elementwise::halved(x) } else { Self::float_cast(x, FloatDType::BF16) }
    }

    fn flash_attention(qkv: [F<Self>; 3], visibility: &Visibility<Self>) -> (F<Self>, F<Self>) {
        if plain(&[&qkv[0], &qkv[1], &qkv[2]]) {
            return attention::forward(qkv, visibility);
        }
        super::attention::forward::<Self>(qkv, visibility)
    }

    fn flash_attention_backward(qkv: [F<Self>; 3], visibility: &Visibility<Self>, saved: [F<Self>; 2]) -> [F<Self>; 3] {
        if plain(&[&qkv[0], &qkv[1], &qkv[2], &saved[1]]) {
            return attention::backward(qkv, visibility, saved);
        }
        super::attention::backward::<Self>(qkv, visibility, saved)
    }

    fn linear_cross_entropy(
        hidden: F<Self>,
        head: Stored<Self>,
        targets: &Targets<Self>,
        rule: ([bool; 2], Compute),
    ) -> Losses<Self> {
        if plain(&[&hidden]) {
            return cross_entropy::forward(hidden, head, targets, rule);
        }
        super::cross_entropy::forward::<Self>(hidden, head, targets, rule.1)
    }

    fn linear_cross_entropy_backward(
        inputs: (F<Self>, Stored<Self>),
        targets: &Targets<Self>,
        (kept, dy): (Losses<Self>, F<Self>),
        rule: ([bool; 2], Compute),
    ) -> [Option<F<Self>>; 2] {
        if plain(&[&inputs.0]) {
            return cross_entropy::backward(inputs, targets, (kept, dy), rule);
        }
        super::cross_entropy::backward::<Self>(inputs, targets, [kept.lse, dy], rule)
    }
}
