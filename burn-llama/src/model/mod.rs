//! The model: embedding, transformer blocks, final norm, output head.

mod block;
pub(crate) mod build;
mod finite;
mod held;
mod init;
mod linears;
mod loss;
mod norm;
mod row_adapters;
mod virtual_tokens;

pub use block::{Attention, Layer, Mlp};
pub(crate) use block::{BlockOutputs, LayerCache};
pub use held::HeldSegments;
pub use norm::RmsNorm;
pub(crate) use row_adapters::RowAdapters;

use crate::{
    AttentionContext, Error, KvCache, LlamaConfig, OutputSlots, SequenceLayout,
    kernel::{self, AttentionMask, Kernels},
    layout::int_tensor,
};
use burn::{
    module::Module,
    tensor::{DType, Int, Tensor, TensorData},
};
use burn_peft::{Embedding, ForwardContext, Linear, Prompt};
use burn_peft_kernels::{MatmulPrecision, WeightMatrix};
use std::borrow::Cow;

/// The transformer without its head.
#[derive(Module, Debug)]
pub struct Decoder<B: Kernels> {
    /// The token embedding; the path of its weight is `model.embed_tokens.weight`.
    pub embed_tokens: Embedding<B>,
    /// The transformer blocks.
    pub layers: Vec<Layer<B>>,
    /// The final norm.
    pub norm: RmsNorm<B>,
}

/// A causal language model of LLaMA's architecture. Its parameters have the paths and layouts of the checkpoint.
#[derive(Module, Debug)]
pub struct Llama<B: Kernels> {
    /// The transformer.
    pub model: Decoder<B>,
    /// The output head; `None` if it shares the weight of the embedding.
    pub lm_head: Option<Linear<B>>,
    /// The trained prompts. Batches, generation and scores put the virtual tokens of the first active one before every
    /// sequence, or before each row those of the prompt that it names. [`Llama::hidden_states`] does not.
    pub prompts: Vec<Prompt<B>>,
    pub(crate) config: LlamaConfig,
    #[module(skip)]
    pub(crate) matmul_precision: MatmulPrecision,
    #[module(skip)]
    pub(crate) held: HeldSegments,
}

impl<B: Kernels> Llama<B> {
    /// Returns the model's configuration.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Sets the precision of the matrix products with the model's own weights; norms, attention, adapters and
    /// accumulators stay f32.
    pub fn with_matmul_precision(mut self, compute: MatmulPrecision) -> Self {
        self.matmul_precision = compute;
        self
    }

    /// Returns the forward context with the model's precision; borrows it if that is what it has already.
    pub(crate) fn with_model_precision<'a>(&self, forward_context: &'a ForwardContext) -> Cow<'a, ForwardContext> {
        match forward_context.compute == self.matmul_precision {
            true => Cow::Borrowed(forward_context),
            false => Cow::Owned(ForwardContext { compute: self.matmul_precision, ..forward_context.clone() }),
        }
    }

    /// Returns the device that holds the model.
    pub fn device(&self) -> B::Device {
        self.model.embed_tokens.weight.device()
    }

    /// Looks up the embeddings of token ids `[rows, length]`, with the active adapters: `[rows · length, hidden_size]`
    /// in f32.
    pub fn embed(&self, ids: Tensor<B, 2, Int>) -> Tensor<B, 2> {
        self.embed_in(ids, &ForwardContext::default())
    }

    /// Looks up the embeddings of token ids `[rows, length]`, with the adapters of a forward context of these tokens.
    pub(crate) fn embed_in(&self, ids: Tensor<B, 2, Int>, pass: &ForwardContext) -> Tensor<B, 2> {
        let [rows, length] = ids.dims();
        let ids = ids.reshape([rows * length]);
        let chosen = match self.model.embed_tokens.weight.matrix_ref() {
            WeightMatrix::Dense(table) => kernel::tensor(B::embed(table, ids.clone().into_primitive())),
            packed => packed.select(ids.clone()),
        };
        self.model.embed_tokens.adapt(chosen.cast(DType::F32), ids, pass)
    }

    /// Prepares the rotary tables and the attention mask for the tokens of `layout`, which follow those in the KV
    /// cache.
    ///
    /// # Errors
    /// Returns an error if the positions go beyond what the model's rotary frequencies cover.
    pub fn attention_context(
        &self,
        layout: &SequenceLayout,
        cache: Option<&KvCache<B>>,
    ) -> Result<AttentionContext<B>, Error> {
        self.config.rope_scaling.check_length(layout.num_positions())?;
        let (device, config) = (self.device(), &self.config);
        let frequencies = config.rope_scaling.frequencies(config.head_dim, config.rope_theta);
        let scale = config.rope_scaling.attention_factor();
        // The angle is rounded to f32 before its cosine is taken, as `transformers` does.
        let angles = layout.positions.iter().flat_map(|&p| frequencies.iter().map(move |f| (p as f32 * f) as f64));
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for angle in angles {
            cos.push((angle.cos() * scale) as f32);
            sin.push((angle.sin() * scale) as f32);
        }
        let table = |values: Vec<f32>| {
            let data = TensorData::new(values, [layout.positions.len(), frequencies.len()]);
            Tensor::<B, 2>::from_data(data, (&device, DType::F32))
        };
        let (segments, positions) = match cache {
            Some(cache) => cache.key_segments_and_positions(layout),
            None => (layout.segments.clone(), layout.positions.clone()),
        };
        let ids = |values: Vec<i32>| int_tensor(values, layout.rows, &device);
        let attention_mask = AttentionMask {
            query_segments: ids(layout.segments.clone()),
            query_positions: ids(layout.positions.clone()),
            key_segments: ids(segments),
            key_positions: ids(positions),
            window: config.sliding_window,
        };
        Ok(AttentionContext {
            rows: layout.rows,
            length: layout.length,
            cos: table(cos),
            sin: table(sin),
            attention_mask,
        })
    }

    /// Runs the blocks and the final norm on embeddings `[rows · length, hidden_size]` and returns the hidden states,
    /// in the same shape. New keys and values are appended to the KV cache.
    ///
    /// # Errors
    /// Returns an error if the positions go beyond what the model's rotary frequencies cover.
    pub fn hidden_states(
        &self,
        embeddings: Tensor<B, 2>,
        layout: &SequenceLayout,
        cache: Option<&mut KvCache<B>>,
        forward_context: &ForwardContext,
    ) -> Result<Tensor<B, 2>, Error> {
        self.hidden_states_at(embeddings, layout, cache, forward_context, None)
    }

    /// Computes [`Llama::hidden_states`] at the given slots only, `[n, hidden_size]`, or at all; the last layer skips
    /// the other slots.
    pub(crate) fn hidden_states_at(
        &self,
        embeddings: Tensor<B, 2>,
        layout: &SequenceLayout,
        mut cache: Option<&mut KvCache<B>>,
        forward_context: &ForwardContext,
        slots: Option<Vec<i32>>,
    ) -> Result<Tensor<B, 2>, Error> {
        let context = self.attention_context(layout, cache.as_deref())?;
        let (mut x, forward_context) = (embeddings, &self.with_model_precision(forward_context));
        let slots = slots.map(|slots| OutputSlots::new(slots, forward_context, &self.device()));
        B::with_spinning_pool(|| {
            for (index, layer) in self.model.layers.iter().enumerate() {
                let outputs = self.outputs_at_layer(index, slots.as_ref(), forward_context);
                let layer_cache = cache.as_deref_mut().map(|cache| LayerCache { cache, layer: index });
                x = layer.attention_block(x, &context, layer_cache, &outputs);
                x = layer.mlp_block(x, outputs.output_context());
            }
            if let Some(cache) = cache {
                cache.advance(layout);
            }
            Ok(self.model.norm.forward(x))
        })
    }

    /// Returns the outputs of a layer: only the last one computes those of the output slots alone.
    pub(crate) fn outputs_at_layer<'a>(
        &self,
        index: usize,
        slots: Option<&'a OutputSlots<B>>,
        forward_context: &'a ForwardContext,
    ) -> BlockOutputs<'a, B> {
        BlockOutputs { forward_context, slots: slots.filter(|_| index + 1 == self.model.layers.len()) }
    }

    /// Applies the output head to normalised hidden states `[n, hidden_size]` and returns the logits,
    /// `[n, vocab_size]`.
    pub fn head(&self, hidden: Tensor<B, 2>, forward_context: &ForwardContext) -> Tensor<B, 2> {
        let forward_context = self.with_model_precision(forward_context);
        match &self.lm_head {
            Some(head) => head.forward(hidden, &forward_context),
            None => self.model.embed_tokens.tied_head(hidden, &forward_context),
        }
    }
}
