//! The model: embedding, blocks, norm, head.

mod begin;
mod block;
mod init;
mod loss;
mod norm;
mod rows;
#[cfg(feature = "zero")]
mod segments;
mod visit;

pub(crate) use begin::indices;
pub use block::{Attention, Layer, Mlp};
pub use norm::RmsNorm;
pub(crate) use rows::Rows;

use crate::{
    Context, Error, Layout, LlamaConfig, Past, Tail,
    kernel::{self, Kernels, Visibility},
    layout::ints,
};
use burn::{
    module::Module,
    tensor::{DType, Int, Tensor, TensorData, backend::Backend},
};
use burn_peft::{
    Linear, Pass, Prompt, Weight,
    kernel::{Compute, Stored},
};
use std::borrow::Cow;

/// The token table; its path is `model.embed_tokens.weight`.
#[derive(Module, Debug)]
pub struct Embedding<B: Backend> {
    /// `[vocab_size, hidden_size]`.
    pub weight: Weight<B>,
}

/// The transformer without its head.
#[derive(Module, Debug)]
pub struct Decoder<B: Kernels> {
    /// The token table.
    pub embed_tokens: Embedding<B>,
    /// The blocks.
    pub layers: Vec<Layer<B>>,
    /// The last norm.
    pub norm: RmsNorm<B>,
}

/// A causal language model of LLaMA's architecture. Paths and layouts of its parameters are those of the checkpoint.
#[derive(Module, Debug)]
pub struct Llama<B: Kernels> {
    /// The transformer.
    pub model: Decoder<B>,
    /// The head, `None` when it is the embedding.
    pub lm_head: Option<Linear<B>>,
    /// Virtual tokens before every sequence: batches, generation and scores begin with those of the first active one, or a row
    /// with those that it names. [`Llama::hidden`] does not.
    pub prompts: Vec<Prompt<B>>,
    pub(crate) config: LlamaConfig,
    #[module(skip)]
    pub(crate) compute: Compute,
}

impl<B: Kernels> Llama<B> {
    /// The sizes and variants.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The same model, its products with its own weights computed so; norms, attention, adapters and sums stay f32.
    pub fn computing_in(mut self, compute: Compute) -> Self {
        self.compute = compute;
        self
    }

    /// The pass with the model's own precision: the same pass where that is what it says.
    pub(crate) fn in_its_precision<'a>(&self, pass: &'a Pass) -> Cow<'a, Pass> {
        match pass.compute == self.compute {
            true => Cow::Borrowed(pass),
            false => Cow::Owned(Pass { compute: self.compute, ..pass.clone() }),
        }
    }

    /// The device that holds the model.
    pub fn device(&self) -> B::Device {
        self.model.embed_tokens.weight.device()
    }

    /// Token ids `[rows, length]` → embeddings `[rows · length, hidden_size]` in f32.
    pub fn embed(&self, ids: Tensor<B, 2, Int>) -> Tensor<B, 2> {
        let [rows, length] = ids.dims();
        let ids = ids.reshape([rows * length]);
        let chosen = match self.model.embed_tokens.weight.stored() {
            Stored::Dense(table) => kernel::tensor(B::embed(table, ids.into_primitive())),
            packed => packed.select(ids),
        };
        chosen.cast(DType::F32)
    }

    /// Rotations and visibility for the tokens of `layout` after `past`.
    ///
    /// # Errors
    /// If the positions go beyond what the model's rotary frequencies cover.
    pub fn context(&self, layout: &Layout, past: Option<&Past<B>>) -> Result<Context<B>, Error> {
        self.config.rope_scaling.check_length(layout.span())?;
        let (device, config) = (self.device(), &self.config);
        let (frequencies, scale) = config.rope_scaling.frequencies(config.head_dim, config.rope_theta);
        // The angle is rounded to f32 before its cosine, as the reference does.
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
        let (segments, positions) = match past {
            Some(past) => past.with(layout),
            None => (layout.segments.clone(), layout.positions.clone()),
        };
        let ids = |values: Vec<i32>| ints(values, layout.rows, &device);
        let visibility = Visibility {
            query_segments: ids(layout.segments.clone()),
            query_positions: ids(layout.positions.clone()),
            key_segments: ids(segments),
            key_positions: ids(positions),
            window: config.sliding_window,
        };
        Ok(Context { rows: layout.rows, length: layout.length, cos: table(cos), sin: table(sin), visibility })
    }

    /// Embeddings `[rows · length, hidden_size]` → the normalised hidden states of the last block, in the same shape. New keys and
    /// values are added to `past`.
    ///
    /// # Errors
    /// If the positions go beyond what the model's rotary frequencies cover.
    pub fn hidden(
        &self,
        embeddings: Tensor<B, 2>,
        layout: &Layout,
        past: Option<&mut Past<B>>,
        pass: &Pass,
    ) -> Result<Tensor<B, 2>, Error> {
        self.hidden_at(embeddings, layout, past, (pass, None))
    }

    /// [`Llama::hidden`] at the given slots alone, `[n, hidden_size]`: what else the last layer would compute is not.
    pub(crate) fn hidden_at(
        &self,
        embeddings: Tensor<B, 2>,
        layout: &Layout,
        past: Option<&mut Past<B>>,
        (pass, slots): (&Pass, Option<Vec<i32>>),
    ) -> Result<Tensor<B, 2>, Error> {
        let context = self.context(layout, past.as_deref())?;
        let (mut x, mut past, pass) = (embeddings, past, &self.in_its_precision(pass));
        let tail = slots.map(|slots| Tail::new(slots, pass, &self.device()));
        B::at_work(|| {
            for (index, layer) in self.model.layers.iter().enumerate() {
                let (tail, later) = self.at_layer(index, tail.as_ref(), pass);
                x = layer.attend(x, &context, past.as_deref_mut().map(|past| (past, index)), (pass, tail));
                x = layer.transform(x, later);
            }
            if let Some(past) = past {
                past.advance(layout);
            }
            Ok(self.model.norm.forward(x))
        })
    }

    /// The tail as far as a layer knows of it, and the pass over what its MLP sees.
    pub(crate) fn at_layer<'a>(
        &self,
        index: usize,
        tail: Option<&'a Tail<B>>,
        pass: &'a Pass,
    ) -> (Option<&'a Tail<B>>, &'a Pass) {
        let tail = tail.filter(|_| index + 1 == self.model.layers.len());
        (tail, tail.map_or(pass, |tail| &tail.pass))
    }

    /// Normalised hidden states `[n, hidden_size]` → logits `[n, vocab_size]`.
    pub fn head(&self, hidden: Tensor<B, 2>, pass: &Pass) -> Tensor<B, 2> {
        match &self.lm_head {
            Some(head) => head.forward(hidden, &self.in_its_precision(pass)),
            None => self.model.embed_tokens.weight.linear(hidden, self.compute),
        }
    }
}
