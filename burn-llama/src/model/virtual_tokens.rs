//! Virtual tokens of trained prompts before the tokens of a batch.

use super::{Llama, RowAdapters};
use crate::{
    Error, KvCache, LlamaConfig, SequenceLayout,
    kernel::Kernels,
    layout::{VirtualTokenLayout, index_tensor, int_tensor},
};
use burn::tensor::{Int, Tensor};
use burn_peft::{
    ForwardContext, Prompt, PromptConfig, param,
    prompt::{BaseShape, Injection},
};
use std::ops::Range;

/// The layout of a batch with the virtual tokens of its rows.
pub(crate) struct PromptedLayout {
    /// The layout, with positions after the virtual tokens, and with slots for virtual tokens that are embeddings.
    pub layout: SequenceLayout,
    /// The index of each slot's embedding in the embeddings of the tokens, followed by those of the virtual tokens.
    /// `None` if no slots were added.
    pub embedding_sources: Option<Vec<i32>>,
    /// The virtual tokens at the start of each row's KV cache, as a range of those of all prompts.
    pub prefix_ranges: Vec<Range<usize>>,
}

impl PromptedLayout {
    /// Returns the new slot of each token, indexed by its old slot.
    pub(crate) fn new_slots(&self, slots: usize) -> Vec<i32> {
        let mut places: Vec<i32> = (0..slots as i32).collect();
        for (new, &old) in self.embedding_sources.iter().flatten().enumerate() {
            // Padding has source 0 too, and does not count.
            if (old as usize) < slots && self.layout.segments[new] != 0 {
                places[old as usize] = new as i32;
            }
        }
        places
    }

    /// Extends the dropout tokens of a forward context to the new slots; a virtual token takes the row of its sequence.
    pub(crate) fn forward_context(&self, forward_context: ForwardContext, virtual_tokens: usize) -> ForwardContext {
        let (Some(sources), Some(mut noise)) = (&self.embedding_sources, forward_context.dropout.clone()) else {
            return forward_context;
        };
        let tokens = noise.tokens.clone();
        let name = |(slot, &source): (usize, &i32)| match tokens.get(source as usize) {
            Some(token) => *token,
            None => {
                let index = source as usize - tokens.len();
                let first = sources[slot + virtual_tokens - index] as usize;
                burn_peft::TokenPosition { index: u32::MAX - 1 - index as u32, ..tokens[first] }
            }
        };
        noise.tokens = sources.iter().enumerate().map(name).collect();
        ForwardContext { dropout: Some(noise), ..forward_context }
    }
}

impl LlamaConfig {
    /// Returns the sizes of the model on which the shape of a prompt depends.
    pub fn base_shape(&self) -> BaseShape {
        BaseShape {
            hidden_size: self.hidden_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
        }
    }
}

impl<B: Kernels> Llama<B> {
    /// Returns the number of virtual tokens before a sequence that names no adapter.
    pub fn num_virtual_tokens(&self) -> usize {
        self.active_row_adapters(1).num_virtual_tokens(self)[0]
    }

    /// Lays out the tokens after the virtual tokens of their rows.
    pub(crate) fn layout_with_prompts(&self, layout: &SequenceLayout, rows: &RowAdapters) -> PromptedLayout {
        let ranges = |place| rows.virtual_token_ranges(self, place);
        let prefixes = ranges(Injection::PastKeyValues);
        let layout = layout.with_position_offsets(|row| prefixes[row].len());
        match ranges(Injection::Embeddings) {
            none if none.iter().all(Range::is_empty) => {
                PromptedLayout { layout, embedding_sources: None, prefix_ranges: prefixes }
            }
            embeddings => {
                let VirtualTokenLayout { layout, sources } = layout.with_virtual_tokens(&embeddings);
                PromptedLayout { layout, embedding_sources: Some(sources), prefix_ranges: prefixes }
            }
        }
    }

    /// Embeds token ids and the virtual tokens of the prompts of `rows`. Returns the embedding of every slot,
    /// `[slots, hidden_size]`, and the keys and values of virtual tokens, one tensor per layer (of all prompts in turn)
    /// or none.
    pub(crate) fn embed_with_prompts(
        &self,
        ids: Tensor<B, 2, Int>,
        sources: Option<Tensor<B, 1, Int>>,
        forward_context: &ForwardContext,
        rows: &RowAdapters,
    ) -> (Tensor<B, 2>, Vec<Tensor<B, 4>>) {
        let own = rows.forward_context(ids.dims()[1]);
        let (mut embeddings, mut layers) = (vec![self.embed_in(ids, &own)], Vec::<Vec<Tensor<B, 4>>>::new());
        for prompt in rows.prompts(self) {
            let tokens = prompt.encode(forward_context);
            embeddings.extend(tokens.embeddings);
            layers.resize_with(layers.len().max(tokens.past_key_values.len()), Vec::new);
            layers.iter_mut().zip(tokens.past_key_values).for_each(|(layer, tokens)| layer.push(tokens));
        }
        let joined = |layer: Vec<Tensor<B, 4>>| if layer.len() == 1 { layer[0].clone() } else { Tensor::cat(layer, 0) };
        let x = match sources {
            Some(sources) => Tensor::cat(embeddings, 0).select(0, sources),
            None => embeddings.swap_remove(0),
        };
        (x, layers.into_iter().map(joined).collect())
    }

    /// Returns the embeddings of a prefill and the KV cache with which it starts.
    pub(crate) fn prefill_inputs(
        &self,
        ids: Vec<i32>,
        arranged: &PromptedLayout,
        rows: &RowAdapters,
    ) -> (Tensor<B, 2>, KvCache<B>) {
        let device = self.device();
        let sources = arranged.embedding_sources.clone().map(|sources| index_tensor(sources, &device));
        let ids = int_tensor(ids, arranged.layout.rows, &device);
        let (x, before) = self.embed_with_prompts(ids, sources, &ForwardContext::default(), rows);
        let mut cache = KvCache::from_prefix(before, &arranged.prefix_ranges);
        cache.resize_layers(self.config.num_hidden_layers);
        (x, cache)
    }

    /// Creates a prompt for this model, to be put into [`Llama::prompts`]. It starts from the tokens of `text` if
    /// given, repeated or truncated to the number of virtual tokens, otherwise as the configuration says.
    ///
    /// # Errors
    /// Returns an error if the configuration is impossible, asks for a text that is not given, or its method cannot
    /// start from a text; also if a text is given and another rank holds a part of the model.
    pub fn new_prompt(&self, config: &PromptConfig, text: Option<&[u32]>, seed: u64) -> Result<Prompt<B>, Error> {
        if text.is_some() {
            self.check_holds_all("method.init_text")?;
        }
        if !self.held.contains(0) {
            return Ok(Prompt::placeholder(config, self.config.base_shape(), &self.device())?);
        }
        let prompt = Prompt::new(config, self.config.base_shape(), seed, &self.device())?;
        let vocabulary = self.config.vocab_size;
        let Some(tokens) = config.init_token_ids(text, vocabulary, seed)? else { return Ok(prompt) };
        self.config.check_token_ids(tokens.iter())?;
        let start = match prompt.injection() {
            Injection::Embeddings => self.frozen().embed(self.token_row(&tokens)),
            Injection::PastKeyValues => self.keys_and_values(&tokens)?,
        };
        Ok(prompt.with_initial_values(start)?)
    }

    /// Computes the rotated keys and the values of every layer for tokens at the start of a sequence,
    /// `[tokens, layers · 2 · kv_heads · head_dim]`, in the layout of a prefix. Tokens after such a prefix attend to
    /// the same keys as after the text itself.
    ///
    /// # Errors
    /// Returns an error if there are more tokens than the model's rotary frequencies cover.
    pub fn keys_and_values(&self, tokens: &[u32]) -> Result<Tensor<B, 2>, Error> {
        let (model, mut cache) = (self.frozen(), KvCache::new(self.config.num_hidden_layers, 1));
        let embeddings = model.embed(self.token_row(tokens));
        model.hidden_states(
            embeddings,
            &SequenceLayout::padded(&[tokens.len()]),
            Some(&mut cache),
            &ForwardContext::default(),
        )?;
        Ok(cache.flattened())
    }

    /// Returns the model without gradients. The start of a prompt needs none, and weights in half precision, as they
    /// are before a method has chosen the trainable ones, cannot have any.
    fn frozen(&self) -> Self {
        param::train_only(self.clone(), |_| false)
    }

    fn token_row(&self, tokens: &[u32]) -> Tensor<B, 2, Int> {
        int_tensor(tokens.iter().map(|&id| id as i32).collect(), 1, &self.device())
    }
}
