//! What every sequence begins with: nothing, or a trained prompt's virtual tokens.

use super::{Llama, Rows};
use crate::{Error, Layout, LlamaConfig, Past, kernel::Kernels};
use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};
use burn_peft::{
    Pass, Prompt, PromptConfig, param,
    prompt::{BaseShape, Place},
};
use std::ops::Range;

/// Tokens in their places after the model's virtual ones.
pub(crate) struct Arrangement {
    /// Positions after the virtual tokens; with slots for them where they are embeddings.
    pub layout: Layout,
    /// For each slot where its embedding is: among those of the tokens, or after them the virtual ones'. `None` if slots and
    /// tokens are the same.
    pub sources: Option<Vec<i32>>,
    /// For every row the virtual tokens that its past begins with, among those of all prompts.
    pub past: Vec<Range<usize>>,
}

impl Arrangement {
    /// Where the slots of the tokens have gone, by their old slot.
    pub fn places(&self, slots: usize) -> Vec<i32> {
        let mut places: Vec<i32> = (0..slots as i32).collect();
        for (new, &old) in self.sources.iter().flatten().enumerate() {
            // Padding comes after what it repeats.
            if (old as usize) < slots && self.layout.segments[new] != 0 {
                places[old as usize] = new as i32;
            }
        }
        places
    }

    /// The noise of every slot, that of the virtual tokens by their sequence's row.
    pub fn pass(&self, pass: Pass, virtual_tokens: usize) -> Pass {
        let (Some(sources), Some(mut noise)) = (&self.sources, pass.noise.clone()) else { return pass };
        let tokens = noise.tokens.clone();
        let name = |(slot, &source): (usize, &i32)| match tokens.get(source as usize) {
            Some(token) => *token,
            None => {
                let index = source as usize - tokens.len();
                let first = sources[slot + virtual_tokens - index] as usize;
                burn_peft::Token { index: u32::MAX - 1 - index as u32, ..tokens[first] }
            }
        };
        noise.tokens = sources.iter().enumerate().map(name).collect();
        Pass { noise: Some(noise), ..pass }
    }
}

impl LlamaConfig {
    /// What a prompt has to know of the model.
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
    /// The number of virtual tokens before a sequence that names no adapter.
    pub fn virtual_tokens(&self) -> usize {
        self.active_rows(1).virtual_tokens(self)[0]
    }

    /// Tokens in their places after the virtual ones of their rows.
    pub(crate) fn arrange(&self, layout: &Layout, rows: &Rows) -> Arrangement {
        let ranges = |place| rows.ranges(self, place);
        let past = ranges(Place::Past);
        let layout = layout.shifted(|row| past[row].len());
        match ranges(Place::Embeddings) {
            none if none.iter().all(Range::is_empty) => Arrangement { layout, sources: None, past },
            embeddings => {
                let (layout, sources) = layout.preceded(&embeddings);
                Arrangement { layout, sources: Some(sources), past }
            }
        }
    }

    /// Token ids → the embeddings of every slot, `[slots, hidden_size]`, and the virtual tokens that layers see before them, those
    /// of all prompts of `rows` one after the other, one value per layer or none.
    pub(crate) fn begin(
        &self,
        ids: Tensor<B, 2, Int>,
        sources: Option<Tensor<B, 1, Int>>,
        pass: &Pass,
        rows: &Rows,
    ) -> (Tensor<B, 2>, Vec<Tensor<B, 4>>) {
        let (mut embeddings, mut layers) = (vec![self.embed(ids)], Vec::<Vec<Tensor<B, 4>>>::new());
        for prompt in rows.prompts(self) {
            let tokens = prompt.encode(pass);
            embeddings.extend(tokens.embeddings);
            layers.resize_with(layers.len().max(tokens.layers.len()), Vec::new);
            layers.iter_mut().zip(tokens.layers).for_each(|(layer, tokens)| layer.push(tokens));
        }
        let joined = |layer: Vec<Tensor<B, 4>>| if layer.len() == 1 { layer[0].clone() } else { Tensor::cat(layer, 0) };
        let x = match sources {
            Some(sources) => Tensor::cat(embeddings, 0).select(0, sources),
            None => embeddings.swap_remove(0),
        };
        (x, layers.into_iter().map(joined).collect())
    }

    /// The embeddings of a first pass that is kept, and the past it begins with.
    pub(crate) fn first(&self, ids: Vec<i32>, arranged: &Arrangement, rows: &Rows) -> (Tensor<B, 2>, Past<B>) {
        let device = self.device();
        let sources = arranged.sources.clone().map(|sources| indices(sources, &device));
        let ids = crate::layout::ints(ids, arranged.layout.rows, &device);
        let (x, before) = self.begin(ids, sources, &Pass::default(), rows);
        let mut past = Past::starting_with(before, &arranged.past);
        past.open(self.config.num_hidden_layers);
        (x, past)
    }

    /// A new prompt for this model: from the tokens of a text if any are given, repeated or cut to the number of virtual tokens,
    /// else from what the configuration says. Put it into [`Llama::prompts`].
    ///
    /// # Errors
    /// If the configuration is impossible, asks for a text that is not given, or its method cannot start from one.
    pub fn new_prompt(&self, config: &PromptConfig, text: Option<&[u32]>, seed: u64) -> Result<Prompt<B>, Error> {
        let prompt = Prompt::new(config, self.config.base_shape(), (seed, &self.device()))?;
        let vocabulary = self.config.vocab_size;
        let Some(tokens) = config.start_tokens(text, (vocabulary, seed))? else { return Ok(prompt) };
        crate::batch::check_ids(tokens.iter(), vocabulary)?;
        let start = match prompt.place() {
            Place::Embeddings => self.frozen().embed(self.row(&tokens)),
            Place::Past => self.keys_and_values(&tokens)?,
        };
        Ok(prompt.starting_from(start)?)
    }

    /// The keys, rotated, and values of every layer for the first tokens of a sequence: `[tokens, layers · 2 · kv_heads · head_dim]`,
    /// as a prefix holds them. Tokens that come after such a prefix see what they would see after the text itself.
    ///
    /// # Errors
    /// If there are more tokens than the model's rotary frequencies cover.
    pub fn keys_and_values(&self, tokens: &[u32]) -> Result<Tensor<B, 2>, Error> {
        let (model, mut past) = (self.frozen(), Past::new(self.config.num_hidden_layers, 1));
        let embeddings = model.embed(self.row(tokens));
        model.hidden(embeddings, &Layout::padded(&[tokens.len()]), Some(&mut past), &Pass::default())?;
        Ok(past.flat())
    }

    /// The same weights, none of which carries a gradient: what a prompt starts from needs none, and weights in half precision, as
    /// they are before a method has chosen what learns, cannot have any.
    fn frozen(&self) -> Self {
        param::train_only(self.clone(), |_| false)
    }

    fn row(&self, tokens: &[u32]) -> Tensor<B, 2, Int> {
        crate::layout::ints(tokens.iter().map(|&id| id as i32).collect(), 1, &self.device())
    }
}

/// Indices on the device.
pub(crate) fn indices<B: Backend>(values: Vec<i32>, device: &B::Device) -> Tensor<B, 1, Int> {
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), (device, DType::I32))
}
