//! Attention of a decode step: one query per row.

use crate::{
    RowSlots,
    kernel::{
        AttentionMask,
        flex::{
            elementwise,
            vector_ops::{exp_sum, max, vectorized},
        },
    },
};
use burn::backend::Flex;
use burn_peft_kernels::instructions::dispatch_simd;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

/// The number of values of keys from which on several threads are used.
const PARALLEL_THRESHOLD: usize = 1 << 14;

/// The number and size of a model's heads.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeadShape {
    pub(super) kv_heads: usize,
    /// The number of query heads that share a key head.
    pub(super) group: usize,
    pub(super) dim: usize,
}

/// Writes to `seen` the ranges of slots visible to a query of segment 1 at `position` in the slot after `earlier`:
/// those of the earlier slots that the mask allows, and its own.
pub(super) fn visible_ranges(
    earlier: RowSlots<'_>,
    position: usize,
    window: Option<usize>,
    seen: &mut Vec<Range<usize>>,
) {
    let own = earlier.segments.len();
    let visible = |slot: usize| {
        let (segment, distance) = (earlier.segments[slot], position as i64 - i64::from(earlier.positions[slot]));
        let near = distance >= 0 && window.is_none_or(|window| distance < window as i64);
        near && (segment == 1 || segment == AttentionMask::<Flex>::ANY_SEGMENT)
    };
    seen.clear();
    for slot in (0..own).filter(|&slot| visible(slot)).chain([own]) {
        match seen.last_mut() {
            Some(last) if last.end == slot => last.end += 1,
            _ => seen.push(slot..slot + 1),
        }
    }
}

/// Rotates the halves of each head of every row.
pub(super) fn rotate_rows(x: &mut [f32], rows: usize, dim: usize, tables: [&[f32]; 2]) {
    let (width, half) = (x.len() / rows, dim / 2);
    vectorized(
        #[inline(always)]
        || {
            for (row, x) in x.chunks_exact_mut(width).enumerate() {
                let [cos, sin] = tables.map(|table| &table[row * half..(row + 1) * half]);
                x.chunks_exact_mut(dim).for_each(|head| elementwise::rotate_head(head, cos, sin));
            }
        },
    );
}

/// The keys and values of one layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct CacheSlices<'a> {
    /// The keys, `[rows, capacity, kv_heads, dim]`.
    pub(super) keys: &'a [f32],
    /// The values, laid out like the keys.
    pub(super) values: &'a [f32],
    /// The number of slots per row.
    pub(super) capacity: usize,
    /// The ranges of slots of each row that are visible to its query.
    pub(super) visible: &'a [Vec<Range<usize>>],
}

/// Computes softmax attention of one query per row over the slots visible to it: `queries` and `output`
/// `[rows, kv_heads, group, dim]`; `scores [rows, kv_heads, group, capacity]` is scratch memory.
pub(super) fn decode_attention(
    sizes: HeadShape,
    queries: &[f32],
    cache: CacheSlices<'_>,
    scores: &mut [f32],
    output: &mut [f32],
) {
    let HeadShape { kv_heads, group, dim } = sizes;
    let CacheSlices { keys, values, capacity, visible } = cache;
    let width = kv_heads * dim;
    let one = |(task, (scores, output)): (usize, (&mut [f32], &mut [f32]))| {
        let (row, head) = (task / kv_heads, task % kv_heads);
        let start = row * capacity * width + head * dim;
        dispatch_simd(QueryGroup {
            sizes,
            queries: &queries[task * group * dim..(task + 1) * group * dim],
            keys: &keys[start..],
            values: &values[start..],
            visible: &visible[row],
            scores,
            output,
        });
    };
    let num_visible: usize = visible.iter().flatten().map(Range::len).sum();
    if num_visible * width < PARALLEL_THRESHOLD {
        scores.chunks_exact_mut(group * capacity).zip(output.chunks_exact_mut(group * dim)).enumerate().for_each(one);
    } else {
        let parts = scores.par_chunks_exact_mut(group * capacity).zip(output.par_chunks_exact_mut(group * dim));
        parts.enumerate().for_each(one);
    }
}

/// Attention of the query heads of one row that share a key head.
struct QueryGroup<'a> {
    sizes: HeadShape,
    /// The queries, `[group, dim]`.
    queries: &'a [f32],
    /// The keys of the row, from those of this key head on; slots are `kv_heads · dim` values apart.
    keys: &'a [f32],
    /// The values, laid out like the keys.
    values: &'a [f32],
    /// The ranges of visible slots.
    visible: &'a [Range<usize>],
    /// Scratch memory for the scores, `[group, capacity]`.
    scores: &'a mut [f32],
    /// The output, `[group, dim]`.
    output: &'a mut [f32],
}

impl WithSimd for QueryGroup<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { sizes: HeadShape { kv_heads, dim, .. }, queries, keys, values, visible, scores, output } = self;
        let (width, capacity) = (kv_heads * dim, scores.len() / self.sizes.group);
        let scale = 1.0 / (dim as f32).sqrt();
        for member in 0..self.sizes.group {
            let query = &queries[member * dim..][..dim];
            let scores = &mut scores[member * capacity..][..capacity];
            let mut n = 0;
            for range in visible {
                for slot in range.clone() {
                    scores[n] = dot(simd, query, &keys[slot * width..][..dim]) * scale;
                    n += 1;
                }
            }
            let scores = &mut scores[..n];
            let largest = max(scores);
            let sum = exp_sum(scores, largest);
            let output = &mut output[member * dim..][..dim];
            output.fill(0.0);
            let mut n = 0;
            for range in visible {
                for slot in range.clone() {
                    axpy(simd, output, &values[slot * width..][..dim], scores[n]);
                    n += 1;
                }
            }
            output.iter_mut().for_each(|value| *value /= sum);
        }
    }
}

#[inline(always)]
fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (S::as_simd_f32s(a), S::as_simd_f32s(b));
    let mut sum = simd.mul_f32s(simd.partial_load_f32s(a_rest), simd.partial_load_f32s(b_rest));
    for i in 0..a.len().min(b.len()) {
        sum = simd.mul_add_e_f32s(a[i], b[i], sum);
    }
    simd.reduce_sum_f32s(sum)
}

/// Computes `y += factor · x`.
#[inline(always)]
fn axpy<S: Simd>(simd: S, y: &mut [f32], x: &[f32], factor: f32) {
    let ((y, y_rest), (x, x_rest)) = (S::as_mut_simd_f32s(y), S::as_simd_f32s(x));
    let factors = simd.splat_f32s(factor);
    for i in 0..y.len().min(x.len()) {
        y[i] = simd.mul_add_e_f32s(factors, x[i], y[i]);
    }
    for i in 0..y_rest.len().min(x_rest.len()) {
        y_rest[i] += factor * x_rest[i];
    }
}
