//! Generation: one token after the other, with a cache.

use crate::{
    Error, Layout, Llama, Past,
    batch::check_ids,
    kernel::{Kernels, Steps},
    layout::ints,
    model::Rows,
};
use burn::tensor::{DType, Tensor, s};
use burn_peft::random;

/// New tokens that the cache has room for from the start. A larger limit is mostly never reached; room for more is made when it is.
const RESERVED: usize = 4096;

/// How the next token is chosen. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// At most this many tokens.
    pub max_new_tokens: usize,
    /// Logits are divided by it; 0 takes the most likely token.
    pub temperature: f64,
    /// Only the most likely `top_k` tokens are drawn from; 0 means all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability are drawn from.
    pub top_p: f64,
    /// Logits of tokens that occurred are divided (if positive) or multiplied (if negative) by it.
    pub repetition_penalty: f64,
    /// Decides the draws, together with row and step.
    pub seed: u64,
    /// Tokens that end a row. They are not part of the output.
    pub eos: Vec<u32>,
}

impl Default for Settings {
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

impl Settings {
    /// Refuses values that no distribution can have.
    ///
    /// # Errors
    /// Names the setting.
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

    /// Penalises, scales and filters `logits` as `transformers`' processors do, in their order; what is filtered out becomes
    /// `-∞`. With temperature 0 only the penalty applies.
    pub fn process(&self, logits: &mut [f32], history: &[u32]) {
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

    /// Drops the least likely tokens whose probabilities together stay within `1 - top_p`; the likeliest stays.
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

    /// The next token of a row: the likeliest, or a draw that depends on (seed, row, step) only.
    pub fn choose(&self, logits: &mut [f32], history: &[u32], (row, step): (usize, usize)) -> u32 {
        self.process(logits, history);
        // The first of equals, as `argmax` does.
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

/// A generation under way: the model's cache and what every row has so far.
#[derive(Debug)]
pub struct Generate<'a, B: Kernels> {
    model: &'a Llama<B>,
    settings: &'a Settings,
    rows: Rows,
    pub(crate) past: Past<B>,
    /// Per row: prompt and new tokens.
    tokens: Vec<Vec<u32>>,
    done: Vec<bool>,
    logits: Vec<f32>,
    step: usize,
    steps: Option<Box<dyn Steps<B>>>,
}

impl<'a, B: Kernels> Generate<'a, B> {
    /// Reads prompts of any lengths, one row each.
    ///
    /// # Errors
    /// If there is no prompt, one is empty, one has a token outside the vocabulary, or a setting is impossible.
    pub fn new(model: &'a Llama<B>, prompts: &[Vec<u32>], settings: &'a Settings) -> Result<Self, Error> {
        Self::of_rows(model, prompts, settings, model.active_rows(prompts.len()))
    }

    /// As [`Generate::new`], each row with the adapter or prompt that it names, active or not; `__base__` names none.
    ///
    /// # Errors
    /// As [`Generate::new`]; if there is no name for every row, one is unknown, or adapters are in the weights.
    pub fn mixed<S: AsRef<str>>(
        model: &'a Llama<B>,
        (prompts, names): (&[Vec<u32>], &[S]),
        settings: &'a Settings,
    ) -> Result<Self, Error> {
        Self::of_rows(model, prompts, settings, model.named_rows(names, prompts.len())?)
    }

    fn of_rows(model: &'a Llama<B>, prompts: &[Vec<u32>], settings: &'a Settings, rows: Rows) -> Result<Self, Error> {
        settings.check()?;
        if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
            return Err(Error::config("prompt", "at least one token", "none"));
        }
        check_ids(prompts.iter().flatten(), model.config().vocab_size)?;
        let layout = Layout::padded(&prompts.iter().map(Vec::len).collect::<Vec<_>>());
        let ids = padded_ids(prompts, layout.length);
        let arranged = model.arrange(&layout, &rows);
        let places = arranged.places(ids.len());
        let last = |(row, prompt): (usize, &Vec<u32>)| places[row * layout.length + prompt.len() - 1];
        let slots: Vec<i32> = prompts.iter().enumerate().map(last).collect();
        let (x, mut past) = model.first(ids, &arranged, &rows);
        // The last token is not fed back.
        past.reserve(past.slots() + arranged.layout.length + settings.max_new_tokens.clamp(1, RESERVED) - 1);
        let mut generate = Self {
            model,
            settings,
            rows,
            past,
            tokens: prompts.to_vec(),
            done: vec![false; prompts.len()],
            logits: Vec::new(),
            step: 0,
            steps: None,
        };
        generate.forward(x, &arranged.layout, Some(slots))?;
        if settings.max_new_tokens > 1 && !generate.rows.are_named() {
            generate.steps = B::steps(model, prompts.len());
        }
        Ok(generate)
    }

    /// Runs the model on new embeddings and keeps the logits of each row's last one, which `slots` names if there are several.
    fn forward(&mut self, embeddings: Tensor<B, 2>, layout: &Layout, slots: Option<Vec<i32>>) -> Result<(), Error> {
        let (model, pass) = (self.model, self.rows.pass(layout.length));
        let hidden = model.hidden_at(embeddings, layout, Some(&mut self.past), (&pass, slots))?;
        let logits = model.head(hidden, &self.rows.pass(1)).cast(DType::F32).into_data();
        self.logits = logits.into_vec().map_err(|e| Error::config("logits", "f32 values", format!("{e:?}")))?;
        Ok(())
    }

    /// Reads the last token of every row.
    fn feed(&mut self) -> Result<(), Error> {
        let before = self.rows.virtual_tokens(self.model);
        let positions: Vec<usize> = self.tokens.iter().zip(before).map(|(row, n)| n + row.len() - 1).collect();
        let ids: Vec<u32> = self.tokens.iter().map(|row| row.last().map_or(0, |&id| id)).collect();
        let longest = positions.iter().max().map_or(0, |&position| position + 1);
        self.model.config().rope_scaling.check_length(longest)?;
        B::at_work(|| {
            let (past, logits) = (&mut self.past, &mut self.logits);
            if self.steps.as_mut().is_some_and(|steps| steps.step(&ids, &positions, past, logits)) {
                return Ok(());
            }
            let ids = ids.iter().map(|&id| id as i32).collect();
            let x = self.model.embed(ints(ids, positions.len(), &self.model.device()));
            self.forward(x, &Layout::next(&positions), None)
        })
    }

    /// Adds one token to every row that is not done; `None` for rows that are. Returns `None` when all are.
    ///
    /// # Errors
    /// If a position goes beyond what the model's rotary frequencies cover.
    pub fn advance(&mut self) -> Result<Option<Vec<Option<u32>>>, Error> {
        if self.step >= self.settings.max_new_tokens || self.done.iter().all(|&done| done) {
            return Ok(None);
        }
        if self.step > 0 {
            self.feed()?;
        }
        let vocabulary = self.logits.len() / self.tokens.len();
        let mut new = Vec::with_capacity(self.tokens.len());
        for (row, logits) in self.logits.chunks_exact_mut(vocabulary).enumerate() {
            let id = self.settings.choose(logits, &self.tokens[row], (row, self.step));
            let ended = self.done[row] || self.settings.eos.contains(&id);
            self.done[row] = ended;
            // A row that is done keeps the batch in step; what it says is not heard.
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

    /// Runs to the end and returns the new tokens of every row.
    ///
    /// # Errors
    /// As [`Generate::advance`].
    pub fn finish(mut self) -> Result<Vec<Vec<u32>>, Error> {
        let mut rows = vec![Vec::new(); self.tokens.len()];
        while let Some(new) = self.advance()? {
            rows.iter_mut().zip(new).for_each(|(row, id)| row.extend(id));
        }
        Ok(rows)
    }
}

/// The logits of every token of one sequence, `[tokens, vocab_size]`.
///
/// # Errors
/// If the sequence is empty or too long for the model.
pub fn logits<B: Kernels>(model: &Llama<B>, ids: &[u32]) -> Result<Tensor<B, 2>, Error> {
    let mut rows = logits_of_rows(model, &[ids.to_vec()], &model.active_rows(1))?;
    Ok(rows.swap_remove(0))
}

/// As [`logits`], one token after the other as a generation computes them: those of each, `[vocab_size]`, are given to `use_them`.
///
/// # Errors
/// As there, and if a token lies outside the vocabulary.
pub fn logits_by_steps<B: Kernels>(
    model: &Llama<B>,
    ids: &[u32],
    mut use_them: impl FnMut(&[f32]),
) -> Result<(), Error> {
    check_ids(ids.iter(), model.config().vocab_size)?;
    let (first, rest) = ids.split_at(ids.len().min(1));
    let settings = Settings { max_new_tokens: ids.len(), ..Settings::default() };
    let mut generate = Generate::new(model, &[first.to_vec()], &settings)?;
    use_them(&generate.logits);
    for &id in rest {
        generate.tokens[0].push(id);
        generate.feed()?;
        use_them(&generate.logits);
    }
    Ok(())
}

/// The logits of every token of several sequences, computed in one pass, each with the adapter or prompt that it names, active or
/// not; `__base__` names none. `[tokens, vocab_size]` for each.
///
/// # Errors
/// If a sequence is empty or too long for the model, if there is no name for each, one is unknown, or adapters are in the weights.
pub fn mixed_logits<B: Kernels, S: AsRef<str>>(
    model: &Llama<B>,
    sequences: &[Vec<u32>],
    names: &[S],
) -> Result<Vec<Tensor<B, 2>>, Error> {
    logits_of_rows(model, sequences, &model.named_rows(names, sequences.len())?)
}

fn logits_of_rows<B: Kernels>(
    model: &Llama<B>,
    sequences: &[Vec<u32>],
    rows: &Rows,
) -> Result<Vec<Tensor<B, 2>>, Error> {
    if sequences.is_empty() || sequences.iter().any(Vec::is_empty) {
        return Err(Error::config("text", "at least one token", "none"));
    }
    check_ids(sequences.iter().flatten(), model.config().vocab_size)?;
    let layout = Layout::padded(&sequences.iter().map(Vec::len).collect::<Vec<_>>());
    let arranged = model.arrange(&layout, rows);
    let (x, mut past) = model.first(padded_ids(sequences, layout.length), &arranged, rows);
    let pass = rows.pass(arranged.layout.length);
    let hidden = model.hidden(x, &arranged.layout, Some(&mut past), &pass)?;
    let logits = model.head(hidden, &pass);
    // Nothing is said of a prompt's embeddings.
    let places = arranged.places(layout.rows * layout.length);
    let of_row = |(row, sequence): (usize, &Vec<u32>)| {
        let first = places[row * layout.length] as usize;
        logits.clone().slice(s![first..first + sequence.len(), ..])
    };
    Ok(sequences.iter().enumerate().map(of_row).collect())
}

/// Token ids of rows, padded on the right to `length`.
fn padded_ids(rows: &[Vec<u32>], length: usize) -> Vec<i32> {
    let padded = |row: &Vec<u32>| {
        let row: Vec<i32> = row.iter().map(|&id| id as i32).collect();
        row.into_iter().chain(std::iter::repeat(0)).take(length)
    };
    rows.iter().flat_map(padded).collect()
}

/// The summed log-likelihood of each continuation after `context`, computed once for the context.
///
/// # Errors
/// If context or a continuation is empty, or they are too long for the model.
pub fn log_likelihoods<B: Kernels>(model: &Llama<B>, context: &[u32], choices: &[Vec<u32>]) -> Result<Vec<f64>, Error> {
    let settings = Settings { max_new_tokens: 1, ..Settings::default() };
    let start = Generate::new(model, &[context.to_vec()], &settings)?;
    let mut sums = Vec::with_capacity(choices.len());
    for choice in choices {
        check_ids(choice.iter(), model.config().vocab_size)?;
        let Some((&first, rest)) = choice.split_first() else {
            return Err(Error::config("choice", "at least one token", "none"));
        };
        let mut sum = log_softmax(&start.logits, first);
        if !rest.is_empty() {
            let fed = &choice[..rest.len()];
            let mut layout = Layout::padded(&[fed.len()]);
            layout.positions.iter_mut().for_each(|p| *p += (model.virtual_tokens() + context.len()) as i32);
            let tokens = ints(fed.iter().map(|&id| id as i32).collect(), 1, &model.device());
            let (mut past, pass) = (start.past.clone(), start.rows.pass(fed.len()));
            let hidden = model.hidden(model.embed(tokens), &layout, Some(&mut past), &pass)?;
            for (index, &target) in rest.iter().enumerate() {
                let row = model
                    .head(hidden.clone().slice(s![index..index + 1, ..]), &start.rows.pass(1))
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
