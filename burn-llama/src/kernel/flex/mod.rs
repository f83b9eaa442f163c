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

use super::{
    AttentionMask, AttentionOutput, CrossEntropyGradients, CrossEntropyInputs, CrossEntropyOptions, F, Kernels, Losses,
    RmsNormGradient, StepDecoder,
};
use crate::Llama;
use burn::{
    backend::Flex,
    tensor::{DType, FloatDType, Slice, ops::FloatTensorOps},
};
use burn_flex::FlexTensor;
use burn_peft_kernels::MatmulPrecision;

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
        gradient: RmsNormGradient<Self>,
    ) -> (FlexTensor, Option<FlexTensor>) {
        if all_f32(&[&x, &gradient.dy]) && gradient.accumulated.iter().all(|accumulated| all_f32(&[accumulated])) {
            return rms_norm::backward(x, weight, gradient);
        }
        super::rms_norm::backward::<Self>(x, weight, gradient)
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

    fn flash_attention(qkv: [F<Self>; 3], mask: &AttentionMask<Self>) -> AttentionOutput<Self> {
        if all_f32(&[&qkv[0], &qkv[1], &qkv[2]]) {
            return attention::forward(qkv, mask);
        }
        super::attention::forward::<Self>(qkv, mask)
    }

    fn flash_attention_backward(
        qkv: [F<Self>; 3],
        mask: &AttentionMask<Self>,
        lse: F<Self>,
        dy: F<Self>,
    ) -> [F<Self>; 3] {
        if all_f32(&[&qkv[0], &qkv[1], &qkv[2], &dy]) {
            return attention::backward(qkv, mask, lse, dy);
        }
        super::attention::backward::<Self>(qkv, mask, lse, dy)
    }

    fn linear_cross_entropy(inputs: CrossEntropyInputs<Self>, options: CrossEntropyOptions) -> Losses<Self> {
        if all_f32(&[&inputs.hidden]) {
            return cross_entropy::forward(inputs, options);
        }
        super::cross_entropy::forward::<Self>(inputs, options)
    }

    fn linear_cross_entropy_backward(
        inputs: CrossEntropyInputs<Self>,
        forward: Losses<Self>,
        dy: F<Self>,
        options: CrossEntropyOptions,
    ) -> CrossEntropyGradients<Self> {
        if all_f32(&[&inputs.hidden]) {
            return cross_entropy::backward(inputs, forward.sum_gradients, dy, options);
        }
        super::cross_entropy::backward::<Self>(inputs, forward.lse, dy, options)
    }
}
