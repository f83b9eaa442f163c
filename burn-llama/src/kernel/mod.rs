//! The fused operations of a transformer block, as a backend extension.
//!
//! Default bodies are tensor operations that stream already: attention runs over blocks of queries and keeps only the
//! log-sum-exp, cross-entropy runs over blocks of tokens and of the vocabulary. The implementation for
//! [`Autodiff`](burn::backend::Autodiff) has a hand-written backward pass for each, so nothing of size length × length or
//! tokens × vocabulary survives an operation on any backend.

mod attention;
mod autodiff;
mod backends;
mod cross_entropy;
#[cfg(feature = "flex")]
mod flex;
mod rms_norm;
mod rope;
mod swiglu;

pub use attention::Visibility;
pub use cross_entropy::{Losses, Targets};

use crate::{Llama, Past};
use burn::tensor::{
    FloatDType, Shape, Slice, Tensor, TensorMetadata, TensorPrimitive,
    backend::Backend,
    ops::{FloatTensor, IntTensor},
};
use burn_peft::kernel::{Compute, LinearKernels, Stored};

/// A float tensor of the backend.
type F<B> = FloatTensor<B>;

fn embed_backward<B: Backend>(rows: usize, ids: IntTensor<B>, dy: F<B>) -> F<B> {
    let [_, features] = dy.shape().dims();
    let zeros = B::float_zeros(Shape::new([rows, features]), &B::float_device(&dy), dy.dtype().into());
    B::float_select_add(zeros, 0, ids, dy)
}

/// The operations that the model is made of, beside [`LinearKernels`]. Forward and backward; the backward methods are given
/// the gradient of the output and return the gradients of the float inputs.
pub trait Kernels: LinearKernels {
    /// The rows `ids [n]` of `table [rows, features]`.
    fn embed(table: F<Self>, ids: IntTensor<Self>) -> F<Self> {
        Self::float_select(table, 0, ids)
    }

    /// The gradient of a table of so many rows. It is the largest tensor of many a model: the fewer copies the better.
    fn embed_backward(rows: usize, ids: IntTensor<Self>, dy: F<Self>) -> F<Self> {
        embed_backward::<Self>(rows, ids, dy)
    }

    /// `x / √(mean(x²) + eps) · weight` over the last dimension: `x [n, features]`, `weight [features]`.
    /// (Zhang and Sennrich, 2019, arXiv:1910.07467.)
    fn rms_norm(x: F<Self>, weight: F<Self>, epsilon: f64) -> F<Self> {
        rms_norm::forward::<Self>(x, weight, epsilon)
    }

    /// The gradients of `x`, added to what others found of it as in [`LinearKernels::linear_backward_input`], and of `weight` if
    /// `trained`.
    fn rms_norm_backward(
        x: F<Self>,
        weight: F<Self>,
        (dy, found): (F<Self>, Option<F<Self>>),
        rule: (f64, bool),
    ) -> (F<Self>, Option<F<Self>>) {
        rms_norm::backward::<Self>(x, weight, (dy, found), rule)
    }

    /// Rotates the halves of every head: `x [n, heads, head_dim]`, `cos`, `sin [n, head_dim / 2]`. With `sin` negated it is its
    /// own inverse and backward. (Su et al., 2021, arXiv:2104.09864, in the rotate-half form of `transformers`.)
    fn rope(x: F<Self>, cos: F<Self>, sin: F<Self>) -> F<Self> {
        rope::forward::<Self>(x, cos, sin)
    }

    /// New keys or values `[rows, n, kv_heads, head_dim]` in the slots of `cache [rows, slots, kv_heads, head_dim]` from `slot` on,
    /// in place where nobody else holds the cache.
    fn put(cache: F<Self>, new: F<Self>, slot: usize) -> F<Self> {
        let shape = new.shape();
        let [rows, n, heads, dim] = shape.dims();
        Self::float_slice_assign(cache, &[0..rows, slot..slot + n, 0..heads, 0..dim].map(Slice::from), new)
    }

    /// `silu(gate) · up`, element by element. (Shazeer, 2020, arXiv:2002.05202.) In bf16, which products of bf16 gave it, a
    /// backward pass may keep its inputs.
    fn swiglu(gate: F<Self>, up: F<Self>, _kept: Compute) -> F<Self> {
        swiglu::forward::<Self>(gate, up)
    }

    /// In bf16, to be kept for a backward pass.
    fn halved(x: F<Self>) -> F<Self> {
        Self::float_cast(x, FloatDType::BF16)
    }

    /// The gradients of `gate` and `up`, in the type of `dy`.
    fn swiglu_backward(gate: F<Self>, up: F<Self>, dy: F<Self>) -> (F<Self>, F<Self>) {
        swiglu::backward::<Self>(gate, up, dy)
    }

    /// Softmax attention of grouped heads: `q [rows, queries, heads, head_dim]`, `k` and `v [rows, keys, kv_heads, head_dim]`,
    /// visibility by segment and position. Returns the output in the shape of `q` and the log-sum-exp of the scores
    /// `[rows, kv_heads, heads / kv_heads, queries]`, both 0 for a query that sees nothing. The last `queries` keys belong to the
    /// queries themselves.
    fn flash_attention(qkv: [F<Self>; 3], visibility: &Visibility<Self>) -> (F<Self>, F<Self>) {
        attention::forward::<Self>(qkv, visibility)
    }

    /// The gradients of `q`, `k` and `v`, from the log-sum-exp and the gradient of the output.
    fn flash_attention_backward(qkv: [F<Self>; 3], visibility: &Visibility<Self>, saved: [F<Self>; 2]) -> [F<Self>; 3] {
        attention::backward::<Self>(qkv, visibility, saved)
    }

    /// A way of its own to generate, one token after the other of so many rows, if the backend has one that serves this model with
    /// what is active on it.
    fn steps(_model: &Llama<Self>, _rows: usize) -> Option<Box<dyn Steps<Self>>> {
        None
    }

    /// Per token, `weight · -log softmax(hidden · headᵀ)[target]`: `hidden [n, features]`, `head [vocabulary, features]`.
    /// A packed head is never trained. `wanted` says for which of the two a backward pass will follow, so that a backend may make
    /// gradients on the way; the products with the head are computed as told.
    fn linear_cross_entropy(
        hidden: F<Self>,
        head: Stored<Self>,
        targets: &Targets<Self>,
        (_wanted, compute): ([bool; 2], Compute),
    ) -> Losses<Self> {
        cross_entropy::forward::<Self>(hidden, head, targets, compute)
    }

    /// The gradients of `hidden` and `head` as far as they are `wanted`, from what the forward pass gave and the gradient
    /// `dy [n]` of the losses.
    fn linear_cross_entropy_backward(
        inputs: (F<Self>, Stored<Self>),
        targets: &Targets<Self>,
        (kept, dy): (Losses<Self>, F<Self>),
        rule: ([bool; 2], Compute),
    ) -> [Option<F<Self>>; 2] {
        cross_entropy::backward::<Self>(inputs, targets, [kept.lse, dy], rule)
    }
}

/// Generation of one token after the other by a backend that has a way of its own for it.
pub trait Steps<B: Backend>: std::fmt::Debug {
    /// The logits `[rows, vocab_size]` of one more token of every row, at the given positions after what `past` has; its keys and
    /// values are added to `past`. `false` if this past is not for it: then nothing has happened.
    fn step(&mut self, ids: &[u32], positions: &[usize], past: &mut Past<B>, logits: &mut Vec<f32>) -> bool;
}

/// The default bodies, to be measured beside a backend's own.
#[doc(hidden)]
pub mod by_tensors {
    pub use super::{
        attention::{backward as attention_backward, forward as attention},
        cross_entropy::{backward as cross_entropy_backward, forward as cross_entropy},
        rms_norm::{backward as rms_norm_backward, forward as rms_norm},
        rope::forward as rope,
        swiglu::{backward as swiglu_backward, forward as swiglu},
    };
}

/// The primitive of a tensor.
pub(crate) fn primitive<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> F<B> {
    tensor.into_primitive().tensor()
}

/// The tensor of a primitive.
pub(crate) fn tensor<B: Backend, const D: usize>(primitive: F<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}
