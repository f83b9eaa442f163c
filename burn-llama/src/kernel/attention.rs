//! Attention over blocks of queries, with tensor operations (after Dao, 2023, arXiv:2307.08691).

use super::{AttentionMask, F, primitive, tensor};
use burn::tensor::{Bool, Tensor, backend::Backend, s};
use std::ops::Range;

/// The number of queries per block. The scores of one block are the largest tensor that exists.
const QUERIES_PER_BLOCK: usize = 64;
/// The score of a masked pair.
const MASKED_SCORE: f64 = -1e30;

/// The result of [`Kernels::flash_attention`](super::Kernels::flash_attention).
#[derive(Debug, Clone)]
pub struct AttentionOutput<B: Backend> {
    /// The output, in the shape of the queries; 0 for a query without visible keys.
    pub output: F<B>,
    /// The log-sum-exp of the scores, `[rows, kv_heads, heads / kv_heads, queries]`; 0 for a query without visible
    /// keys.
    pub lse: F<B>,
}

/// Groups the query heads by the key head that they share: `[rows, kv_heads, group, n, head_dim]`.
fn grouped<B: Backend>(x: Tensor<B, 4>, kv_heads: usize) -> Tensor<B, 5> {
    let [rows, n, heads, dim] = x.dims();
    x.reshape([rows, n, kv_heads, heads / kv_heads, dim]).permute([0, 2, 3, 1, 4])
}

/// Inverts [`grouped`].
fn ungrouped<B: Backend>(x: Tensor<B, 5>) -> Tensor<B, 4> {
    let [rows, kv_heads, group, n, dim] = x.dims();
    x.permute([0, 3, 1, 2, 4]).reshape([rows, n, kv_heads * group, dim])
}

/// Stacks the queries of a group, so that their shared keys need no copy: `[rows, kv_heads, group · block, head_dim]`.
fn stacked<B: Backend>(x: Tensor<B, 5>) -> Tensor<B, 4> {
    let [rows, kv_heads, group, n, dim] = x.dims();
    x.reshape([rows, kv_heads, group * n, dim])
}

/// Returns keys or values by head, `[rows, kv_heads, keys, head_dim]`.
fn by_head<B: Backend>(x: F<B>) -> Tensor<B, 4> {
    tensor::<B, 4>(x).swap_dims(1, 2)
}

/// Computes the scaled scores of a block, `[rows, kv_heads, group, block, keys]`; masked pairs get a large negative
/// value.
fn scores<B: Backend>(q: Tensor<B, 5>, k: &Tensor<B, 4>, masked: Tensor<B, 5, Bool>) -> Tensor<B, 5> {
    let ([rows, kv_heads, group, n, dim], keys) = (q.dims(), masked.dims()[4]);
    let k = k.clone().slice(s![.., .., ..keys, ..]).swap_dims(2, 3);
    let scores = (stacked(q) * (dim as f64).powf(-0.5)).matmul(k).reshape([rows, kv_heads, group, n, keys]);
    // The value is finite, so that a query without visible keys gives no NaN.
    scores.mask_fill(masked.expand([rows, kv_heads, group, n, keys]), MASKED_SCORE)
}

/// A block of consecutive queries.
struct QueryBlock {
    queries: Range<usize>,
    /// The number of leading keys; all later ones are masked by causality.
    keys: usize,
}

/// Returns the blocks of queries.
fn blocks(queries: usize, keys: usize) -> impl Iterator<Item = QueryBlock> {
    let cached = keys - queries;
    (0..queries).step_by(QUERIES_PER_BLOCK).map(move |from| {
        let to = queries.min(from + QUERIES_PER_BLOCK);
        QueryBlock { queries: from..to, keys: cached + to }
    })
}

/// Implements [`flash_attention`](super::Kernels::flash_attention).
pub fn forward<B: Backend>([q, k, v]: [F<B>; 3], mask: &AttentionMask<B>) -> AttentionOutput<B> {
    let (k, v) = (by_head::<B>(k), by_head::<B>(v));
    let [_, kv_heads, keys, _] = k.dims();
    let q = grouped(tensor::<B, 4>(q), kv_heads);
    let [rows, _, group, queries, dim] = q.dims();
    let (mut outputs, mut sums) = (Vec::new(), Vec::new());
    for QueryBlock { queries, keys: visible } in blocks(queries, keys) {
        let masked = mask.masked(queries.clone(), visible);
        // A query without visible keys gets an output of 0; with a log-sum-exp of 0 its weights are 0 in the backward
        // pass too. Such queries are taken from the mask, not from the scores, because on some devices a maximum
        // ignores NaN.
        let all_masked = masked.clone().all_dim(4);
        let scores = scores(q.clone().slice(s![.., .., .., queries.clone(), ..]), &k, masked);
        let max = scores.clone().max_dim(4);
        let weights = (scores - max.clone()).exp();
        let sum = weights.clone().sum_dim(4);
        let n = queries.len();
        let stacked = weights.reshape([rows, kv_heads, group * n, visible]);
        let output =
            stacked.matmul(v.clone().slice(s![.., .., ..visible, ..])).reshape([rows, kv_heads, group, n, dim]);
        let output = (output / sum.clone()).mask_fill(all_masked.clone().expand([rows, kv_heads, group, n, dim]), 0.0);
        outputs.push(ungrouped(output));
        let all_masked = all_masked.expand([rows, kv_heads, group, n, 1]);
        sums.push((max + sum.log()).mask_fill(all_masked, 0.0).squeeze_dim::<4>(4));
    }
    AttentionOutput { output: primitive(Tensor::cat(outputs, 1)), lse: primitive(Tensor::cat(sums, 3)) }
}

/// Implements [`flash_attention_backward`](super::Kernels::flash_attention_backward).
pub fn backward<B: Backend>([q, k, v]: [F<B>; 3], mask: &AttentionMask<B>, lse: F<B>, dy: F<B>) -> [F<B>; 3] {
    let (k, v, lse) = (by_head::<B>(k), by_head::<B>(v), tensor::<B, 4>(lse));
    let [_, kv_heads, keys, dim] = k.dims();
    let (q, dy) = (grouped(tensor::<B, 4>(q), kv_heads), grouped(tensor::<B, 4>(dy), kv_heads));
    let [rows, _, group, queries, _] = q.dims();
    let scale = (dim as f64).powf(-0.5);
    let (mut dq, mut dk, mut dv) = (Vec::new(), k.zeros_like(), v.zeros_like());
    for QueryBlock { queries, keys: visible } in blocks(queries, keys) {
        let n = queries.len();
        let rows_of = |x: &Tensor<B, 5>| x.clone().slice(s![.., .., .., queries.clone(), ..]);
        let flat = |x: Tensor<B, 5>| x.reshape([rows, kv_heads, group * n, visible]);
        let (q, dy) = (rows_of(&q), rows_of(&dy));
        let scores = scores(q.clone(), &k, mask.masked(queries.clone(), visible));
        let p = (scores - lse.clone().slice(s![.., .., .., queries.clone()]).unsqueeze_dim::<5>(4)).exp();
        let dy = stacked(dy);
        let dp = dy.clone().matmul(v.clone().slice(s![.., .., ..visible, ..]).swap_dims(2, 3));
        let dp = dp.reshape([rows, kv_heads, group, n, visible]);
        // This equals Σ output·dy, so the output need not be kept.
        let delta = (p.clone() * dp.clone()).sum_dim(4);
        let ds = flat(p.clone() * (dp - delta) * scale);
        dv = add_to_first_keys(dv, flat(p).swap_dims(2, 3).matmul(dy));
        dk = add_to_first_keys(dk, ds.clone().swap_dims(2, 3).matmul(stacked(q)));
        let block = ds.matmul(k.clone().slice(s![.., .., ..visible, ..]));
        dq.push(ungrouped(block.reshape([rows, kv_heads, group, n, dim])));
    }
    [primitive(Tensor::cat(dq, 1)), primitive(dk.swap_dims(1, 2)), primitive(dv.swap_dims(1, 2))]
}

/// Adds `part` to the first keys of `whole`.
fn add_to_first_keys<B: Backend>(whole: Tensor<B, 4>, part: Tensor<B, 4>) -> Tensor<B, 4> {
    let keys = part.dims()[2];
    if keys == whole.dims()[2] {
        return whole + part;
    }
    let sum = whole.clone().slice(s![.., .., ..keys, ..]) + part;
    whole.slice_assign(s![.., .., ..keys, ..], sum)
}
