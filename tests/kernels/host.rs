//! Reference implementations of the kernels in plain f64 host code, with one loop per index of the formula.

/// The attention mask as in [`burn_llama::kernel::AttentionMask`], for host code: arrays `[rows · queries]` and
/// `[rows · keys]`.
#[derive(Debug, Clone, Default)]
pub struct HostAttentionMask {
    pub rows: usize,
    pub query_segments: Vec<i32>,
    pub query_positions: Vec<i32>,
    pub key_segments: Vec<i32>,
    pub key_positions: Vec<i32>,
    pub window: Option<usize>,
}

impl HostAttentionMask {
    pub const ANY_SEGMENT: i32 = -1;
    pub const EMPTY_SEGMENT: i32 = -2;

    pub fn queries(&self) -> usize {
        self.query_segments.len() / self.rows
    }

    pub fn keys(&self) -> usize {
        self.key_segments.len() / self.rows
    }

    pub fn sees(&self, row: usize, query: usize, key: usize) -> bool {
        let (query, key) = (row * self.queries() + query, row * self.keys() + key);
        let segment = self.key_segments[key];
        let distance = self.query_positions[query] - self.key_positions[key];
        (segment == Self::ANY_SEGMENT || segment == self.query_segments[query])
            && distance >= 0
            && self.window.is_none_or(|window| distance < window as i32)
    }
}

/// Looks up rows of `table [rows, width]`.
pub fn embed(table: &[f64], width: usize, ids: &[i32]) -> Vec<f64> {
    ids.iter().flat_map(|&id| &table[id as usize * width..][..width]).copied().collect()
}

/// Computes the RMS norm of `x [n, width]` with `weight [width]`.
pub fn rms_norm(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let row = |x: &[f64]| {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        x.iter().zip(weight).map(|(x, w)| x / (mean + epsilon).sqrt() * w).collect::<Vec<_>>()
    };
    x.chunks(weight.len()).flat_map(row).collect()
}

/// Applies rotary embeddings to `x [n, heads, dim]`, with `cos` and `sin [n, dim / 2]`.
pub fn rope(x: &[f64], [_, heads, dim]: [usize; 3], cos: &[f64], sin: &[f64]) -> Vec<f64> {
    let (half, mut out) = (dim / 2, x.to_vec());
    for (head, out) in out.chunks_mut(dim).enumerate() {
        for i in 0..half {
            let at = head / heads * half + i;
            let (a, b) = (out[i], out[i + half]);
            out[i] = a * cos[at] - b * sin[at];
            out[i + half] = b * cos[at] + a * sin[at];
        }
    }
    out
}

pub fn swiglu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
}

/// Computes `x [n, features]` · `weight [out, features]`ᵀ.
pub fn linear(x: &[f64], weight: &[f64], features: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    x.chunks(features).flat_map(|x| weight.chunks(features).map(move |w| dot(x, w))).collect()
}

/// Computes `log Σ exp`; 0 for an empty slice. NaN propagates.
fn log_sum_exp(x: &[f64]) -> f64 {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if x.is_empty() { 0.0 } else { max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln() }
}

/// Computes attention of `q [rows, queries, heads, dim]` over `k` and `v [rows, keys, kv_heads, dim]`. Returns the
/// output in the shape of `q` and the log-sum-exp of the scores `[rows, kv_heads, group, queries]`. A query that sees
/// no key gives 0.
pub fn attention(
    [q, k, v]: [&[f64]; 3],
    sight: &HostAttentionMask,
    [heads, kv_heads, dim]: [usize; 3],
) -> [Vec<f64>; 2] {
    let (queries, keys, group) = (sight.queries(), sight.keys(), heads / kv_heads);
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; sight.rows * heads * queries]);
    for row in 0..sight.rows {
        for query in 0..queries {
            let seen: Vec<usize> = (0..keys).filter(|&key| sight.sees(row, query, key)).collect();
            for head in 0..heads {
                let at = ((row * queries + query) * heads + head) * dim;
                let key = |key: usize| ((row * keys + key) * kv_heads + head / group) * dim;
                let dot = |j: usize| (0..dim).map(|i| q[at + i] * k[key(j) + i]).sum::<f64>();
                let scores: Vec<f64> = seen.iter().map(|&j| dot(j) / (dim as f64).sqrt()).collect();
                let log = log_sum_exp(&scores);
                for (&j, score) in seen.iter().zip(&scores) {
                    let weight = (score - log).exp();
                    (0..dim).for_each(|i| out[at + i] += weight * v[key(j) + i]);
                }
                lse[(row * heads + head) * queries + query] = log;
            }
        }
    }
    [out, lse]
}

/// Computes the weighted cross-entropy losses and the log-sum-exp of the logits, `[n]` each, of `hidden [n, features]`
/// with `head [vocabulary, features]`.
pub fn cross_entropy(hidden: &[f64], head: &[f64], features: usize, ids: &[i32], weights: &[f64]) -> [Vec<f64>; 2] {
    let (mut losses, mut sums) = (Vec::new(), Vec::new());
    for ((hidden, &id), weight) in hidden.chunks(features).zip(ids).zip(weights) {
        let logits = linear(hidden, head, features);
        let lse = log_sum_exp(&logits);
        losses.push(weight * (lse - logits[id as usize]));
        sums.push(lse);
    }
    [losses, sums]
}
