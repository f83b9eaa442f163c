//! The transformer block: attention, then the MLP, each added to the residual stream.

use super::RmsNorm;
use crate::{
    AttentionContext, KeyValue, KvCache, OutputSlots,
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

/// One layer of a KV cache.
#[derive(Debug)]
pub(crate) struct LayerCache<'a, B: Kernels> {
    /// The cache.
    pub(crate) cache: &'a mut KvCache<B>,
    /// The index of the layer in the cache.
    pub(crate) layer: usize,
}

/// The slots for which a block computes its output, and how.
#[derive(Debug)]
pub(crate) struct BlockOutputs<'a, B: Kernels> {
    /// The forward context of all slots.
    pub(crate) forward_context: &'a ForwardContext,
    /// The slots whose output is needed; `None` if that of all is.
    pub(crate) slots: Option<&'a OutputSlots<B>>,
}

impl<'a, B: Kernels> BlockOutputs<'a, B> {
    /// Returns the forward context of the slots whose output is needed.
    pub(crate) fn output_context(&self) -> &'a ForwardContext {
        self.slots.map_or(self.forward_context, |slots| &slots.forward_context)
    }

    /// Returns the rows of `x [tokens, features]` that belong to the slots whose output is needed.
    fn select(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match self.slots {
            None => x,
            Some(slots) => x.select(0, slots.slots.clone()),
        }
    }
}

impl<B: Kernels> Attention<B> {
    /// Computes attention on normalised hidden states `[tokens, hidden]`. Returns what is added to the residual stream:
    /// `[tokens, hidden]`, or `[n, hidden]` for `n` output slots. New keys and values are appended to `cache`, if there
    /// is one.
    fn forward(
        &self,
        x: Tensor<B, 2>,
        context: &AttentionContext<B>,
        cache: Option<LayerCache<'_, B>>,
        outputs: &BlockOutputs<'_, B>,
    ) -> Tensor<B, 2> {
        let forward_context = outputs.forward_context;
        let q = self.rotated_heads(self.q_proj.forward(x.clone(), forward_context), self.q_norm.as_ref(), context);
        let k = self.rotated_heads(self.k_proj.forward(x.clone(), forward_context), self.k_norm.as_ref(), context);
        let v = self.v_proj.forward(x, forward_context);
        let width = v.dims()[1];
        let v = v.reshape([context.rows, context.length, width / self.head_dim, self.head_dim]);
        let KeyValue { keys, values } = match cache {
            None => KeyValue { keys: k, values: v },
            Some(LayerCache { cache, layer }) => cache.append(layer, k, v),
        };
        let width = q.dims()[2] * self.head_dim;
        let qkv = [primitive(q), primitive(keys), primitive(values)];
        let output = B::flash_attention(qkv, &context.attention_mask).output;
        let output = tensor::<B, 4>(output).reshape([context.rows * context.length, width]);
        self.o_proj.forward(outputs.select(output), outputs.output_context())
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
    /// output slots. New keys and values are appended to `cache`, if there is one.
    pub(crate) fn attention_block(
        &self,
        x: Tensor<B, 2>,
        context: &AttentionContext<B>,
        cache: Option<LayerCache<'_, B>>,
        outputs: &BlockOutputs<'_, B>,
    ) -> Tensor<B, 2> {
        let normed = self.input_layernorm.forward(x.clone());
        let added = self.self_attn.forward(normed, context, cache, outputs);
        add(added, outputs.select(x))
    }

    /// Computes the MLP half of the block: `[n, hidden]` → `[n, hidden]`. `forward_context` is that of these `n`
    /// tokens.
    pub(crate) fn mlp_block(&self, x: Tensor<B, 2>, forward_context: &ForwardContext) -> Tensor<B, 2> {
        let normed = self.post_attention_layernorm.forward(x.clone());
        let gate = self.mlp.gate_proj.forward(normed.clone(), forward_context);
        let up = self.mlp.up_proj.forward(normed, forward_context);
        let gated = tensor(B::swiglu(primitive(gate), primitive(up), forward_context.compute));
        add(self.mlp.down_proj.forward(gated, forward_context), x)
    }
}
