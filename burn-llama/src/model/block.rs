//! The transformer block: attention, then the MLP, each added to the residual stream.

use super::RmsNorm;
use crate::{
    AttentionContext, KvCache, OutputSlots,
    kernel::{Kernels, primitive, tensor},
};
use burn::{module::Module, tensor::Tensor};
use burn_peft::{ForwardContext, Linear};
use burn_peft_kernels::add;

/// Grouped-query attention with rotary position embedding.
#[derive(Module, Debug)]
pub struct Attention<B: Kernels> {
    /// The query projection, `[heads · head_dim, hidden]`.
    pub q_proj: Linear<B>,
    /// The key projection, `[kv_heads · head_dim, hidden]`.
    pub k_proj: Linear<B>,
    /// The value projection, `[kv_heads · head_dim, hidden]`.
    pub v_proj: Linear<B>,
    /// The output projection, `[hidden, heads · head_dim]`.
    pub o_proj: Linear<B>,
    /// The norm of every query head (Qwen3).
    pub q_norm: Option<RmsNorm<B>>,
    /// The norm of every key head (Qwen3).
    pub k_norm: Option<RmsNorm<B>>,
    /// The number of features of a head.
    pub head_dim: usize,
}

/// The gated MLP (SwiGLU).
#[derive(Module, Debug)]
pub struct Mlp<B: Kernels> {
    /// The gate projection, `[intermediate, hidden]`.
    pub gate_proj: Linear<B>,
    /// The up projection, `[intermediate, hidden]`.
    pub up_proj: Linear<B>,
    /// The down projection, `[hidden, intermediate]`.
    pub down_proj: Linear<B>,
}

/// One transformer block.
#[derive(Module, Debug)]
pub struct Layer<B: Kernels> {
    /// The norm before attention.
    pub input_layernorm: RmsNorm<B>,
    /// Attention.
    pub self_attn: Attention<B>,
    /// The norm before the MLP.
    pub post_attention_layernorm: RmsNorm<B>,
    /// The MLP.
    pub mlp: Mlp<B>,
}

impl<B: Kernels> Attention<B> {
    /// Computes attention on normalised hidden states `[tokens, hidden]`. Returns what is added to the residual stream:
    /// `[tokens, hidden]`, or `[n, hidden]` for `n` output slots. New keys and values are appended to the layer of the
    /// KV cache `past`, if there is one.
    fn forward(
        &self,
        x: Tensor<B, 2>,
        context: &AttentionContext<B>,
        past: Option<(&mut KvCache<B>, usize)>,
        (pass, tail): (&ForwardContext, Option<&OutputSlots<B>>),
    ) -> Tensor<B, 2> {
        let q = self.rotated_heads(self.q_proj.forward(x.clone(), pass), self.q_norm.as_ref(), context);
        let k = self.rotated_heads(self.k_proj.forward(x.clone(), pass), self.k_norm.as_ref(), context);
        let v = self.v_proj.forward(x, pass);
        let width = v.dims()[1];
        let v = v.reshape([context.rows, context.length, width / self.head_dim, self.head_dim]);
        let (k, v) = match past {
            None => (k, v),
            Some((past, layer)) => {
                let all = past.append(layer, k, v);
                (all.keys, all.values)
            }
        };
        let width = q.dims()[2] * self.head_dim;
        let (output, _) = B::flash_attention([primitive(q), primitive(k), primitive(v)], &context.attention_mask);
        let output = tensor::<B, 4>(output).reshape([context.rows * context.length, width]);
        match tail {
            None => self.o_proj.forward(output, pass),
            Some(tail) => self.o_proj.forward(output.select(0, tail.slots.clone()), &tail.forward_context),
        }
    }

    /// Splits `[tokens, heads · head_dim]` into heads, `[rows, length, heads, head_dim]`, applies the norm per head if
    /// there is one, and rotates.
    fn rotated_heads(&self, x: Tensor<B, 2>, norm: Option<&RmsNorm<B>>, context: &AttentionContext<B>) -> Tensor<B, 4> {
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
    /// Computes the attention half of the block: `[tokens, hidden]` → `[tokens, hidden]`, or `[n, hidden]` for `n`
    /// output slots.
    pub fn attention_block(
        &self,
        x: Tensor<B, 2>,
        context: &AttentionContext<B>,
        past: Option<(&mut KvCache<B>, usize)>,
        (pass, tail): (&ForwardContext, Option<&OutputSlots<B>>),
    ) -> Tensor<B, 2> {
        let normed = self.input_layernorm.forward(x.clone());
        let added = self.self_attn.forward(normed, context, past, (pass, tail));
        match tail {
            None => add(added, x),
            Some(tail) => add(added, x.select(0, tail.slots.clone())),
        }
    }

    /// Computes the MLP half of the block: `[n, hidden]` → `[n, hidden]`.
    pub fn mlp_block(&self, x: Tensor<B, 2>, pass: &ForwardContext) -> Tensor<B, 2> {
        let normed = self.post_attention_layernorm.forward(x.clone());
        let gate = self.mlp.gate_proj.forward(normed.clone(), pass);
        let up = self.mlp.up_proj.forward(normed, pass);
        let gated = tensor(B::swiglu(primitive(gate), primitive(up), pass.compute));
        add(self.mlp.down_proj.forward(gated, pass), x)
    }
}
