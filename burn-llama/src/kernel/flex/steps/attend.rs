//! Attention of one query of every row.

use crate::kernel::{
    Visibility,
    flex::{
        elementwise,
        lanes::{exp_sum, max, vectorized},
    },
};
use burn::backend::Flex;
use burn_peft::kernel::scratch::simd;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

/// Values of keys that are worth other threads.
const SERIAL: usize = 1 << 14;

/// Of a model's heads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) kv_heads: usize,
    /// Heads that share a key head.
    pub(super) group: usize,
    pub(super) dim: usize,
}

/// The slots that a query of segment 1 at `position` sees: those before `slot`, its own.
pub(super) fn see(
    [segments, positions]: [&[i32]; 2],
    (slot, position): (usize, usize),
    window: Option<usize>,
    seen: &mut Vec<Range<usize>>,
) {
    let visible = |slot: usize| {
        let (segment, distance) = (segments[slot], position as i64 - i64::from(positions[slot]));
        let near = distance >= 0 && window.is_none_or(|window| distance < window as i64);
        near && (segment == 1 || segment == Visibility::<Flex>::ANY)
    };
    seen.clear();
    for slot in (0..slot).filter(|&slot| visible(slot)).chain([slot]) {
        match seen.last_mut() {
            Some(last) if last.end == slot => last.end += 1,
            _ => seen.push(slot..slot + 1),
        }
    }
}

/// Rotates the halves of every head of every row.
pub(super) fn rotate(x: &mut [f32], rows: usize, dim: usize, tables: [&[f32]; 2]) {
    let (width, half) = (x.len() / rows, dim / 2);
    vectorized(
        #[inline(always)]
        || {
            for (row, x) in x.chunks_exact_mut(width).enumerate() {
                let [cos, sin] = tables.map(|table| &table[row * half..(row + 1) * half]);
                x.chunks_exact_mut(dim).for_each(|head| elementwise::rotate(head, cos, sin));
            }
        },
    );
}

/// Softmax attention of one query of every row, over the slots that it sees.
pub(super) fn attend(
    sizes: Sizes,
    (q, [keys, values], capacity): (&[f32], [&[f32]; 2], usize),
    seen: &[Vec<Range<usize>>],
    (scores, mixed): (&mut [f32], &mut [f32]),
) {
    let Sizes { kv_heads, group, dim } = sizes;
    let width = kv_heads * dim;
    let one = |(task, (scores, mixed)): (usize, (&mut [f32], &mut [f32]))| {
        let (row, head) = (task / kv_heads, task % kv_heads);
        let start = row * capacity * width + head * dim;
        let queries = &q[task * group * dim..(task + 1) * group * dim];
        simd(Head { sizes, queries, keys: &keys[start..], values: &values[start..], seen: &seen[row], scores, mixed });
    };
    let visible: usize = seen.iter().flatten().map(Range::len).sum();
    if visible * width < SERIAL {
        scores.chunks_exact_mut(group * capacity).zip(mixed.chunks_exact_mut(group * dim)).enumerate().for_each(one);
    } else {
        let parts = scores.par_chunks_exact_mut(group * capacity).zip(mixed.par_chunks_exact_mut(group * dim));
        parts.enumerate().for_each(one);
    }
}

/// The heads that share a key head.
struct Head<'a> {
    sizes: Sizes,
    /// `[group, dim]`.
    queries: &'a [f32],
    /// From one slot to the next `kv_heads · dim`.
    keys: &'a [f32],
    values: &'a [f32],
    seen: &'a [Range<usize>],
    /// `[group, capacity]`.
    scores: &'a mut [f32],
    /// `[group, dim]`.
    mixed: &'a mut [f32],
}

impl WithSimd for Head<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { sizes: Sizes { kv_heads, dim, .. }, queries, keys, values, seen, scores, mixed } = self;
        let (width, capacity) = (kv_heads * dim, scores.len() / self.sizes.group);
        let scale = 1.0 / (dim as f32).sqrt();
        for member in 0..self.sizes.group {
            let query = &queries[member * dim..][..dim];
            let scores = &mut scores[member * capacity..][..capacity];
            let mut n = 0;
            for range in seen {
                for slot in range.clone() {
                    scores[n] = dot(simd, query, &keys[slot * width..][..dim]) * scale;
                    n += 1;
                }
            }
            let scores = &mut scores[..n];
            let largest = max(scores);
            let sum = exp_sum(scores, largest);
            let mixed = &mut mixed[member * dim..][..dim];
            mixed.fill(0.0);
            let mut n = 0;
            for range in seen {
                for slot in range.clone() {
                    add_times(simd, mixed, &values[slot * width..][..dim], scores[n]);
                    n += 1;
                }
            }
            mixed.iter_mut().for_each(|value| *value /= sum);
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

/// `y += factor · x`.
#[inline(always)]
fn add_times<S: Simd>(simd: S, y: &mut [f32], x: &[f32], factor: f32) {
    let ((y, y_rest), (x, x_rest)) = (S::as_mut_simd_f32s(y), S::as_simd_f32s(x));
    let factors = simd.splat_f32s(factor);
    for i in 0..y.len().min(x.len()) {
        y[i] = simd.mul_add_e_f32s(factors, x[i], y[i]);
    }
    for i in 0..y_rest.len().min(x_rest.len()) {
        y_rest[i] += factor * x_rest[i];
    }
}
