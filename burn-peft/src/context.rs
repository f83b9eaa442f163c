//! The context of a forward pass: dropout, the routing of adapters and the precision of matrix products.

use crate::{
    random,
    route::{Route, TokenSelection},
};
use burn_peft_kernels::MatmulPrecision;
use std::sync::Arc;

/// The settings of one forward pass, for all linear layers. The default is evaluation with the active adapters.
#[derive(Debug, Clone, Default)]
pub struct ForwardContext {
    /// The key of the dropout masks; `None` disables dropout.
    pub dropout: Option<DropoutKey>,
    /// The adapters to apply to each row; `None` applies the active adapters to all tokens.
    pub route: Option<Route>,
    /// The precision of the matrix products with the layers' own weights; adapters compute in f32. A model with a
    /// setting of its own overrides this one.
    pub compute: MatmulPrecision,
}

impl ForwardContext {
    /// Creates the context of a training pass with the given dropout masks.
    pub fn training(dropout: DropoutKey) -> Self {
        Self { dropout: Some(dropout), ..Self::default() }
    }

    /// Creates the context of an evaluation pass that applies the adapters of `route` to its rows.
    pub fn routed(route: Route) -> Self {
        Self { route: Some(route), ..Self::default() }
    }

    /// Returns the context for a subset of the tokens, given by their positions in the pass.
    pub fn select(&self, places: &[i32]) -> Self {
        let dropout = self.dropout.as_ref().map(|noise| {
            let tokens = places.iter().map(|&place| noise.tokens[place as usize]).collect();
            DropoutKey { tokens, ..noise.clone() }
        });
        Self { dropout, route: self.route.as_ref().map(|route| route.select(places)), compute: self.compute }
    }

    /// Returns the selection of an activation's `tokens` to which the named adapter applies, if any.
    pub(crate) fn token_selection(&self, name: &str, active: bool, tokens: usize) -> Option<TokenSelection<'_>> {
        match &self.route {
            None => active.then_some(TokenSelection::ALL),
            Some(route) => route.token_selection(name, tokens),
        }
    }
}

/// The position of a token in the data. Random numbers depend on it, and so not on the batch that contains the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenPosition {
    /// The index of the row in the training step, counted over all micro-batches and process ranks.
    pub row: u64,
    /// The token's index in its row.
    pub index: u32,
}

/// The key from which dropout masks are computed: they are a function of (seed, step, row, index, layer path).
#[derive(Debug, Clone)]
pub struct DropoutKey {
    /// The seed of the run.
    pub seed: u64,
    /// The optimizer step.
    pub step: u64,
    /// The positions of the pass's tokens, in the order of the activations' rows.
    pub tokens: Arc<[TokenPosition]>,
}

impl DropoutKey {
    /// Returns a dropout mask `[tokens, features]` in row-major order: 0 with probability `p`, else `1 / (1 - p)`.
    pub fn mask(&self, layer: u64, features: usize, p: f64) -> Vec<f32> {
        let mut mask = vec![0f32; self.tokens.len() * features];
        for (token, out) in self.tokens.iter().zip(mask.chunks_exact_mut(features)) {
            fill_mask(out, random::key(&[self.seed, self.step, token.row, token.index as u64, layer]), p);
        }
        mask
    }

    /// Returns a dropout mask of `values` numbers that is the same for all rows of the step.
    pub fn step_mask(&self, layer: u64, values: usize, p: f64) -> Vec<f32> {
        let mut mask = vec![0f32; values];
        fill_mask(&mut mask, random::key(&[self.seed, self.step, layer]), p);
        mask
    }
}

/// Fills a mask with 0 (probability `p`) and `1 / (1 - p)`.
fn fill_mask(out: &mut [f32], key: u64, p: f64) {
    let (keep, threshold) = ((1.0 / (1.0 - p)) as f32, (p * (1u64 << 32) as f64) as u64);
    // One hash yields two random 32-bit numbers.
    for (pair, out) in out.chunks_mut(2).enumerate() {
        let bits = random::bits(key, pair as u64);
        for (value, word) in out.iter_mut().zip([bits & 0xFFFF_FFFF, bits >> 32]) {
            *value = if word < threshold { 0.0 } else { keep };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(rows: &[u64], length: u32) -> DropoutKey {
        let tokens = rows.iter().flat_map(|&row| (0..length).map(move |index| TokenPosition { row, index })).collect();
        DropoutKey { seed: 3, step: 5, tokens }
    }

    #[test]
    fn a_mask_keeps_the_expected_share_and_mean() {
        let mask = noise(&[0, 1, 2, 3], 100).mask(9, 63, 0.1);
        let zeros = mask.iter().filter(|&&m| m == 0.0).count() as f64 / mask.len() as f64;
        assert!((zeros - 0.1).abs() < 0.006, "share of zeros {zeros}");
        assert!(mask.iter().all(|&m| m == 0.0 || (m - 1.0 / 0.9).abs() < 1e-6));
    }

    #[test]
    fn a_row_has_the_same_mask_in_any_batch() {
        let together = noise(&[4, 9], 7).mask(1, 5, 0.5);
        assert_eq!(together[35..], noise(&[9], 7).mask(1, 5, 0.5)[..]);
        assert_ne!(together[..35], together[35..]);
    }
}
