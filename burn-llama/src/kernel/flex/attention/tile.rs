//! The forward and the backward pass of one tile.

use super::{AttentionInputs, AttentionShape, BackwardInputs, DisjointSlices, HeadIndex, KvView, PartialKvGradients};
use crate::kernel::flex::{
    buffer::with_scratch,
    key_ranges::KeyRanges,
    vector_ops::{dot, exp, exp_sum, max, scale_into, vectorized},
};
use burn_peft_kernels::{gemm::GemmOutput, gemm::Matrix, gemm::Threads, gemm::sgemm};
use std::ops::Range;

/// One tile: a block of queries of all heads that share a key head. A row of the tile is one head of one query.
pub(super) struct AttentionTile<'a> {
    sizes: AttentionShape,
    index: HeadIndex,
    queries: Range<usize>,
    /// The keys visible to each query of the row of the batch.
    visible: &'a KeyRanges,
    /// The span of the keys visible to the tile's queries.
    span: Range<usize>,
}

impl<'a> AttentionTile<'a> {
    pub(super) fn new(sizes: AttentionShape, index: HeadIndex, queries: Range<usize>, visible: &'a KeyRanges) -> Self {
        Self { span: visible.span(queries.clone()), sizes, index, queries, visible }
    }

    /// Returns the number of rows.
    fn num_rows(&self) -> usize {
        self.queries.len() * self.sizes.group
    }

    /// Returns the query of a row.
    fn query(&self, row: usize) -> usize {
        self.queries.start + row / self.sizes.group
    }

    /// Returns the index of a row in the log-sum-exp.
    fn lse_index(&self, row: usize) -> usize {
        self.sizes.lse_index(self.index, row % self.sizes.group) + self.query(row)
    }

    /// Returns the keys (or values) of the span, `[span, dim]`.
    fn span_matrix<'x>(&self, x: KvView<'x>) -> Matrix<'x> {
        self.sizes.head_matrix(x, self.index, &self.span)
    }

    /// Copies the queries of the tile, times `factor`, into consecutive rows: `[rows, dim]`.
    fn gather(&self, from: &[f32], to: &mut [f32], factor: f32) {
        let width = self.sizes.group * self.sizes.dim;
        for (query, to) in self.queries.clone().zip(to.chunks_exact_mut(width)) {
            scale_into(to, &from[self.sizes.group_range(self.index, query)], factor);
        }
    }

    /// Computes the output and the log-sum-exp of the tile's queries.
    pub(super) fn forward(&self, inputs: AttentionInputs<'_>, output: &DisjointSlices, lse: &DisjointSlices) {
        let (m, n, dim) = (self.num_rows(), self.span.len(), self.sizes.dim);
        with_scratch(m * (2 * dim + n + 1), |scratch| {
            let (queries, rest) = scratch.split_at_mut(m * dim);
            let (weighted_values, rest) = rest.split_at_mut(m * dim);
            let (scores, sums) = rest.split_at_mut(m * n);
            self.gather(inputs.q, queries, self.sizes.scale());
            let to = GemmOutput { values: scores, stride: n, accumulate: false };
            let keys = self.span_matrix(inputs.k).transposed();
            sgemm(to, Matrix::new(queries, [m, dim]), keys, 1.0, Threads::One);
            self.softmax_rows(scores, sums, lse);
            let to = GemmOutput { values: weighted_values, stride: dim, accumulate: false };
            sgemm(to, Matrix::new(scores, [m, n]), self.span_matrix(inputs.v), 1.0, Threads::One);
            self.write_output(weighted_values, sums, output);
        });
    }

    /// Replaces the scores by attention weights that are not normalised yet, writes 1 / their sum to `sums`, and the
    /// log-sum-exp to `lse`.
    fn softmax_rows(&self, scores: &mut [f32], sums: &mut [f32], lse: &DisjointSlices) {
        let n = self.span.len();
        vectorized(
            #[inline(always)]
            || {
                for (row, sum) in sums.iter_mut().enumerate() {
                    let scores = &mut scores[row * n..(row + 1) * n];
                    let SoftmaxSum { inverse, log } =
                        softmax(scores, self.visible.of_query(self.query(row)), self.span.start);
                    *sum = inverse;
                    let at = self.lse_index(row);
                    // SAFETY: `at` lies in the buffer, which has one value for each query of each head, and only this
                    // tile has this query of this head.
                    unsafe { lse.write(at..at + 1, |lse| lse[0] = log) };
                }
            },
        );
    }

    /// Writes the rows `weighted_values [rows, dim]`, each times its value of `sums`, to the output.
    fn write_output(&self, weighted_values: &[f32], sums: &[f32], output: &DisjointSlices) {
        let AttentionShape { group, dim, .. } = self.sizes;
        for (index, query) in self.queries.clone().enumerate() {
            let at = self.sizes.group_range(self.index, query);
            let weighted_values = weighted_values[index * at.len()..(index + 1) * at.len()].chunks_exact(dim);
            let sums = &sums[index * group..];
            // SAFETY: `at` lies in the output, which is as long as the queries, and only this tile has this query of
            // this group of heads.
            unsafe {
                output.write(at, |out| {
                    for ((out, weighted_values), &sum) in out.chunks_exact_mut(dim).zip(weighted_values).zip(sums) {
                        scale_into(out, weighted_values, sum);
                    }
                });
            }
        }
    }

    /// Computes the gradient of the tile's queries and adds those of keys and values to `partial`, whose span contains
    /// the tile's. With the attention weights `P` and `δ = Σ P·(dy·Vᵀ)`, which equals `Σ output·dy`: `dV += Pᵀ·dy`,
    /// `dS = P·(dy·Vᵀ - δ)`, `dK += dSᵀ·q`, `dq = dS·K`.
    pub(super) fn backward(&self, inputs: BackwardInputs<'_>, dq: &DisjointSlices, partial: &mut PartialKvGradients) {
        let (m, n, dim) = (self.num_rows(), self.span.len(), self.sizes.dim);
        with_scratch(m * (3 * dim + 2 * n), |scratch| {
            let (queries, rest) = scratch.split_at_mut(m * dim);
            let (d_out, rest) = rest.split_at_mut(m * dim);
            let (d_queries, rest) = rest.split_at_mut(m * dim);
            let (weights, d_scores) = rest.split_at_mut(m * n);
            if self.span.is_empty() {
                d_queries.fill(0.0);
                return self.write_query_gradient(d_queries, dq);
            }
            self.gather(inputs.qkv.q, queries, self.sizes.scale());
            self.gather(inputs.dy, d_out, 1.0);
            let (queries, d_out) = (Matrix::new(queries, [m, dim]), Matrix::new(d_out, [m, dim]));
            let keys = self.span_matrix(inputs.qkv.k);
            let to = GemmOutput { values: weights, stride: n, accumulate: false };
            sgemm(to, queries, keys.transposed(), 1.0, Threads::One);
            let to = GemmOutput { values: d_scores, stride: n, accumulate: false };
            sgemm(to, d_out, self.span_matrix(inputs.qkv.v).transposed(), 1.0, Threads::One);
            self.softmax_rows_backward(weights, d_scores, inputs.lse);
            let (weights, d_scores) = (Matrix::new(weights, [m, n]), Matrix::new(d_scores, [m, n]));
            let (dk, dv) = partial.gradients.split_at_mut(partial.span.len() * dim);
            let own = (self.span.start - partial.span.start) * dim..(self.span.end - partial.span.start) * dim;
            let to = GemmOutput { values: &mut dv[own.clone()], stride: dim, accumulate: true };
            sgemm(to, weights.transposed(), d_out, 1.0, Threads::One);
            let to = GemmOutput { values: &mut dk[own], stride: dim, accumulate: true };
            sgemm(to, d_scores.transposed(), queries, 1.0, Threads::One);
            let to = GemmOutput { values: &mut *d_queries, stride: dim, accumulate: false };
            sgemm(to, d_scores, keys, self.sizes.scale(), Threads::One);
            self.write_query_gradient(d_queries, dq);
        });
    }

    /// Replaces the scores of all rows by attention weights, and the gradients of the weights by those of the scores.
    fn softmax_rows_backward(&self, weights: &mut [f32], d_scores: &mut [f32], lse: &[f32]) {
        let n = self.span.len();
        vectorized(
            #[inline(always)]
            || {
                for row in 0..self.num_rows() {
                    let cells = row * n..(row + 1) * n;
                    let (weights, d_scores) = (&mut weights[cells.clone()], &mut d_scores[cells]);
                    let ranges = self.visible.of_query(self.query(row));
                    softmax_backward(weights, d_scores, ranges, self.span.start, lse[self.lse_index(row)]);
                }
            },
        );
    }

    /// Writes the gradient of the tile's queries, `[rows, dim]`, to `dq`.
    fn write_query_gradient(&self, d_queries: &[f32], dq: &DisjointSlices) {
        for (query, d_queries) in self.queries.clone().zip(d_queries.chunks_exact(self.sizes.group * self.sizes.dim)) {
            let at = self.sizes.group_range(self.index, query);
            // SAFETY: the range lies in `dq`, which is as long as the queries, and only this tile has this query of
            // this group of heads.
            unsafe { dq.write(at, |dq| dq.copy_from_slice(d_queries)) };
        }
    }
}

/// The sum of the exponentials of a query's scores.
struct SoftmaxSum {
    /// 1 / sum, relative to the largest score.
    inverse: f32,
    /// The log-sum-exp.
    log: f32,
}

/// Replaces the scores of a query by attention weights that are not normalised yet, 0 for masked keys.
#[inline(always)]
fn softmax(scores: &mut [f32], ranges: &[Range<usize>], start: usize) -> SoftmaxSum {
    let mut largest = f32::NEG_INFINITY;
    for range in ranges {
        largest = largest.max(max(&scores[range.start - start..range.end - start]));
    }
    let (mut sum, mut end) = (0.0, 0);
    for range in ranges {
        let (from, to) = (range.start - start, range.end - start);
        scores[end..from].fill(0.0);
        sum += exp_sum(&mut scores[from..to], largest);
        end = to;
    }
    scores[end..].fill(0.0);
    // The output of a query without visible keys is 0.
    match ranges.is_empty() {
        true => SoftmaxSum { inverse: 0.0, log: 0.0 },
        false => SoftmaxSum { inverse: 1.0 / sum, log: largest + sum.ln() },
    }
}

/// Replaces scores by attention weights, and the gradients of the weights (`d`) by those of the scores; both are 0 for
/// masked keys.
#[inline(always)]
fn softmax_backward(weights: &mut [f32], d: &mut [f32], ranges: &[Range<usize>], start: usize, lse: f32) {
    let (mut delta, mut end) = (0.0, 0);
    for range in ranges {
        let (from, to) = (range.start - start, range.end - start);
        weights[end..from].fill(0.0);
        d[end..from].fill(0.0);
        weights[from..to].iter_mut().for_each(|weight| *weight = exp(*weight - lse));
        delta += dot(&weights[from..to], &d[from..to]);
        end = to;
    }
    weights[end..].fill(0.0);
    d[end..].fill(0.0);
    for range in ranges {
        let (from, to) = (range.start - start, range.end - start);
        for (&weight, d) in weights[from..to].iter().zip(&mut d[from..to]) {
            *d = weight * (*d - delta);
        }
    }
}
