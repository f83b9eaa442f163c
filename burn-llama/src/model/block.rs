//! One block: attention, then the MLP, each added to the stream of hidden states.

use super::RmsNorm;
use crate::{
    Context, Past, Tail,
    kernel::{Kernels, primitive, tensor},
};
use burn::{module::Module, tensor::Tensor};
use burn_peft::{Linear, Pass, kernel::add};

/// Grouped-query attention with rotary positions.
#[derive(Module, Debug)]
pub struct Attention<B: Kernels> {
    /// `[heads · head_dim, hidden]`.
    pub q_proj: Linear<B>,
    /// `[kv_heads · head_dim, hidden]`.
    pub k_proj: Linear<B>,
    /// `[kv_heads · head_dim, hidden]`.
    pub v_proj: Linear<B>,
    /// `[hidden, heads · head_dim]`.
    pub o_proj: Linear<B>,
    /// Normalises every query head (Qwen3).
    pub q_norm: Option<RmsNorm<B>>,
    /// Normalises every key head (Qwen3).
    pub k_norm: Option<RmsNorm<B>>,
    /// Features of a head.
    pub head_dim: usize,
}

/// The gated MLP.
#[derive(Module, Debug)]
pub struct Mlp<B: Kernels> {
    /// `[intermediate, hidden]`.
    pub gate_proj: Linear<B>,
    /// `[intermediate, hidden]`.
    pub up_proj: Linear<B>,
    /// `[hidden, intermediate]`.
    pub down_proj: Linear<B>,
}

/// One block of the transformer.
#[derive(Module, Debug)]
pub struct Layer<B: Kernels> {
    /// Before attention.
    pub input_layernorm: RmsNorm<B>,
    /// Attention.
    pub self_attn: Attention<B>,
    /// Before the MLP.
    pub post_attention_layernorm: RmsNorm<B>,
    /// The MLP.
    pub mlp: Mlp<B>,
}

impl<B: Kernels> Attention<B> {
    /// Normalised hidden states `[tokens, hidden]` → what attention adds, `[tokens, hidden]`, or `[n, hidden]` for a tail of `n`.
    /// With a past, its keys come first and the new ones are added to it.
    fn forward(
        &self,
        x: Tensor<B, 2>,
        context: &Context<B>,
        past: Option<(&mut Past<B>, usize)>,
        (pass, tail): (&Pass, Option<&Tail<B>>),
    ) -> Tensor<B, 2> {
        let q = self.rotated(self.q_proj.forward(x.clone(), pass), self.q_norm.as_ref(), context);
        let k = self.rotated(self.k_proj.forward(x.clone(), pass), self.k_norm.as_ref(), context);
        let v = self.v_proj.forward(x, pass);
        let width = v.dims()[1];
        let v = v.reshape([context.rows, context.length, width / self.head_dim, self.head_dim]);
        let (k, v) = match past {
            None => (k, v),
            Some((past, layer)) => {
                let all = past.push(layer, k, v);
                (all.keys, all.values)
            }
        };
        let width = q.dims()[2] * self.head_dim;
        let (output, _) = B::flash_attention([primitive(q), primitive(k), primitive(v)], &context.visibility);
        let output = tensor::<B, 4>(output).reshape([context.rows * context.length, width]);
        match tail {
            None => self.o_proj.forward(output, pass),
            Some(tail) => self.o_proj.forward(output.select(0, tail.slots.clone()), &tail.pass),
        }
    }

    /// `[tokens, heads · head_dim]` → `[rows, length, heads, head_dim]`, normalised per head if the model does that, and rotated.
    fn rotated(&self, x: Tensor<B, 2>, norm: Option<&RmsNorm<B>>, context: &Context<B>) -> Tensor<B, 4> {
        let ([tokens, width], dim) = (x.dims(), self.head_dim);
        let x = match norm {
            Some(norm) => norm.forward(x.reshape([tokens * (width / dim), dim])),
            None => x,
        };
        let x = x.reshape([tokens, width / dim, dim]);
        let (cos, sin) = (context.cos.clone(), context.sin.clone());
        let x = tensor::<B, 3>(B::rope(primitive(x), primitive(cos), primitive(sin)));
        x.reshape([context.rows, context.length, width / dim, dim])
    }
}

impl<B: Kernels> Layer<B> {
    /// The attention half of the block: `[tokens, hidden]` → `[tokens, hidden]`, or `[n, hidden]` for a tail of `n`.
    pub fn attend(
        &self,
        x: Tensor<B, 2>,
        context: &Context<B>,
        past: Option<(&mut Past<B>, usize)>,
        (pass, tail): (&Pass, Option<&Tail<B>>),
    ) -> Tensor<B, 2> {
        let normed = self.input_layernorm.forward(x.clone());
        let added = self.self_attn.forward(normed, context, past, (pass, tail));
        match tail {
            None => add(added, x),
            Some(tail) => add(added, x.select(0, tail.slots.clone())),
        }
    }

    /// The MLP half of the block: `[n, hidden]` → `[n, hidden]`.
    pub fn transform(&self, x: Tensor<B, 2>, pass: &Pass) -> Tensor<B, 2> {
        let normed = self.post_attention_layernorm.forward(x.clone());
        let gate = self.mlp.gate_proj.forward(normed.clone(), pass);
        let up = self.mlp.up_proj.forward(normed, pass);
        let gated = tensor(B::swiglu(primitive(gate), primitive(up), pass.compute));
        add(self.mlp.down_proj.forward(gated, pass), x)
    }
}
