//! The sampling settings, and the choice of a token from logits.

use crate::Error;
use burn_peft::random;

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
