//! What one forward pass tells every adapter on its way.

use crate::{
    kernel::Compute,
    random,
    route::{Reach, Route},
};
use std::sync::Arc;

/// What holds for all linear layers during one forward pass. The default is evaluation with the active adapters.
#[derive(Debug, Clone, Default)]
pub struct Pass {
    /// The source of dropout masks; `None` switches dropout off.
    pub noise: Option<Noise>,
    /// Which adapters act where; `None` lets those act that are active, on all tokens.
    pub route: Option<Route>,
    /// In what the products with the layers' own weights are computed; adapters compute in f32. A model that has a choice of its
    /// own puts it here.
    pub compute: Compute,
}

impl Pass {
    /// A training pass whose dropout masks come from `noise`.
    pub fn training(noise: Noise) -> Self {
        Self { noise: Some(noise), ..Self::default() }
    }

    /// A pass of evaluation whose rows have adapters of their own.
    pub fn routed(route: Route) -> Self {
        Self { route: Some(route), ..Self::default() }
    }

    /// The pass over some of its tokens, by their places in it.
    pub fn at(&self, places: &[i32]) -> Self {
        let noise = self.noise.as_ref().map(|noise| {
            let tokens = places.iter().map(|&place| noise.tokens[place as usize]).collect();
            Noise { tokens, ..noise.clone() }
        });
        Self { noise, route: self.route.as_ref().map(|route| route.at(places)), compute: self.compute }
    }

    /// Which of an activation's `tokens` the adapter of that name acts on, if any.
    pub(crate) fn reach(&self, name: &str, active: bool, tokens: usize) -> Option<Reach<'_>> {
        match &self.route {
            None => active.then_some(Reach::ALL),
            Some(route) => route.reach(name, tokens),
        }
    }
}

/// Where a token of the pass stands in the data, so that its random numbers do not depend on the batch it travels in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// The row of the training step, counted over all micro-batches and ranks.
    pub row: u64,
    /// The token's index in its row.
    pub index: u32,
}

/// Dropout masks as a function of (seed, step, row, index, layer path).
#[derive(Debug, Clone)]
pub struct Noise {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step.
    pub step: u64,
    /// The tokens of the pass in the order in which they stand in the activations.
    pub tokens: Arc<[Token]>,
}

impl Noise {
    /// A dropout mask `[tokens, features]` in row-major order: 0 with probability `p`, else `1 / (1 - p)`.
    pub fn mask(&self, layer: u64, features: usize, p: f64) -> Vec<f32> {
        let mut mask = vec![0f32; self.tokens.len() * features];
        for (token, out) in self.tokens.iter().zip(mask.chunks_exact_mut(features)) {
            fill(out, random::key(&[self.seed, self.step, token.row, token.index as u64, layer]), p);
        }
        mask
    }

    /// A mask of `values` numbers that is the same for all rows of the step, for what they share.
    pub fn step_mask(&self, layer: u64, values: usize, p: f64) -> Vec<f32> {
        let mut mask = vec![0f32; values];
        fill(&mut mask, random::key(&[self.seed, self.step, layer]), p);
        mask
    }
}

/// 0 with probability `p`, else `1 / (1 - p)`.
fn fill(out: &mut [f32], key: u64, p: f64) {
    let (keep, threshold) = ((1.0 / (1.0 - p)) as f32, (p * (1u64 << 32) as f64) as u64);
    // One hash gives two numbers of 32 bits.
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

    fn noise(rows: &[u64], length: u32) -> Noise {
        let tokens = rows.iter().flat_map(|&row| (0..length).map(move |index| Token { row, index })).collect();
        Noise { seed: 3, step: 5, tokens }
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
