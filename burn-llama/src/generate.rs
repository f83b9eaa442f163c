//! Autoregressive generation with a KV cache.

use crate::{
    Error, KvCache, Llama, SequenceLayout,
    kernel::{Kernels, StepDecoder},
    layout::int_tensor,
    model::RowAdapters,
};
use burn::tensor::{DType, Tensor, s};
use burn_peft::random;

/// The most new tokens for which the KV cache reserves room at the start. A larger limit is rarely reached; the cache
/// grows when it is.
const MAX_RESERVED_TOKENS: usize = 4096;

/// The sampling settings of a generation. The default is greedy decoding.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationConfig {
    /// The most tokens that are generated per row.
    pub max_new_tokens: usize,
    /// The divisor of the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Only the `top_k` most likely tokens are sampled from; 0 means all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability are sampled from.
    pub top_p: f64,
    /// The factor by which logits of tokens that occurred are divided (if positive) or multiplied (if negative).
    pub repetition_penalty: f64,
    /// The seed of sampling; a draw depends on it, the row and the step.
    pub seed: u64,
    /// Tokens that end a row. They are not part of the output.
    pub eos: Vec<u32>,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            seed: 0,
            eos: Vec::new(),
        }
    }
}

impl GenerationConfig {
    /// Checks the ranges of the settings.
    ///
    /// # Errors
    /// Returns an error that names the setting with an impossible value.
    pub fn check(&self) -> Result<(), Error> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::config("temperature", "a number of at least 0", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::config("top_p", "a number above 0 and at most 1", self.top_p));
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return Err(Error::config("repetition_penalty", "a number above 0", self.repetition_penalty));
        }
        Ok(())
    }

    /// Applies repetition penalty, temperature, top-k and top-p to `logits`, in the order of the processors of
    /// `transformers`; tokens that are filtered out become `-∞`. With temperature 0 only the penalty applies.
    pub fn process_logits(&self, logits: &mut [f32], history: &[u32]) {
        if self.repetition_penalty != 1.0 {
            let penalty = self.repetition_penalty as f32;
            for &token in &history.iter().copied().collect::<std::collections::BTreeSet<_>>() {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
                }
            }
        }
        if self.temperature == 0.0 {
            return;
        }
        logits.iter_mut().for_each(|logit| *logit /= self.temperature as f32);
        if self.top_k > 0 && self.top_k < logits.len() {
            let mut order = logits.to_vec();
            let (_, threshold, _) = order.select_nth_unstable_by(self.top_k - 1, |a, b| b.total_cmp(a));
            let threshold = *threshold;
            logits.iter_mut().filter(|logit| **logit < threshold).for_each(|logit| *logit = f32::NEG_INFINITY);
        }
        if self.top_p < 1.0 {
            self.nucleus(logits);
        }
    }

    /// Filters out the least likely tokens whose probabilities add up to at most `1 - top_p`; the most likely one
    /// stays.
    fn nucleus(&self, logits: &mut [f32]) {
        let mut order: Vec<usize> = (0..logits.len()).filter(|&i| logits[i] > f32::NEG_INFINITY).collect();
        order.sort_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        let Some(&best) = order.last() else { return };
        let max = logits[best];
        let weight = |logit: f32| ((logit - max) as f64).exp();
        let (total, mut sum) = (order.iter().map(|&i| weight(logits[i])).sum::<f64>(), 0.0);
        for &token in order.iter().filter(|&&token| token != best) {
            sum += weight(logits[token]);
            if sum / total > 1.0 - self.top_p {
                break;
            }
            logits[token] = f32::NEG_INFINITY;
        }
    }

    /// Chooses the next token of a row: the most likely one, or a sample that depends on (seed, row, step) only.
    pub fn sample(&self, logits: &mut [f32], history: &[u32], row: usize, step: usize) -> u32 {
        self.process_logits(logits, history);
        // Takes the first of equal logits, as `argmax` does.
        let best = (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
        if self.temperature == 0.0 {
            return best as u32;
        }
        let weight = |logit: f32| ((logit - logits[best]) as f64).exp();
        let total: f64 = logits.iter().map(|&logit| weight(logit)).sum();
        let mut rest = random::uniform(random::key(&[self.seed, row as u64]), step as u64) * total;
        let drawn = logits.iter().position(|&logit| {
            rest -= weight(logit);
            rest < 0.0
        });
        drawn.unwrap_or(best) as u32
    }
}

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
    /// Returns an error if there is no prompt, one is empty, one has a token outside the vocabulary, or a setting is
    /// impossible.
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
        let places = arranged.new_slots(ids.len());
        let last = |(row, prompt): (usize, &Vec<u32>)| places[row * layout.length + prompt.len() - 1];
        let slots: Vec<i32> = prompts.iter().enumerate().map(last).collect();
        let (x, mut past) = model.prefill_inputs(ids, &arranged, &rows);
        // The last new token is not fed back.
        past.reserve(
            past.num_slots() + arranged.layout.length + settings.max_new_tokens.clamp(1, MAX_RESERVED_TOKENS) - 1,
        );
        let mut generate = Self {
            model,
            config: settings,
            rows,
            cache: past,
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
        let (model, pass) = (self.model, self.rows.forward_context(layout.length));
        let hidden = model.hidden_states_at(embeddings, layout, Some(&mut self.cache), &pass, slots)?;
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
        self.model.config().rope_scaling.check_length(longest)?;
        B::with_spinning_pool(|| {
            let (past, logits) = (&mut self.cache, &mut self.logits);
            if self.step_decoder.as_mut().is_some_and(|steps| steps.step(&ids, &positions, past, logits)) {
                return Ok(());
            }
            let ids = ids.iter().map(|&id| id as i32).collect();
            let x = self.model.embed(int_tensor(ids, positions.len(), &self.model.device()));
            self.forward(x, &SequenceLayout::next_token(&positions), None)
        })
    }

    /// Generates one token for every row that is not done and returns it, `None` for the other rows. Returns `None`
    /// when all rows are done.
    ///
    /// # Errors
    /// Returns an error if a position goes beyond what the model's rotary frequencies cover.
    pub fn advance(&mut self) -> Result<Option<Vec<Option<u32>>>, Error> {
        if self.step >= self.config.max_new_tokens || self.done.iter().all(|&done| done) {
            return Ok(None);
        }
        if self.step > 0 {
            self.decode_step()?;
        }
        let vocabulary = self.logits.len() / self.tokens.len();
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
    let (x, mut past) = model.prefill_inputs(padded_ids(sequences, layout.length), &arranged, rows);
    let pass = rows.forward_context(arranged.layout.length);
    let hidden = model.hidden_states(x, &arranged.layout, Some(&mut past), &pass)?;
    let logits = model.head(hidden, &pass);
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
            let (mut past, pass) = (start.cache.clone(), start.rows.forward_context(fed.len()));
            let hidden = model.hidden_states(model.embed(tokens), &layout, Some(&mut past), &pass)?;
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
    Ok(sums)
}

fn log_softmax(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b)) as f64;
    let sum: f64 = logits.iter().map(|&logit| (logit as f64 - max).exp()).sum();
    logits[token as usize] as f64 - max - sum.ln()
}
