//! Autoregressive generation with a KV cache.

mod config;

pub use config::GenerationConfig;

use crate::{
    Error, KvCache, Llama, SequenceLayout,
    kernel::{Kernels, StepDecoder},
    layout::int_tensor,
    model::RowAdapters,
};
use burn::tensor::{DType, Tensor, s};

/// The most new tokens for which the KV cache reserves room at the start. A larger limit is rarely reached; the cache
/// grows when it is.
const MAX_RESERVED_TOKENS: usize = 4096;

/// A generation in progress: the KV cache and the tokens of every row so far.
#[derive(Debug)]
pub struct Generation<'a, B: Kernels> {
    model: &'a Llama<B>,
    config: &'a GenerationConfig,
    rows: RowAdapters,
    pub(crate) cache: KvCache<B>,
    /// Prompt and new tokens of every row.
    tokens: Vec<Vec<u32>>,
    done: Vec<bool>,
    logits: Vec<f32>,
    step: usize,
    step_decoder: Option<Box<dyn StepDecoder<B>>>,
}

impl<'a, B: Kernels> Generation<'a, B> {
    /// Starts a generation with prompts of any lengths, one per row: runs the model on them (prefill).
    ///
    /// # Errors
    /// Returns an error if there is no prompt, one is empty or longer than the model's context, one has a token outside
    /// the vocabulary, or a setting is impossible.
    pub fn new(model: &'a Llama<B>, prompts: &[Vec<u32>], settings: &'a GenerationConfig) -> Result<Self, Error> {
        Self::with_row_adapters(model, prompts, settings, model.active_row_adapters(prompts.len()))
    }

    /// Starts a generation like [`Generation::new`] whose rows each use the adapter or prompt that they name, active or
    /// not; `__base__` names none.
    ///
    /// # Errors
    /// Returns the errors of [`Generation::new`], and an error if the number of names is not that of the rows, a name
    /// is unknown, or adapters are merged into the weights.
    pub fn mixed<S: AsRef<str>>(
        model: &'a Llama<B>,
        prompts: &[Vec<u32>],
        names: &[S],
        settings: &'a GenerationConfig,
    ) -> Result<Self, Error> {
        Self::with_row_adapters(model, prompts, settings, model.named_row_adapters(names, prompts.len())?)
    }

    fn with_row_adapters(
        model: &'a Llama<B>,
        prompts: &[Vec<u32>],
        settings: &'a GenerationConfig,
        rows: RowAdapters,
    ) -> Result<Self, Error> {
        settings.check()?;
        if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
            return Err(Error::config("prompt", "at least one token", "none"));
        }
        model.config().check_token_ids(prompts.iter().flatten())?;
        let layout = SequenceLayout::padded(&prompts.iter().map(Vec::len).collect::<Vec<_>>());
        let ids = padded_ids(prompts, layout.length);
        let arranged = model.layout_with_prompts(&layout, &rows);
        model.config().check_length(arranged.layout.num_positions())?;
        let places = arranged.new_slots(ids.len());
        let last = |(row, prompt): (usize, &Vec<u32>)| places[row * layout.length + prompt.len() - 1];
        let slots: Vec<i32> = prompts.iter().enumerate().map(last).collect();
        let (x, mut cache) = model.prefill_inputs(ids, &arranged, &rows);
        // The last new token is not fed back.
        cache.reserve(
            cache.num_slots() + arranged.layout.length + settings.max_new_tokens.clamp(1, MAX_RESERVED_TOKENS) - 1,
        );
        let mut generate = Self {
            model,
            config: settings,
            rows,
            cache,
            tokens: prompts.to_vec(),
            done: vec![false; prompts.len()],
            logits: Vec::new(),
            step: 0,
            step_decoder: None,
        };
        generate.forward(x, &arranged.layout, Some(slots))?;
        if settings.max_new_tokens > 1 && !generate.rows.has_names() {
            generate.step_decoder = B::step_decoder(model, prompts.len());
        }
        Ok(generate)
    }

    /// Runs the model on new embeddings and stores the logits of the last token of each row. `slots` names the slots of
    /// these tokens if a row has several.
    fn forward(
        &mut self,
        embeddings: Tensor<B, 2>,
        layout: &SequenceLayout,
        slots: Option<Vec<i32>>,
    ) -> Result<(), Error> {
        let (model, forward_context) = (self.model, self.rows.forward_context(layout.length));
        let hidden = model.hidden_states_at(embeddings, layout, Some(&mut self.cache), &forward_context, slots)?;
        let logits = model.head(hidden, &self.rows.forward_context(1)).cast(DType::F32).into_data();
        self.logits = logits.into_vec().map_err(|e| Error::config("logits", "f32 values", format!("{e:?}")))?;
        Ok(())
    }

    /// Runs the model on the last token of every row and stores the logits.
    fn decode_step(&mut self) -> Result<(), Error> {
        let before = self.rows.num_virtual_tokens(self.model);
        let positions: Vec<usize> = self.tokens.iter().zip(before).map(|(row, n)| n + row.len() - 1).collect();
        let ids: Vec<u32> = self.tokens.iter().map(|row| row.last().map_or(0, |&id| id)).collect();
        let longest = positions.iter().max().map_or(0, |&position| position + 1);
        self.model.config().check_length(longest)?;
        B::with_spinning_pool(|| {
            let (cache, logits) = (&mut self.cache, &mut self.logits);
            if self.step_decoder.as_mut().is_some_and(|steps| steps.step(&ids, &positions, cache, logits)) {
                return Ok(());
            }
            let ids = ids.iter().map(|&id| id as i32).collect();
            let ids = int_tensor(ids, positions.len(), &self.model.device());
            let x = self.model.embed_in(ids, &self.rows.forward_context(1));
            self.forward(x, &SequenceLayout::next_token(&positions), None)
        })
    }

    /// Generates one token for every row that is not done and returns it, `None` for the other rows. Returns `None`
    /// when all rows are done.
    ///
    /// # Errors
    /// Returns an error if a position goes beyond the model's context, or a logit is not finite.
    pub fn advance(&mut self) -> Result<Option<Vec<Option<u32>>>, Error> {
        if self.step >= self.config.max_new_tokens || self.done.iter().all(|&done| done) {
            return Ok(None);
        }
        if self.step > 0 {
            self.decode_step()?;
        }
        let vocabulary = self.logits.len() / self.tokens.len();
        let open = self.logits.chunks_exact(vocabulary).zip(&self.done).filter(|(_, done)| !**done);
        let finite = open.into_iter().all(|(logits, _)| logits.iter().all(|logit| logit.is_finite()));
        self.model.check_finite("logits", finite)?;
        let mut new = Vec::with_capacity(self.tokens.len());
        for (row, logits) in self.logits.chunks_exact_mut(vocabulary).enumerate() {
            let id = self.config.sample(logits, &self.tokens[row], row, self.step);
            let ended = self.done[row] || self.config.eos.contains(&id);
            self.done[row] = ended;
            // A row that is done goes on, so that all rows have the same length; its tokens are not returned.
            self.tokens[row].push(id);
            new.push((!ended).then_some(id));
        }
        self.step += 1;
        Ok(if new.iter().all(Option::is_none) { None } else { Some(new) })
    }

    /// Ends a row, for instance at a stop string.
    pub fn stop(&mut self, row: usize) {
        self.done[row] = true;
    }

    /// Runs until all rows are done and returns the new tokens of every row.
    ///
    /// # Errors
    /// Returns the errors of [`Generation::advance`].
    pub fn finish(mut self) -> Result<Vec<Vec<u32>>, Error> {
        let mut rows = vec![Vec::new(); self.tokens.len()];
        while let Some(new) = self.advance()? {
            rows.iter_mut().zip(new).for_each(|(row, id)| row.extend(id));
        }
        Ok(rows)
    }
}

/// Computes the logits of every token of one sequence, `[tokens, vocab_size]`.
///
/// # Errors
/// Returns an error if the sequence is empty or too long for the model.
pub fn logits<B: Kernels>(model: &Llama<B>, ids: &[u32]) -> Result<Tensor<B, 2>, Error> {
    let mut rows = logits_of_rows(model, &[ids.to_vec()], &model.active_row_adapters(1))?;
    Ok(rows.swap_remove(0))
}

/// Computes the same logits as [`logits`], one token after the other as in a generation, and calls `use_them` with
/// those of each token, `[vocab_size]`.
///
/// # Errors
/// Returns an error if the sequence is empty, too long for the model, or has a token outside the vocabulary.
pub fn logits_by_steps<B: Kernels>(
    model: &Llama<B>,
    ids: &[u32],
    mut use_them: impl FnMut(&[f32]),
) -> Result<(), Error> {
    model.config().check_token_ids(ids.iter())?;
    let (first, rest) = ids.split_at(ids.len().min(1));
    let settings = GenerationConfig { max_new_tokens: ids.len(), ..GenerationConfig::default() };
    let mut generate = Generation::new(model, &[first.to_vec()], &settings)?;
    use_them(&generate.logits);
    for &id in rest {
        generate.tokens[0].push(id);
        generate.decode_step()?;
        use_them(&generate.logits);
    }
    Ok(())
}

/// Computes the logits of every token of several sequences in one forward pass, `[tokens, vocab_size]` for each. A
/// sequence uses the adapter or prompt that it names, active or not; `__base__` names none.
///
/// # Errors
/// Returns an error if a sequence is empty or too long for the model, the number of names is not that of the sequences,
/// a name is unknown, or adapters are merged into the weights.
pub fn mixed_logits<B: Kernels, S: AsRef<str>>(
    model: &Llama<B>,
    sequences: &[Vec<u32>],
    names: &[S],
) -> Result<Vec<Tensor<B, 2>>, Error> {
    logits_of_rows(model, sequences, &model.named_row_adapters(names, sequences.len())?)
}

fn logits_of_rows<B: Kernels>(
    model: &Llama<B>,
    sequences: &[Vec<u32>],
    rows: &RowAdapters,
) -> Result<Vec<Tensor<B, 2>>, Error> {
    if sequences.is_empty() || sequences.iter().any(Vec::is_empty) {
        return Err(Error::config("text", "at least one token", "none"));
    }
    model.config().check_token_ids(sequences.iter().flatten())?;
    let layout = SequenceLayout::padded(&sequences.iter().map(Vec::len).collect::<Vec<_>>());
    let arranged = model.layout_with_prompts(&layout, rows);
    let (x, mut cache) = model.prefill_inputs(padded_ids(sequences, layout.length), &arranged, rows);
    let forward_context = rows.forward_context(arranged.layout.length);
    let hidden = model.hidden_states(x, &arranged.layout, Some(&mut cache), &forward_context)?;
    let logits = model.head(hidden, &forward_context);
    // The slots of virtual tokens are left out.
    let places = arranged.new_slots(layout.rows * layout.length);
    let of_row = |(row, sequence): (usize, &Vec<u32>)| {
        let first = places[row * layout.length] as usize;
        logits.clone().slice(s![first..first + sequence.len(), ..])
    };
    Ok(sequences.iter().enumerate().map(of_row).collect())
}

/// Returns the token ids of all rows, each padded on the right to `length`.
fn padded_ids(rows: &[Vec<u32>], length: usize) -> Vec<i32> {
    let padded = |row: &Vec<u32>| {
        let row: Vec<i32> = row.iter().map(|&id| id as i32).collect();
        row.into_iter().chain(std::iter::repeat(0)).take(length)
    };
    rows.iter().flat_map(padded).collect()
}

/// Computes the summed log-likelihood of each continuation of `context`; the context runs through the model only once.
///
/// # Errors
/// Returns an error if the context or a continuation is empty, or they are too long for the model.
pub fn log_likelihoods<B: Kernels>(model: &Llama<B>, context: &[u32], choices: &[Vec<u32>]) -> Result<Vec<f64>, Error> {
    let settings = GenerationConfig { max_new_tokens: 1, ..GenerationConfig::default() };
    let start = Generation::new(model, &[context.to_vec()], &settings)?;
    let mut sums = Vec::with_capacity(choices.len());
    for choice in choices {
        model.config().check_token_ids(choice.iter())?;
        let Some((&first, rest)) = choice.split_first() else {
            return Err(Error::config("choice", "at least one token", "none"));
        };
        let mut sum = log_softmax(&start.logits, first);
        if !rest.is_empty() {
            let fed = &choice[..rest.len()];
            let mut layout = SequenceLayout::padded(&[fed.len()]);
            layout.positions.iter_mut().for_each(|p| *p += (model.num_virtual_tokens() + context.len()) as i32);
            let tokens = int_tensor(fed.iter().map(|&id| id as i32).collect(), 1, &model.device());
            let (mut cache, forward_context) = (start.cache.clone(), start.rows.forward_context(fed.len()));
            let embeddings = model.embed_in(tokens, &forward_context);
            let hidden = model.hidden_states(embeddings, &layout, Some(&mut cache), &forward_context)?;
            for (index, &target) in rest.iter().enumerate() {
                let row = model
                    .head(hidden.clone().slice(s![index..index + 1, ..]), &start.rows.forward_context(1))
                    .cast(DType::F32)
                    .into_data();
                let row = row.into_vec().map_err(|e| Error::config("logits", "f32 values", format!("{e:?}")))?;
                sum += log_softmax(&row, target);
            }
        }
        sums.push(sum);
    }
    model.check_finite("log-likelihood", sums.iter().all(|sum| sum.is_finite()))?;
    Ok(sums)
}

fn log_softmax(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b)) as f64;
    let sum: f64 = logits.iter().map(|&logit| (logit as f64 - max).exp()).sum();
    logits[token as usize] as f64 - max - sum.ln()
}
