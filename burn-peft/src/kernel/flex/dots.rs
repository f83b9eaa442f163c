//! Products of rows of f32 or bf16 with few rows of activations: each row is read once, in the order of memory, and asked for some
//! way ahead. In four independent sums of vectors, each row by itself, so results do not depend on who shares the work.

use super::rows::{Bytes, ask};
use crate::kernel::scratch::{Lent, simd};
use burn::tensor::DType;
use pulp::{Simd, WithSimd};
use std::mem::size_of_val;

/// Bytes that lie between what is read and what is asked for.
const AHEAD: usize = 1 << 11;
/// Independent sums.
const SUMS: usize = 4;

/// Rows of activations for weights of a type.
pub(super) enum Dots<'a> {
    /// For f32, as they are.
    Floats(&'a [f32]),
    /// For bf16, of each row those of even index and then the others: a word holds one of each.
    Halves(Lent),
}

impl<'a> Dots<'a> {
    /// Rows of activations for rows of that type; `None` if they are to be decoded.
    pub(super) fn new(dtype: DType, x: &'a [f32], rows: &Bytes<'_>) -> Option<Self> {
        let features = rows.features;
        match dtype {
            _ if !rows.row_alone(0).as_ptr().cast::<u32>().is_aligned() => None,
            DType::F32 => Some(Self::Floats(x)),
            DType::BF16 if features.is_multiple_of(2) => {
                let every_other = |row: &'a [f32], from| row[from..].iter().step_by(2).copied();
                let parted = move |row| every_other(row, 0).chain(every_other(row, 1));
                Some(Self::Halves(Lent::of(x.chunks_exact(features).flat_map(parted))))
            }
            _ => None,
        }
    }

    /// The products of rows with every row of activations, until `y` is full.
    pub(super) fn multiply(&self, rows: Bytes<'_>, y: &mut [f32]) {
        simd(Multiply { x: self, rows, y });
    }
}

struct Multiply<'a> {
    x: &'a Dots<'a>,
    rows: Bytes<'a>,
    y: &'a mut [f32],
}

impl WithSimd for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let features = self.rows.features;
        let (x, halved) = match self.x {
            Dots::Floats(x) => (*x, false),
            Dots::Halves(x) => (&**x, true),
        };
        let tokens = x.len() / features;
        for (index, y) in self.y.iter_mut().enumerate() {
            let (row, token) = (index / tokens, index % tokens);
            let (row, x) = (words(self.rows.row_alone(row)), &x[token * features..][..features]);
            *y = if halved {
                let (even, odd) = x.split_at(features / 2);
                halves(simd, row, even, odd)
            } else {
                floats(simd, row, x)
            };
        }
    }
}

/// The words of a row.
#[inline(always)]
fn words(row: &[u8]) -> &[u32] {
    // SAFETY: every word is one; rows start where words do, by [`Dots::new`].
    let (before, words, _) = unsafe { row.align_to() };
    debug_assert!(before.is_empty());
    words
}

/// Asks for what lies ahead of `part`.
#[inline(always)]
fn ask_after<T>(part: &T) {
    let start = std::ptr::from_ref(part).cast::<u8>();
    (0..size_of_val(part)).step_by(64).for_each(|line| ask(start.wrapping_add(AHEAD + line)));
}

#[inline(always)]
fn floats<S: Simd>(simd: S, row: &[u32], x: &[f32]) -> f32 {
    let ((row, row_rest), (x, x_rest)) = (S::as_simd_u32s(row), S::as_simd_f32s(x));
    let ((parts, row), (x_parts, x)) = (pulp::as_arrays::<SUMS, _>(row), pulp::as_arrays::<SUMS, _>(x));
    let mut sums = [simd.splat_f32s(0.0); SUMS];
    for part in 0..parts.len().min(x_parts.len()) {
        ask_after(&parts[part]);
        for i in 0..SUMS {
            sums[i] = simd.mul_add_e_f32s(simd.transmute_f32s_u32s(parts[part][i]), x_parts[part][i], sums[i]);
        }
    }
    for i in 0..row.len().min(x.len()) {
        sums[0] = simd.mul_add_e_f32s(simd.transmute_f32s_u32s(row[i]), x[i], sums[0]);
    }
    let (row, x) = (simd.partial_load_u32s(row_rest), simd.partial_load_f32s(x_rest));
    sums[1] = simd.mul_add_e_f32s(simd.transmute_f32s_u32s(row), x, sums[1]);
    total(simd, sums)
}

#[inline(always)]
fn halves<S: Simd>(simd: S, row: &[u32], even: &[f32], odd: &[f32]) -> f32 {
    let (row, row_rest) = S::as_simd_u32s(row);
    let ((even, even_rest), (odd, odd_rest)) = (S::as_simd_f32s(even), S::as_simd_f32s(odd));
    let (pairs, single) = pulp::as_arrays::<2, _>(row);
    let [mut a, mut b, mut c, mut d] = [simd.splat_f32s(0.0); SUMS];
    for pair in 0..pairs.len().min(even.len() / 2).min(odd.len() / 2) {
        ask_after(&pairs[pair]);
        (a, b) = add_pairs(simd, pairs[pair][0], [even[2 * pair], odd[2 * pair]], (a, b));
        (c, d) = add_pairs(simd, pairs[pair][1], [even[2 * pair + 1], odd[2 * pair + 1]], (c, d));
    }
    if let ([row], Some(&even), Some(&odd)) = (single, even.last(), odd.last()) {
        (a, b) = add_pairs(simd, *row, [even, odd], (a, b));
    }
    let (even, odd) = (simd.partial_load_f32s(even_rest), simd.partial_load_f32s(odd_rest));
    (c, d) = add_pairs(simd, simd.partial_load_u32s(row_rest), [even, odd], (c, d));
    total(simd, [a, b, c, d])
}

/// Adds the products of words of two bf16 with what meets the first and the second of each.
#[inline(always)]
fn add_pairs<S: Simd>(simd: S, row: S::u32s, x: [S::f32s; 2], (low, high): (S::f32s, S::f32s)) -> (S::f32s, S::f32s) {
    let first = simd.wrapping_dyn_shl_u32s(row, simd.splat_u32s(16));
    let second = simd.and_u32s(row, simd.splat_u32s(0xffff_0000));
    let low = simd.mul_add_e_f32s(simd.transmute_f32s_u32s(first), x[0], low);
    (low, simd.mul_add_e_f32s(simd.transmute_f32s_u32s(second), x[1], high))
}

#[inline(always)]
fn total<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; SUMS]) -> f32 {
    simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)))
}
