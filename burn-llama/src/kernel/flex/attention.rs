//! Attention in tiles: a block of queries, of all heads that share a key head, against the span of keys visible to it.
//! Only the log-sum-exp of the scores is kept (Dao, 2023, arXiv:2307.08691).

use super::{
    buffer::{contiguous, tensor, uninit_vec, values, with_scratch},
    key_ranges::KeyRanges,
    vector_ops::{add, dot, exp, exp_sum, max, scale_into, vectorized},
};
use crate::kernel::AttentionMask;
use burn::backend::Flex;
use burn_flex::FlexTensor;
use burn_peft_kernels::gemm::{GemmOutput, Matrix, Threads, sgemm};
use rayon::prelude::*;
use std::ops::Range;

/// The number of rows of scores in a tile: queries times the heads that share a key head.
const TILE_ROWS: usize = 192;
/// The number of queries whose partial gradients of keys and values are accumulated by one thread. It is fixed, so that
/// the order of summation does not depend on the number of threads.
const QUERIES_PER_PARTIAL: usize = 512;

/// The sizes of one attention call.
#[derive(Debug, Clone, Copy)]
struct AttentionShape {
    queries: usize,
    keys: usize,
    /// The number of query heads that share a key head.
    group: usize,
    kv_heads: usize,
    dim: usize,
}

impl AttentionShape {
    fn of(q: &FlexTensor, k: &FlexTensor) -> Self {
        let [_, queries, heads, dim] = q.layout().shape().dims();
        let [_, keys, kv_heads, _] = k.layout().shape().dims();
        Self { queries, keys, group: heads / kv_heads, kv_heads, dim }
    }

    /// Returns the number of queries of a tile.
    fn queries_per_tile(&self) -> usize {
        (TILE_ROWS / self.group).max(1)
    }

    /// Splits the queries `range` into tiles.
    fn tiles(self, range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let (block, end) = (self.queries_per_tile(), range.end);
        range.step_by(block).map(move |from| from..end.min(from + block))
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// Returns the range of the values of one query in the buffers of queries and outputs: all heads that share the key
    /// head `head` of `row`.
    fn group_range(&self, (row, head): (usize, usize), query: usize) -> Range<usize> {
        let width = self.group * self.dim;
        let start = ((row * self.queries + query) * self.kv_heads + head) * width;
        start..start + width
    }

    /// Returns the keys (or values) `range` of one head of one row as a matrix, `[range.len(), dim]`.
    fn head_matrix<'a>(&self, x: KvView<'a>, (row, head): (usize, usize), range: &Range<usize>) -> Matrix<'a> {
        let stride = self.kv_heads * self.dim;
        let shape = [range.len(), self.dim];
        if range.is_empty() {
            return Matrix::new(&[], shape);
        }
        let start = row * x.row_stride + range.start * stride + head * self.dim;
        Matrix::strided(&x.values[start..], shape, stride)
    }

    /// Returns the index of query 0 of one head of the group in the log-sum-exp, `[rows, kv_heads, group, queries]`.
    fn lse_index(&self, (row, head): (usize, usize), member: usize) -> usize {
        ((row * self.kv_heads + head) * self.group + member) * self.queries
    }
}

/// A view of keys or values `[rows, keys, kv_heads, dim]`, possibly the used part of a larger buffer.
#[derive(Clone, Copy)]
struct KvView<'a> {
    values: &'a [f32],
    /// The stride from one row to the next.
    row_stride: usize,
}

impl<'a> KvView<'a> {
    fn of(tensor: &'a FlexTensor) -> Self {
        let layout = tensor.layout();
        Self { values: &tensor.storage::<f32>()[layout.start_offset()..], row_stride: layout.strides()[0] as usize }
    }
}

/// Makes the keys of each row contiguous; copies nothing if only the row stride is larger than a row.
fn contiguous_rows(tensor: FlexTensor) -> FlexTensor {
    let [_, _, heads, dim]: [usize; 4] = tensor.layout().shape().dims();
    let in_order = tensor.layout().strides()[1..] == [(heads * dim) as isize, dim as isize, 1];
    if in_order && tensor.layout().strides()[0] >= 0 { tensor } else { contiguous(tensor) }
}

/// A buffer into which parallel tasks write disjoint ranges.
struct DisjointSlices(*mut f32);
// SAFETY: the pointer is used only through `write`, whose contract rules out that two tasks access the same values.
unsafe impl Sync for DisjointSlices {}

impl DisjointSlices {
    /// Calls `work` with a range of the buffer.
    ///
    /// # Safety
    /// The range must lie in the buffer, which must outlive the call, and nothing else may access the range meanwhile.
    unsafe fn write(&self, at: Range<usize>, work: impl FnOnce(&mut [f32])) {
        // SAFETY: the range lies in the live buffer and nothing else accesses it, so the mutable slice is valid and
        // unique.
        work(unsafe { std::slice::from_raw_parts_mut(self.0.add(at.start), at.len()) });
    }
}

pub(super) fn forward(qkv: [FlexTensor; 3], visibility: &AttentionMask<Flex>) -> (FlexTensor, FlexTensor) {
    let [q, k, v] = qkv;
    let (q, k, v) = (contiguous(q), contiguous_rows(k), contiguous_rows(v));
    let (sizes, rows) = (AttentionShape::of(&q, &k), q.layout().shape()[0]);
    let visible = KeyRanges::of_batch(visibility);
    let lse_len = rows * sizes.kv_heads * sizes.group * sizes.queries;
    // SAFETY: the tiles of all rows and heads cover both buffers, and each tile writes its part of them.
    let (mut output, mut lse) = unsafe { (uninit_vec(values(&q).len()), uninit_vec(lse_len)) };
    let (out, sums) = (DisjointSlices(output.as_mut_ptr()), DisjointSlices(lse.as_mut_ptr()));
    let tiles: Vec<_> = sizes.tiles(0..sizes.queries).collect();
    (0..rows * sizes.kv_heads * tiles.len()).into_par_iter().for_each(|task| {
        let (index, tile) = (task / tiles.len(), &tiles[task % tiles.len()]);
        let place = (index / sizes.kv_heads, index % sizes.kv_heads);
        let keys = [KvView::of(&k), KvView::of(&v)];
        forward_tile(sizes, place, (tile, &visible[place.0]), (values(&q), keys), [&out, &sums]);
    });
    let shape = q.layout().shape().to_vec();
    (tensor(output, &shape), tensor(lse, &[rows, sizes.kv_heads, sizes.group, sizes.queries]))
}

fn forward_tile(
    sizes: AttentionShape,
    place: (usize, usize),
    (tile, visible): (&Range<usize>, &KeyRanges),
    (q, [k, v]): (&[f32], [KvView<'_>; 2]),
    [out, lse]: [&DisjointSlices; 2],
) {
    let (span, m) = (visible.span(tile.clone()), tile.len() * sizes.group);
    let (n, dim) = (span.len(), sizes.dim);
    with_scratch(m * (2 * dim + n + 1), |scratch| {
        let (queries, rest) = scratch.split_at_mut(m * dim);
        let (mixed, rest) = rest.split_at_mut(m * dim);
        let (scores, sums) = rest.split_at_mut(m * n);
        gather_queries(sizes, place, tile, (q, queries), sizes.scale());
        let keys = sizes.head_matrix(k, place, &span).transposed();
        let to = GemmOutput { values: scores, stride: n, accumulate: false };
        sgemm(to, Matrix::new(queries, [m, dim]), keys, 1.0, Threads::One);
        vectorized(
            #[inline(always)]
            || {
                for (row, sum) in sums.iter_mut().enumerate() {
                    let query = tile.start + row / sizes.group;
                    let at = sizes.lse_index(place, row % sizes.group) + query;
                    let scores = &mut scores[row * n..(row + 1) * n];
                    let (inverse, log) = softmax(scores, visible.of_query(query), span.start);
                    *sum = inverse;
                    // SAFETY: `at < rows * kv_heads * group * queries`, the length of the buffer, and only this tile
                    // has this query of this head.
                    unsafe { lse.write(at..at + 1, |lse| lse[0] = log) };
                }
            },
        );
        let to = GemmOutput { values: mixed, stride: dim, accumulate: false };
        sgemm(to, Matrix::new(scores, [m, n]), sizes.head_matrix(v, place, &span), 1.0, Threads::One);
        for (index, query) in tile.clone().enumerate() {
            let at = sizes.group_range(place, query);
            let mixed = mixed[index * at.len()..(index + 1) * at.len()].chunks_exact(dim);
            let sums = &sums[index * sizes.group..];
            // SAFETY: `at` lies in the output, which is as long as the queries, and only this tile has this query of
            // this group of heads.
            unsafe {
                out.write(at, |out| {
                    for ((out, mixed), &sum) in out.chunks_exact_mut(dim).zip(mixed).zip(sums) {
                        scale_into(out, mixed, sum);
                    }
                });
            }
        }
    });
}

/// Copies the queries of a tile, times `factor`, into consecutive rows, in the order of the rows of scores:
/// `[tile · group, dim]`.
fn gather_queries(
    sizes: AttentionShape,
    place: (usize, usize),
    tile: &Range<usize>,
    (from, to): (&[f32], &mut [f32]),
    factor: f32,
) {
    let width = sizes.group * sizes.dim;
    for (query, to) in tile.clone().zip(to.chunks_exact_mut(width)) {
        scale_into(to, &from[sizes.group_range(place, query)], factor);
    }
}

/// Replaces the scores of a query by attention weights that are not normalised yet, 0 for masked keys. Returns 1 /
/// their sum, and the log-sum-exp.
#[inline(always)]
fn softmax(scores: &mut [f32], ranges: &[Range<usize>], start: usize) -> (f32, f32) {
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
    if ranges.is_empty() { (0.0, 0.0) } else { (1.0 / sum, largest + sum.ln()) }
}

/// The partial gradients of keys and values from one block of queries.
struct PartialKvGradients {
    /// The row and the key head.
    row_and_head: (usize, usize),
    /// The keys that the queries attend to.
    span: Range<usize>,
    /// The gradients of the keys and of the values, `[2, span, dim]`.
    gradients: Vec<f32>,
}

pub(super) fn backward(
    qkv: [FlexTensor; 3],
    visibility: &AttentionMask<Flex>,
    saved: [FlexTensor; 2],
) -> [FlexTensor; 3] {
    let ([q, k, v], [lse, dy]) = (qkv.map(contiguous), saved.map(contiguous));
    let (sizes, rows) = (AttentionShape::of(&q, &k), q.layout().shape()[0]);
    let visible = KeyRanges::of_batch(visibility);
    // SAFETY: the tiles of all rows and heads cover the buffer, and each tile writes its part of it.
    let mut dq = unsafe { uninit_vec(values(&q).len()) };
    let gradient = DisjointSlices(dq.as_mut_ptr());
    let parts: Vec<_> = (0..sizes.queries)
        .step_by(QUERIES_PER_PARTIAL)
        .map(|from| from..sizes.queries.min(from + QUERIES_PER_PARTIAL))
        .collect();
    let inputs = ([KvView::of(&k), KvView::of(&v)], [&q, &lse, &dy].map(values));
    let share = |task: usize| {
        let (index, part) = (task / parts.len(), parts[task % parts.len()].clone());
        let place = (index / sizes.kv_heads, index % sizes.kv_heads);
        let visible = &visible[place.0];
        let span = visible.span(part.clone());
        let mut sums = vec![0.0; 2 * span.len() * sizes.dim];
        for tile in sizes.tiles(part) {
            backward_tile(sizes, place, (&tile, visible, &span), inputs, (&gradient, &mut sums));
        }
        PartialKvGradients { row_and_head: place, span, gradients: sums }
    };
    let shares: Vec<PartialKvGradients> = (0..rows * sizes.kv_heads * parts.len()).into_par_iter().map(share).collect();
    let (mut dk, mut dv) = (vec![0.0; values(&k).len()], vec![0.0; values(&v).len()]);
    for share in &shares {
        let (dk_part, dv_part) = share.gradients.split_at(share.gradients.len() / 2);
        add_partial_gradients(sizes, share, (dk_part, &mut dk));
        add_partial_gradients(sizes, share, (dv_part, &mut dv));
    }
    let (shape, kv_shape) = (q.layout().shape().to_vec(), k.layout().shape().to_vec());
    [tensor(dq, &shape), tensor(dk, &kv_shape), tensor(dv, &kv_shape)]
}

/// Adds a partial gradient to the gradient of all keys (or values).
fn add_partial_gradients(sizes: AttentionShape, share: &PartialKvGradients, (from, to): (&[f32], &mut [f32])) {
    let ((row, head), stride) = (share.row_and_head, sizes.kv_heads * sizes.dim);
    for (key, from) in share.span.clone().zip(from.chunks_exact(sizes.dim)) {
        let start = (row * sizes.keys + key) * stride + head * sizes.dim;
        add(&mut to[start..start + sizes.dim], from);
    }
}

/// Computes the gradients of one tile. With the attention weights `P` and `δ = Σ P·(dy·Vᵀ)`, which equals
/// `Σ output·dy`: `dV += Pᵀ·dy`, `dS = P·(dy·Vᵀ - δ)`, `dK += dSᵀ·q`, `dq = dS·K`.
fn backward_tile(
    sizes: AttentionShape,
    place: (usize, usize),
    (tile, visible, part): (&Range<usize>, &KeyRanges, &Range<usize>),
    ([k, v], [q, lse, dy]): ([KvView<'_>; 2], [&[f32]; 3]),
    (dq, sums): (&DisjointSlices, &mut [f32]),
) {
    let (span, m) = (visible.span(tile.clone()), tile.len() * sizes.group);
    let (n, dim) = (span.len(), sizes.dim);
    if span.is_empty() {
        // SAFETY: the ranges lie in `dq`, which is as long as the queries, and only this tile has these queries of this
        // group of heads.
        tile.clone().for_each(|query| unsafe { dq.write(sizes.group_range(place, query), |dq| dq.fill(0.0)) });
        return;
    }
    with_scratch(m * (3 * dim + 2 * n), |scratch| {
        let (queries, rest) = scratch.split_at_mut(m * dim);
        let (d_out, rest) = rest.split_at_mut(m * dim);
        let (d_queries, rest) = rest.split_at_mut(m * dim);
        let (weights, d_scores) = rest.split_at_mut(m * n);
        gather_queries(sizes, place, tile, (q, queries), sizes.scale());
        gather_queries(sizes, place, tile, (dy, d_out), 1.0);
        let (keys, all) = (sizes.head_matrix(k, place, &span), |x| Matrix::new(x, [m, dim]));
        sgemm(
            GemmOutput { values: weights, stride: n, accumulate: false },
            all(queries),
            keys.transposed(),
            1.0,
            Threads::One,
        );
        let keys_back = sizes.head_matrix(v, place, &span).transposed();
        sgemm(GemmOutput { values: d_scores, stride: n, accumulate: false }, all(d_out), keys_back, 1.0, Threads::One);
        vectorized(
            #[inline(always)]
            || {
                for row in 0..m {
                    let (query, member) = (tile.start + row / sizes.group, row % sizes.group);
                    let lse = lse[sizes.lse_index(place, member) + query];
                    let cells = row * n..(row + 1) * n;
                    let pair = (&mut weights[cells.clone()], &mut d_scores[cells]);
                    softmax_backward(pair, visible.of_query(query), span.start, lse);
                }
            },
        );
        let (dk, dv) = sums.split_at_mut(part.len() * dim);
        let share = (span.start - part.start) * dim..(span.end - part.start) * dim;
        let cells = |x| Matrix::new(x, [m, n]);
        let to = GemmOutput { values: &mut dv[share.clone()], stride: dim, accumulate: true };
        sgemm(to, cells(weights).transposed(), all(d_out), 1.0, Threads::One);
        let to = GemmOutput { values: &mut dk[share], stride: dim, accumulate: true };
        sgemm(to, cells(d_scores).transposed(), all(queries), 1.0, Threads::One);
        let to = GemmOutput { values: d_queries, stride: dim, accumulate: false };
        sgemm(to, cells(d_scores), keys, sizes.scale(), Threads::One);
        for (query, d_queries) in tile.clone().zip(d_queries.chunks_exact(sizes.group * dim)) {
            // SAFETY: the range lies in `dq`, which is as long as the queries, and only this tile has this query of
            // this group of heads.
            unsafe { dq.write(sizes.group_range(place, query), |dq| dq.copy_from_slice(d_queries)) };
        }
    });
}

/// Replaces scores by attention weights, and the gradients of the weights (`d`) by those of the scores; both are 0 for
/// masked keys.
#[inline(always)]
fn softmax_backward((weights, d): (&mut [f32], &mut [f32]), ranges: &[Range<usize>], start: usize, lse: f32) {
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
