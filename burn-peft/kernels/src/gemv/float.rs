//! GEMV on rows of f32 or bf16: each row is read once, in the order of memory, and prefetched. Four independent vector
//! accumulators are summed for each row by itself, so results do not depend on how the rows are distributed over
//! threads.

use crate::{
    instructions::dispatch_simd,
    scratch::PooledVec,
    weight_rows::{RawRows, prefetch},
};
use burn::tensor::DType;
use pulp::{Simd, WithSimd};
use std::mem::size_of_val;

/// Bytes from the memory that is read to the memory that is prefetched.
const PREFETCH_BYTES: usize = 1 << 11;
/// The number of independent accumulators, in vectors.
const ACCUMULATORS: usize = 4;

/// Rows of activations in the order that the weight type requires.
pub(super) enum FloatInput<'a> {
    /// The activations in their order, for f32 weights.
    F32(&'a [f32]),
    /// For bf16 weights, the activations of even index of each row before those of odd index: a 32-bit word of the
    /// weight holds one of each.
    Bf16(PooledVec),
}

impl<'a> FloatInput<'a> {
    /// Prepares rows of activations for weight rows of that type; `None` if the weight must be decoded instead.
    pub(super) fn new(dtype: DType, x: &'a [f32], rows: &RawRows<'_>) -> Option<Self> {
        let features = rows.features;
        match dtype {
            _ if !rows.row_unprefetched(0).as_ptr().cast::<u32>().is_aligned() => None,
            DType::F32 => Some(Self::F32(x)),
            DType::BF16 if features.is_multiple_of(2) => {
                let every_other = |row: &'a [f32], from| row[from..].iter().step_by(2).copied();
                let parted = move |row| every_other(row, 0).chain(every_other(row, 1));
                Some(Self::Bf16(PooledVec::collect(x.chunks_exact(features).flat_map(parted))))
            }
            _ => None,
        }
    }

    /// Computes the products of weight rows with every row of activations, until `y` is full.
    pub(super) fn multiply(&self, rows: RawRows<'_>, y: &mut [f32]) {
        dispatch_simd(FloatGemv { x: self, rows, y });
    }
}

/// The product of weight rows with rows of activations, generic over the vector type.
struct FloatGemv<'a> {
    x: &'a FloatInput<'a>,
    rows: RawRows<'a>,
    y: &'a mut [f32],
}

impl WithSimd for FloatGemv<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let features = self.rows.features;
        let (x, halved) = match self.x {
            FloatInput::F32(x) => (*x, false),
            FloatInput::Bf16(x) => (&**x, true),
        };
        let tokens = x.len() / features;
        for (index, y) in self.y.iter_mut().enumerate() {
            let (row, token) = (index / tokens, index % tokens);
            let (row, x) = (as_words(self.rows.row_unprefetched(row)), &x[token * features..][..features]);
            *y = if halved {
                let (even, odd) = x.split_at(features / 2);
                dot_bf16(simd, row, even, odd)
            } else {
                dot_f32(simd, row, x)
            };
        }
    }
}

/// Returns the bytes of a row as 32-bit words.
#[inline(always)]
fn as_words(row: &[u8]) -> &[u32] {
    // SAFETY: every bit pattern is a valid u32. `FloatInput::new` refuses rows that are not aligned to words.
    let (before, words, _) = unsafe { row.align_to() };
    debug_assert!(before.is_empty());
    words
}

/// Prefetches the memory [`PREFETCH_BYTES`] beyond `part`.
#[inline(always)]
fn prefetch_after<T>(part: &T) {
    let start = std::ptr::from_ref(part).cast::<u8>();
    (0..size_of_val(part)).step_by(64).for_each(|line| prefetch(start.wrapping_add(PREFETCH_BYTES + line)));
}

/// Returns the dot product of a row of f32 with `x`.
#[inline(always)]
fn dot_f32<S: Simd>(simd: S, row: &[u32], x: &[f32]) -> f32 {
    let ((row, row_rest), (x, x_rest)) = (S::as_simd_u32s(row), S::as_simd_f32s(x));
    let ((parts, row), (x_parts, x)) = (pulp::as_arrays::<ACCUMULATORS, _>(row), pulp::as_arrays::<ACCUMULATORS, _>(x));
    let mut sums = [simd.splat_f32s(0.0); ACCUMULATORS];
    for part in 0..parts.len().min(x_parts.len()) {
        prefetch_after(&parts[part]);
        for i in 0..ACCUMULATORS {
            sums[i] = simd.mul_add_e_f32s(simd.transmute_f32s_u32s(parts[part][i]), x_parts[part][i], sums[i]);
        }
    }
    for i in 0..row.len().min(x.len()) {
        sums[0] = simd.mul_add_e_f32s(simd.transmute_f32s_u32s(row[i]), x[i], sums[0]);
    }
    let (row, x) = (simd.partial_load_u32s(row_rest), simd.partial_load_f32s(x_rest));
    sums[1] = simd.mul_add_e_f32s(simd.transmute_f32s_u32s(row), x, sums[1]);
    reduce_sum(simd, sums)
}

/// Returns the dot product of a row of bf16 with activations, split into those of even and of odd index.
#[inline(always)]
fn dot_bf16<S: Simd>(simd: S, row: &[u32], even: &[f32], odd: &[f32]) -> f32 {
    let (row, row_rest) = S::as_simd_u32s(row);
    let ((even, even_rest), (odd, odd_rest)) = (S::as_simd_f32s(even), S::as_simd_f32s(odd));
    let (pairs, single) = pulp::as_arrays::<2, _>(row);
    let [mut even_pairs, mut odd_pairs] = [[simd.splat_f32s(0.0); 2]; 2];
    for pair in 0..pairs.len().min(even.len() / 2).min(odd.len() / 2) {
        prefetch_after(&pairs[pair]);
        even_pairs = accumulate_pairs(simd, pairs[pair][0], [even[2 * pair], odd[2 * pair]], even_pairs);
        odd_pairs = accumulate_pairs(simd, pairs[pair][1], [even[2 * pair + 1], odd[2 * pair + 1]], odd_pairs);
    }
    if let ([row], Some(&even), Some(&odd)) = (single, even.last(), odd.last()) {
        even_pairs = accumulate_pairs(simd, *row, [even, odd], even_pairs);
    }
    let (even, odd) = (simd.partial_load_f32s(even_rest), simd.partial_load_f32s(odd_rest));
    odd_pairs = accumulate_pairs(simd, simd.partial_load_u32s(row_rest), [even, odd], odd_pairs);
    reduce_sum(simd, [even_pairs[0], even_pairs[1], odd_pairs[0], odd_pairs[1]])
}

/// Adds the products of words, which hold two bf16 each, with the activations of even and of odd index.
#[inline(always)]
fn accumulate_pairs<S: Simd>(simd: S, row: S::u32s, x: [S::f32s; 2], [low, high]: [S::f32s; 2]) -> [S::f32s; 2] {
    let first = simd.wrapping_dyn_shl_u32s(row, simd.splat_u32s(16));
    let second = simd.and_u32s(row, simd.splat_u32s(0xffff_0000));
    let low = simd.mul_add_e_f32s(simd.transmute_f32s_u32s(first), x[0], low);
    [low, simd.mul_add_e_f32s(simd.transmute_f32s_u32s(second), x[1], high)]
}

/// Sums four accumulators to a scalar.
#[inline(always)]
fn reduce_sum<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; ACCUMULATORS]) -> f32 {
    simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)))
}
