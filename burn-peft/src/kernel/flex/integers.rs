//! Products of packed rows with few rows of activations by integers: of bytes where the machine multiplies those (AVX-512 with
//! VNNI), of words in 256-bit vectors elsewhere ([`Narrow`]).
//!
//! The weights stay the small integers that their blocks hold; each 32 activations become 16-bit integers times a scale, off
//! by at most `1/65278` of the largest among them. Sums of 4 or 8 products are exact; they are scaled and added up in f32. Every
//! row is summed by itself, so results do not depend on who shares the work.
//!
//! In loops over blocks there are no closures and no iterators: the compiler leaves them calls, for want of their own features.
#![allow(clippy::needless_range_loop)]

mod fixed;
mod formats;
mod narrow;

pub(super) use narrow::Narrow;

use super::rows::Bytes;
use crate::{
    kernel::instructions::{Instructions, allowed},
    packed::BlockType,
};
use fixed::Group;
use formats::{Format, Nibbles, Q4K, Q6K, Q8};
use std::{arch::x86_64::*, cell::RefCell};

/// Products of some packed rows with rows of activations.
type Product = unsafe fn(&Integers, Bytes<'_>, &mut [f32]);

thread_local! {
    /// Memory that the thread had groups in.
    static GROUPS: RefCell<Vec<Vec<Group>>> = const { RefCell::new(Vec::new()) };
}

impl Drop for Integers {
    fn drop(&mut self) {
        let groups = std::mem::take(&mut self.groups);
        GROUPS.with_borrow_mut(|all| all.push(groups));
    }
}

/// Rows of activations, and what multiplies them with packed rows.
pub(super) struct Integers {
    groups: Vec<Group>,
    /// Groups of a row.
    per_row: usize,
    product: Product,
}

impl Integers {
    /// Rows of `features` activations for weights of that format; `None` where floats serve.
    pub(super) fn new(kind: BlockType, x: &[f32], features: usize) -> Option<Self> {
        let product: Product = match kind {
            BlockType::Q4_0 => product::<Nibbles<9, false, false>>,
            BlockType::Q4_1 => product::<Nibbles<10, true, false>>,
            BlockType::Q5_0 => product::<Nibbles<11, false, true>>,
            BlockType::Q5_1 => product::<Nibbles<12, true, true>>,
            BlockType::Q8_0 => product::<Q8>,
            BlockType::Q4_K => product::<Q4K>,
            BlockType::Q6_K => product::<Q6K>,
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => return None,
        };
        available().then(|| {
            let mut groups = GROUPS.with_borrow_mut(Vec::pop).unwrap_or_default();
            // SAFETY: it is available.
            unsafe { fixed::fill(&mut groups, x, features) };
            Self { groups, per_row: features.div_ceil(fixed::LENGTH), product }
        })
    }

    /// The products of rows with every row of activations, until `y` is full.
    pub(super) fn multiply(&self, rows: Bytes<'_>, y: &mut [f32]) {
        // SAFETY: there are no `Integers` where it is not available.
        unsafe { (self.product)(self, rows, y) }
    }
}

/// Whether this machine can.
pub(super) fn available() -> bool {
    allowed() >= Instructions::Avx512
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
}

/// # Safety
/// It is [`available`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn product<F: Format>(x: &Integers, rows: Bytes<'_>, y: &mut [f32]) {
    let tokens = x.groups.len() / x.per_row;
    for index in 0..y.len() {
        let (row, token) = (index / tokens, index % tokens);
        y[index] = dot::<F>(rows.row(row), &x.groups[token * x.per_row..][..x.per_row]);
    }
}

/// The product of a row with a row of activations.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn dot<F: Format>(row: &[u8], x: &[Group]) -> f32 {
    let (whole, mut sums) = (row.len() / F::BYTES, _mm512_setzero_ps());
    for part in 0..whole {
        // SAFETY: this function has the features that it takes.
        sums = unsafe { F::add(sums, &row[part * F::BYTES..][..F::BYTES], &x[part * F::GROUPS..][..F::GROUPS]) };
    }
    let rest = &row[whole * F::BYTES..];
    if !rest.is_empty() {
        // SAFETY: as above.
        sums = unsafe { F::add(sums, rest, &x[whole * F::GROUPS..]) };
    }
    _mm512_reduce_add_ps(sums)
}

#[cfg(test)]
mod tests;
