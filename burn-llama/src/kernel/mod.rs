//! The fused operations of a transformer block, as a backend extension.
//!
//! The default methods use tensor operations, block by block: attention runs over blocks of queries and keeps only the
//! log-sum-exp, cross-entropy runs over blocks of tokens and of the vocabulary. The implementation for
//! [`Autodiff`](burn::backend::Autodiff) has a hand-written backward pass for each operation, so no tensor of size
//! length × length or tokens × vocabulary outlives an operation on any backend.

mod attention;
mod autodiff;
mod backends;
mod cross_entropy;
#[cfg(feature = "flex")]
mod flex;
mod rms_norm;
mod rope;
mod swiglu;

pub use crate::layout::AttentionMask;
pub use attention::AttentionOutput;
pub use cross_entropy::{CrossEntropyGradients, CrossEntropyInputs, CrossEntropyOptions, Losses, Targets};
pub use rms_norm::RmsNormGradient;

use crate::{KvCache, Llama};
use burn::tensor::{
    FloatDType, Shape, Slice, Tensor, TensorMetadata, TensorPrimitive,
    backend::Backend,
    ops::{FloatTensor, IntTensor},
};
use burn_peft_kernels::{LinearKernels, MatmulPrecision};

/// A float tensor of the backend.
type F<B> = FloatTensor<B>;

fn embed_backward<B: Backend>(rows: usize, ids: IntTensor<B>, dy: F<B>) -> F<B> {
    let [_, features] = dy.shape().dims();
    let zeros = B::float_zeros(Shape::new([rows, features]), &B::float_device(&dy), dy.dtype().into());
    B::float_select_add(zeros, 0, ids, dy)
}

/// The forward and backward operations of the model, in addition to [`LinearKernels`]. A backward method takes the
/// gradient of the output and returns the gradients of the float inputs.
pub trait Kernels: LinearKernels {
    /// Selects the rows `ids [n]` of `table [rows, features]`.
    fn embed(table: F<Self>, ids: IntTensor<Self>) -> F<Self> {
        Self::float_select(table, 0, ids)
    }

    /// Computes the gradient of a table of `rows` rows. It is the largest tensor of many models, so copies should be
    /// avoided.
    fn embed_backward(rows: usize, ids: IntTensor<Self>, dy: F<Self>) -> F<Self> {
        embed_backward::<Self>(rows, ids, dy)
    }

    /// Computes `x / √(mean(x²) + eps) · weight` over the last dimension: `x [n, features]`, `weight [features]`.
    /// (Zhang and Sennrich, 2019, arXiv:1910.07467.)
    fn rms_norm(x: F<Self>, weight: F<Self>, epsilon: f64) -> F<Self> {
        rms_norm::forward::<Self>(x, weight, epsilon)
    }

    /// Computes the gradients of `x` and, if it is trained, of `weight`. The gradient of `x` is added to the one that
    /// other operations have accumulated before, as in [`LinearKernels::linear_backward_input`].
    fn rms_norm_backward(x: F<Self>, weight: F<Self>, gradient: RmsNormGradient<Self>) -> (F<Self>, Option<F<Self>>) {
        rms_norm::backward::<Self>(x, weight, gradient)
    }

    /// Applies rotary position embedding to every head: `x [n, heads, head_dim]`, `cos`, `sin [n, head_dim / 2]`. With
    /// `sin` negated it computes its inverse, which is also its backward. (Su et al., 2021, arXiv:2104.09864, in the
    /// rotate-half form of `transformers`.)
    fn rope(x: F<Self>, cos: F<Self>, sin: F<Self>) -> F<Self> {
        rope::forward::<Self>(x, cos, sin)
    }

    /// Writes new keys or values `[rows, n, kv_heads, head_dim]` into `cache [rows, slots, kv_heads, head_dim]`, from
    /// slot `slot` on; in place if the cache has no other owner.
    fn write_to_cache(cache: F<Self>, new: F<Self>, slot: usize) -> F<Self> {
        let shape = new.shape();
        let [rows, n, heads, dim] = shape.dims();
        Self::float_slice_assign(cache, &[0..rows, slot..slot + n, 0..heads, 0..dim].map(Slice::from), new)
    }

    /// Computes `silu(gate) · up`, element by element. (Shazeer, 2020, arXiv:2002.05202.) `_kept` is the precision of
    /// the matrix products that gave the inputs: if it is bf16, a backward pass may keep the inputs in bf16.
    fn swiglu(gate: F<Self>, up: F<Self>, _kept: MatmulPrecision) -> F<Self> {
        swiglu::forward::<Self>(gate, up)
    }

    /// Rounds `x` to bf16, to be kept for a backward pass.
    fn to_bf16(x: F<Self>) -> F<Self> {
        Self::float_cast(x, FloatDType::BF16)
    }

    /// Computes the gradients of `gate` and `up`, in the type of `dy`.
    fn swiglu_backward(gate: F<Self>, up: F<Self>, dy: F<Self>) -> (F<Self>, F<Self>) {
        swiglu::backward::<Self>(gate, up, dy)
    }

    /// Computes grouped-query softmax attention: `q [rows, queries, heads, head_dim]`, `k` and
    /// `v [rows, keys, kv_heads, head_dim]`, masked by segment and position. The last `queries` keys belong to the
    /// tokens of the queries.
    fn flash_attention(qkv: [F<Self>; 3], mask: &AttentionMask<Self>) -> AttentionOutput<Self> {
        attention::forward::<Self>(qkv, mask)
    }

    /// Computes the gradients of `q`, `k` and `v` from the log-sum-exp `lse` of the forward pass and the gradient `dy`
    /// of its output.
    fn flash_attention_backward(
        qkv: [F<Self>; 3],
        mask: &AttentionMask<Self>,
        lse: F<Self>,
        dy: F<Self>,
    ) -> [F<Self>; 3] {
        attention::backward::<Self>(qkv, mask, lse, dy)
    }

    /// Returns the backend's own decoder for this model and `rows` rows, if it has one that supports the model with its
    /// active adapters.
    fn step_decoder(_model: &Llama<Self>, _rows: usize) -> Option<Box<dyn StepDecoder<Self>>> {
        None
    }

    /// Computes `weight · -log softmax(hidden · headᵀ)[target]` of every token. The gradients that `options` ask for
    /// are those for which a backward pass will follow, so that a backend may compute them in the forward pass.
    fn linear_cross_entropy(inputs: CrossEntropyInputs<Self>, options: CrossEntropyOptions) -> Losses<Self> {
        cross_entropy::forward::<Self>(inputs, options)
    }

    /// Computes the gradients that `options` ask for, from the result of the forward pass and the gradient `dy [n]` of
    /// the losses.
    fn linear_cross_entropy_backward(
        inputs: CrossEntropyInputs<Self>,
        forward: Losses<Self>,
        dy: F<Self>,
        options: CrossEntropyOptions,
    ) -> CrossEntropyGradients<Self> {
        cross_entropy::backward::<Self>(inputs, forward.lse, dy, options)
    }
}

/// A backend's own implementation of decoding, one token per row and step.
pub trait StepDecoder<B: Backend>: std::fmt::Debug {
    /// Runs the model on one more token of every row, at the given positions after those in `cache`. Writes the logits,
    /// `[rows, vocab_size]`, and appends keys and values to `cache`. Returns false, without any change, if it does not
    /// support this cache.
    fn step(&mut self, ids: &[u32], positions: &[usize], cache: &mut KvCache<B>, logits: &mut Vec<f32>) -> bool;
}

/// The default implementations on tensors, for comparison with those of a backend.
#[doc(hidden)]
pub mod portable {
    pub use super::{
        attention::{backward as attention_backward, forward as attention},
        cross_entropy::{backward as cross_entropy_backward, forward as cross_entropy},
        rms_norm::{backward as rms_norm_backward, forward as rms_norm},
        rope::forward as rope,
        swiglu::{backward as swiglu_backward, forward as swiglu},
    };
}

/// Returns the primitive of a tensor.
pub(crate) fn primitive<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> F<B> {
    tensor.into_primitive().tensor()
}

/// Wraps a primitive in a tensor.
pub(crate) fn tensor<B: Backend, const D: usize>(primitive: F<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}
