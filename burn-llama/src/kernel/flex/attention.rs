//! Attention in tiles: a block of queries of all heads that share keys against the keys it can see. Only the log-sum-exp
//! of the scores is kept (Dao, 2023, arXiv:2307.08691).

use super::{
    buffer::{contiguous, tensor, unwritten, values, with_scratch},
    lanes::{add, dot, exp, exp_sum, max, scaled, vectorized},
    visible::Visible,
};
use crate::kernel::Visibility;
use burn::backend::Flex;
use burn_flex::FlexTensor;
use burn_peft::kernel::matrix::{Matrix, Output, Threads, product};
use rayon::prelude::*;
use std::ops::Range;

/// Rows of scores in a tile: queries times the heads that share keys.
const TILE: usize = 192;
/// Queries whose share of the gradients of keys and values is summed by one thread. Fixed, so that the order of the sums does
/// not depend on the number of threads.
const PART: usize = 512;

/// The sizes of one call.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    queries: usize,
    keys: usize,
    /// Heads that share a key head.
    group: usize,
    kv_heads: usize,
    dim: usize,
}

impl Sizes {
    fn of(q: &FlexTensor, k: &FlexTensor) -> Self {
        let [_, queries, heads, dim] = q.layout().shape().dims();
        let [_, keys, kv_heads, _] = k.layout().shape().dims();
        Self { queries, keys, group: heads / kv_heads, kv_heads, dim }
    }

    /// Queries of a tile.
    fn block(&self) -> usize {
        (TILE / self.group).max(1)
    }

    /// The queries of every tile of `range`.
    fn tiles(self, range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let (block, end) = (self.block(), range.end);
        range.step_by(block).map(move |from| from..end.min(from + block))
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// Where the values of `head`'s group for one query of `row` lie in queries and outputs.
    fn group_at(&self, (row, head): (usize, usize), query: usize) -> Range<usize> {
        let width = self.group * self.dim;
        let start = ((row * self.queries + query) * self.kv_heads + head) * width;
        start..start + width
    }

    /// The keys (or values) `range` of one head of one row, `[range.len(), dim]`.
    fn keys_of<'a>(&self, x: Keys<'a>, (row, head): (usize, usize), range: &Range<usize>) -> Matrix<'a> {
        let stride = self.kv_heads * self.dim;
        let shape = [range.len(), self.dim];
        if range.is_empty() {
            return Matrix::new(&[], shape);
        }
        let start = row * x.row + range.start * stride + head * self.dim;
        Matrix::strided(&x.values[start..], shape, stride)
    }

    /// Where the log-sum-exp of one head of the group stands for query 0: `[rows, kv_heads, group, queries]`.
    fn lse_at(&self, (row, head): (usize, usize), member: usize) -> usize {
        ((row * self.kv_heads + head) * self.group + member) * self.queries
    }
}

/// Keys or values `[rows, keys, kv_heads, dim]` where they lie, possibly the filled part of a larger buffer.
#[derive(Clone, Copy)]
struct Keys<'a> {
    values: &'a [f32],
    /// From one row to the next.
    row: usize,
}

impl<'a> Keys<'a> {
    fn of(tensor: &'a FlexTensor) -> Self {
        let layout = tensor.layout();
        Self { values: &tensor.storage::<f32>()[layout.start_offset()..], row: layout.strides()[0] as usize }
    }
}

/// The tensor with the keys of every row in order; a part of a buffer stays where it is.
fn in_rows(tensor: FlexTensor) -> FlexTensor {
    let [_, _, heads, dim]: [usize; 4] = tensor.layout().shape().dims();
    let in_order = tensor.layout().strides()[1..] == [(heads * dim) as isize, dim as isize, 1];
    if in_order && tensor.layout().strides()[0] >= 0 { tensor } else { contiguous(tensor) }
}

/// A buffer of which tasks write disjoint places.
struct Shared(*mut f32);
// SAFETY: every task writes only the places of its own head and queries.
unsafe impl Sync for Shared {}

impl Shared {
    /// # Safety
    /// No two tasks may write the same place, and the range must lie in the buffer.
    unsafe fn write(&self, at: Range<usize>, work: impl FnOnce(&mut [f32])) {
        // SAFETY: the caller's promise.
        work(unsafe { std::slice::from_raw_parts_mut(self.0.add(at.start), at.len()) });
    }
}

pub(super) fn forward(qkv: [FlexTensor; 3], visibility: &Visibility<Flex>) -> (FlexTensor, FlexTensor) {
    let [q, k, v] = qkv;
    let (q, k, v) = (contiguous(q), in_rows(k), in_rows(v));
    let (sizes, rows) = (Sizes::of(&q, &k), q.layout().shape()[0]);
    let visible = Visible::rows(visibility);
    let (mut output, mut lse) =
        (unwritten(values(&q).len()), unwritten(rows * sizes.kv_heads * sizes.group * sizes.queries));
    let (out, sums) = (Shared(output.as_mut_ptr()), Shared(lse.as_mut_ptr()));
    let tiles: Vec<_> = sizes.tiles(0..sizes.queries).collect();
    (0..rows * sizes.kv_heads * tiles.len()).into_par_iter().for_each(|task| {
        let (index, tile) = (task / tiles.len(), &tiles[task % tiles.len()]);
        let place = (index / sizes.kv_heads, index % sizes.kv_heads);
        let keys = [Keys::of(&k), Keys::of(&v)];
        forward_tile(sizes, place, (tile, &visible[place.0]), (values(&q), keys), [&out, &sums]);
    });
    let shape = q.layout().shape().to_vec();
    (tensor(output, &shape), tensor(lse, &[rows, sizes.kv_heads, sizes.group, sizes.queries]))
}

fn forward_tile(
    sizes: Sizes,
    place: (usize, usize),
    (tile, visible): (&Range<usize>, &Visible),
    (q, [k, v]): (&[f32], [Keys<'_>; 2]),
    [out, lse]: [&Shared; 2],
) {
    let (span, m) = (visible.span(tile.clone()), tile.len() * sizes.group);
    let (n, dim) = (span.len(), sizes.dim);
    with_scratch(m * (2 * dim + n + 1), |scratch| {
        let (queries, rest) = scratch.split_at_mut(m * dim);
        let (mixed, rest) = rest.split_at_mut(m * dim);
        let (scores, sums) = rest.split_at_mut(m * n);
        gather(sizes, place, tile, (q, queries), sizes.scale());
        let keys = sizes.keys_of(k, place, &span).transposed();
        let to = Output { values: scores, stride: n, add: false };
        product(to, Matrix::new(queries, [m, dim]), keys, 1.0, Threads::One);
        vectorized(
            #[inline(always)]
            || {
                for (row, sum) in sums.iter_mut().enumerate() {
                    let query = tile.start + row / sizes.group;
                    let at = sizes.lse_at(place, row % sizes.group) + query;
                    let scores = &mut scores[row * n..(row + 1) * n];
                    let (inverse, log) = softmax(scores, visible.of(query), span.start);
                    *sum = inverse;
                    // SAFETY: this place belongs to this query of this head.
                    unsafe { lse.write(at..at + 1, |lse| lse[0] = log) };
                }
            },
        );
        let to = Output { values: mixed, stride: dim, add: false };
        product(to, Matrix::new(scores, [m, n]), sizes.keys_of(v, place, &span), 1.0, Threads::One);
        for (index, query) in tile.clone().enumerate() {
            let at = sizes.group_at(place, query);
            let mixed = mixed[index * at.len()..(index + 1) * at.len()].chunks_exact(dim);
            let sums = &sums[index * sizes.group..];
            // SAFETY: this place belongs to this query of this group of heads.
            unsafe {
                out.write(at, |out| {
                    for ((out, mixed), &sum) in out.chunks_exact_mut(dim).zip(mixed).zip(sums) {
                        scaled(out, mixed, sum);
                    }
                });
            }
        }
    });
}

/// Copies the queries of a tile side by side, row by row of scores: `[tile · group, dim]`.
fn gather(sizes: Sizes, place: (usize, usize), tile: &Range<usize>, (from, to): (&[f32], &mut [f32]), factor: f32) {
    let width = sizes.group * sizes.dim;
    for (query, to) in tile.clone().zip(to.chunks_exact_mut(width)) {
        scaled(to, &from[sizes.group_at(place, query)], factor);
    }
}

/// Scores → weights that are not normalised yet, hidden ones 0. Returns 1 / their sum, and the log-sum-exp.
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
    // A query that sees nothing gets nothing.
    if ranges.is_empty() { (0.0, 0.0) } else { (1.0 / sum, largest + sum.ln()) }
}

/// Gradients of the keys and values that the queries of one part see.
struct Share {
    place: (usize, usize),
    span: Range<usize>,
    /// `[2, span, dim]`.
    sums: Vec<f32>,
}

pub(super) fn backward(qkv: [FlexTensor; 3], visibility: &Visibility<Flex>, saved: [FlexTensor; 2]) -> [FlexTensor; 3] {
    let ([q, k, v], [lse, dy]) = (qkv.map(contiguous), saved.map(contiguous));
    let (sizes, rows) = (Sizes::of(&q, &k), q.layout().shape()[0]);
    let visible = Visible::rows(visibility);
    let mut dq = unwritten(values(&q).len());
    let gradient = Shared(dq.as_mut_ptr());
    let parts: Vec<_> = (0..sizes.queries).step_by(PART).map(|from| from..sizes.queries.min(from + PART)).collect();
    let inputs = ([Keys::of(&k), Keys::of(&v)], [&q, &lse, &dy].map(values));
    let share = |task: usize| {
        let (index, part) = (task / parts.len(), parts[task % parts.len()].clone());
        let place = (index / sizes.kv_heads, index % sizes.kv_heads);
        let visible = &visible[place.0];
        let span = visible.span(part.clone());
        let mut sums = vec![0.0; 2 * span.len() * sizes.dim];
        for tile in sizes.tiles(part) {
            backward_tile(sizes, place, (&tile, visible, &span), inputs, (&gradient, &mut sums));
        }
        Share { place, span, sums }
    };
    let shares: Vec<Share> = (0..rows * sizes.kv_heads * parts.len()).into_par_iter().map(share).collect();
    let (mut dk, mut dv) = (vec![0.0; values(&k).len()], vec![0.0; values(&v).len()]);
    for share in &shares {
        let (dk_part, dv_part) = share.sums.split_at(share.sums.len() / 2);
        spread(sizes, share, (dk_part, &mut dk));
        spread(sizes, share, (dv_part, &mut dv));
    }
    let (shape, kv_shape) = (q.layout().shape().to_vec(), k.layout().shape().to_vec());
    [tensor(dq, &shape), tensor(dk, &kv_shape), tensor(dv, &kv_shape)]
}

/// Adds a share to the gradient of all keys.
fn spread(sizes: Sizes, share: &Share, (from, to): (&[f32], &mut [f32])) {
    let ((row, head), stride) = (share.place, sizes.kv_heads * sizes.dim);
    for (key, from) in share.span.clone().zip(from.chunks_exact(sizes.dim)) {
        let start = (row * sizes.keys + key) * stride + head * sizes.dim;
        add(&mut to[start..start + sizes.dim], from);
    }
}

/// With `P` the weights and `δ = Σ P·(dy·Vᵀ)`, which is `Σ output·dy`: `dV += Pᵀ·dy`, `dS = P·(dy·Vᵀ - δ)`, `dK += dSᵀ·q`, `dq = dS·K`.
fn backward_tile(
    sizes: Sizes,
    place: (usize, usize),
    (tile, visible, part): (&Range<usize>, &Visible, &Range<usize>),
    ([k, v], [q, lse, dy]): ([Keys<'_>; 2], [&[f32]; 3]),
    (dq, sums): (&Shared, &mut [f32]),
) {
    let (span, m) = (visible.span(tile.clone()), tile.len() * sizes.group);
    let (n, dim) = (span.len(), sizes.dim);
    if span.is_empty() {
        // SAFETY: these places belong to these queries of this group of heads.
        tile.clone().for_each(|query| unsafe { dq.write(sizes.group_at(place, query), |dq| dq.fill(0.0)) });
        return;
    }
    with_scratch(m * (3 * dim + 2 * n), |scratch| {
        let (queries, rest) = scratch.split_at_mut(m * dim);
        let (d_out, rest) = rest.split_at_mut(m * dim);
        let (d_queries, rest) = rest.split_at_mut(m * dim);
        let (weights, d_scores) = rest.split_at_mut(m * n);
        gather(sizes, place, tile, (q, queries), sizes.scale());
        gather(sizes, place, tile, (dy, d_out), 1.0);
        let (keys, all) = (sizes.keys_of(k, place, &span), |x| Matrix::new(x, [m, dim]));
        product(Output { values: weights, stride: n, add: false }, all(queries), keys.transposed(), 1.0, Threads::One);
        let keys_back = sizes.keys_of(v, place, &span).transposed();
        product(Output { values: d_scores, stride: n, add: false }, all(d_out), keys_back, 1.0, Threads::One);
        vectorized(
            #[inline(always)]
            || {
                for row in 0..m {
                    let (query, member) = (tile.start + row / sizes.group, row % sizes.group);
                    let lse = lse[sizes.lse_at(place, member) + query];
                    let cells = row * n..(row + 1) * n;
                    let pair = (&mut weights[cells.clone()], &mut d_scores[cells]);
                    soften(pair, visible.of(query), span.start, lse);
                }
            },
        );
        let (dk, dv) = sums.split_at_mut(part.len() * dim);
        let share = (span.start - part.start) * dim..(span.end - part.start) * dim;
        let cells = |x| Matrix::new(x, [m, n]);
        let to = Output { values: &mut dv[share.clone()], stride: dim, add: true };
        product(to, cells(weights).transposed(), all(d_out), 1.0, Threads::One);
        let to = Output { values: &mut dk[share], stride: dim, add: true };
        product(to, cells(d_scores).transposed(), all(queries), 1.0, Threads::One);
        let to = Output { values: d_queries, stride: dim, add: false };
        product(to, cells(d_scores), keys, sizes.scale(), Threads::One);
        for (query, d_queries) in tile.clone().zip(d_queries.chunks_exact(sizes.group * dim)) {
            // SAFETY: this place belongs to this query of this group of heads.
            unsafe { dq.write(sizes.group_at(place, query), |dq| dq.copy_from_slice(d_queries)) };
        }
    });
}

/// Scores → weights, and gradients of weights → gradients of scores; hidden ones are 0 in both.
#[inline(always)]
fn soften((weights, d): (&mut [f32], &mut [f32]), ranges: &[Range<usize>], start: usize, lse: f32) {
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
