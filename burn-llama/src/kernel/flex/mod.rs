//! The kernels for the Flex backend: each makes one pass over memory, with vector instructions and on all cores.
//!
//! They support f32. Other float types use the tensor operations of the default methods.

mod attention;
mod buffer;
mod cross_entropy;
mod decode;
mod elementwise;
mod embedding;
mod key_ranges;
mod rms_norm;
mod vector_ops;

use super::{AttentionMask, F, Kernels, Losses, StepDecoder, Targets};
use crate::Llama;
use burn::{
    backend::Flex,
    tensor::{DType, FloatDType, Slice, ops::FloatTensorOps},
};
use burn_flex::FlexTensor;
use burn_peft_kernels::{MatmulPrecision, WeightMatrix};

/// Returns true if all tensors are f32.
fn all_f32(tensors: &[&FlexTensor]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype() == DType::F32)
}

impl Kernels for Flex {
    fn step_decoder(model: &Llama<Self>, rows: usize) -> Option<Box<dyn StepDecoder<Self>>> {
        Some(Box::new(decode::FlexDecoder::of(model, rows)?))
    }

    fn embed_backward(rows: usize, ids: FlexTensor, dy: FlexTensor) -> FlexTensor {
        if all_f32(&[&dy]) {
            return embedding::backward(rows, ids, dy);
        }
        super::embed_backward::<Self>(rows, ids, dy)
    }

    fn rms_norm(x: FlexTensor, weight: FlexTensor, epsilon: f64) -> FlexTensor {
        if all_f32(&[&x]) {
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
        if all_f32(&[&x, &dy]) && found.iter().all(|found| all_f32(&[found])) {
            return rms_norm::backward([x, weight, dy], found, rule);
        }
        super::rms_norm::backward::<Self>(x, weight, (dy, found), rule)
    }

    fn rope(x: FlexTensor, cos: FlexTensor, sin: FlexTensor) -> FlexTensor {
        if all_f32(&[&x, &cos, &sin]) {
            elementwise::rope(x, cos, sin)
        } else {
            super::rope::forward::<Self>(x, cos, sin)
        }
    }

    fn write_to_cache(mut cache: FlexTensor, new: FlexTensor, slot: usize) -> FlexTensor {
        if all_f32(&[&cache, &new]) && buffer::write_to_cache(&mut cache, &new, slot) {
            return cache;
        }
        let [rows, n, heads, dim] = new.layout().shape().dims();
        Self::float_slice_assign(cache, &[0..rows, slot..slot + n, 0..heads, 0..dim].map(Slice::from), new)
    }

    fn swiglu(gate: FlexTensor, up: FlexTensor, _: MatmulPrecision) -> FlexTensor {
        if all_f32(&[&gate, &up]) { elementwise::swiglu(gate, up) } else { super::swiglu::forward::<Self>(gate, up) }
    }

    fn swiglu_backward(gate: FlexTensor, up: FlexTensor, dy: FlexTensor) -> (FlexTensor, FlexTensor) {
        let halves = [&gate, &up].iter().all(|kept| kept.dtype() == DType::BF16);
        if all_f32(&[&dy]) && (halves || all_f32(&[&gate, &up])) {
            return elementwise::swiglu_backward(gate, up, dy);
        }
        super::swiglu::backward::<Self>(gate, up, dy)
    }

    fn to_bf16(x: FlexTensor) -> FlexTensor {
        if all_f32(&[&x]) { elementwise::to_bf16(x) } else { Self::float_cast(x, FloatDType::BF16) }
    }

    fn flash_attention(qkv: [F<Self>; 3], visibility: &AttentionMask<Self>) -> (F<Self>, F<Self>) {
        if all_f32(&[&qkv[0], &qkv[1], &qkv[2]]) {
            return attention::forward(qkv, visibility);
        }
        super::attention::forward::<Self>(qkv, visibility)
    }

    fn flash_attention_backward(
        qkv: [F<Self>; 3],
        visibility: &AttentionMask<Self>,
        saved: [F<Self>; 2],
    ) -> [F<Self>; 3] {
        if all_f32(&[&qkv[0], &qkv[1], &qkv[2], &saved[1]]) {
            return attention::backward(qkv, visibility, saved);
        }
        super::attention::backward::<Self>(qkv, visibility, saved)
    }

    fn linear_cross_entropy(
        hidden: F<Self>,
        head: WeightMatrix<Self>,
        targets: &Targets<Self>,
        rule: ([bool; 2], MatmulPrecision),
    ) -> Losses<Self> {
        if all_f32(&[&hidden]) {
            return cross_entropy::forward(hidden, head, targets, rule);
        }
        super::cross_entropy::forward::<Self>(hidden, head, targets, rule.1)
    }

    fn linear_cross_entropy_backward(
        inputs: (F<Self>, WeightMatrix<Self>),
        targets: &Targets<Self>,
        (kept, dy): (Losses<Self>, F<Self>),
        rule: ([bool; 2], MatmulPrecision),
    ) -> [Option<F<Self>>; 2] {
        if all_f32(&[&inputs.0]) {
            return cross_entropy::backward(inputs, targets, (kept, dy), rule);
        }
        super::cross_entropy::backward::<Self>(inputs, targets, [kept.lse, dy], rule)
    }
}
