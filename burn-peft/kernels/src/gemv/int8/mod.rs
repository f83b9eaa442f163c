//! Integer GEMV with AVX-512 VNNI, which multiplies bytes: the integers of activations are split into two.
//!
//! Loops over blocks contain no closures and no iterators: the compiler does not inline them, since they lack the
//! target features of their caller.
#![allow(clippy::needless_range_loop)]

mod activations;
mod formats;

use crate::{instructions::has_avx512, packed::BlockType, weight_rows::RawRows};
use activations::ActivationGroup;
use formats::{Int8Format, NibblesInt8, Q4KInt8, Q6KInt8, Q8Int8};
use std::{arch::x86_64::*, cell::RefCell};

/// A function that multiplies packed rows with rows of activations.
type Int8GemvFn = unsafe fn(&Int8Input, RawRows<'_>, &mut [f32]);

thread_local! {
    /// Pool of the thread's allocations for groups.
    static GROUP_POOL: RefCell<Vec<Vec<ActivationGroup>>> = const { RefCell::new(Vec::new()) };
}

impl Drop for Int8Input {
    fn drop(&mut self) {
        let groups = std::mem::take(&mut self.groups);
        GROUP_POOL.with_borrow_mut(|all| all.push(groups));
    }
}

/// Rows of activations in fixed point, and the kernel that multiplies them with packed rows.
pub(super) struct Int8Input {
    groups: Vec<ActivationGroup>,
    /// Groups of a row of activations.
    groups_per_row: usize,
    gemv: Int8GemvFn,
}

impl Int8Input {
    /// Quantizes rows of `features` activations for weights of that format; returns `None` if the machine or the format
    /// has no byte kernel.
    pub(super) fn new(block_type: BlockType, x: &[f32], features: usize) -> Option<Self> {
        let gemv: Int8GemvFn = match block_type {
            BlockType::Q4_0 => gemv_rows::<NibblesInt8<9, false, false>>,
            BlockType::Q4_1 => gemv_rows::<NibblesInt8<10, true, false>>,
            BlockType::Q5_0 => gemv_rows::<NibblesInt8<11, false, true>>,
            BlockType::Q5_1 => gemv_rows::<NibblesInt8<12, true, true>>,
            BlockType::Q8_0 => gemv_rows::<Q8Int8>,
            BlockType::Q4_K => gemv_rows::<Q4KInt8>,
            BlockType::Q6_K => gemv_rows::<Q6KInt8>,
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => return None,
        };
        has_avx512_vnni().then(|| {
            let mut groups = GROUP_POOL.with_borrow_mut(Vec::pop).unwrap_or_default();
            // SAFETY: `has_avx512_vnni` returned true, so the CPU has the target features of the function.
            unsafe { activations::quantize_rows(&mut groups, x, features) };
            Self { groups, groups_per_row: features.div_ceil(activations::GROUP_LEN), gemv }
        })
    }

    /// Computes the products of weight rows with every row of activations, until `y` is full.
    pub(super) fn multiply(&self, rows: RawRows<'_>, y: &mut [f32]) {
        // SAFETY: `Int8Input::new` creates a value only if `has_avx512_vnni` returns true.
        unsafe { (self.gemv)(self, rows, y) }
    }
}

/// Returns true if the machine has, and may use, AVX-512 with VNNI.
pub(super) fn has_avx512_vnni() -> bool {
    has_avx512() && is_x86_feature_detected!("avx512vnni")
}

/// Computes the products of packed rows with every row of activations, until `y` is full.
///
/// # Safety
/// [`has_avx512_vnni`] returns true.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn gemv_rows<F: Int8Format>(x: &Int8Input, rows: RawRows<'_>, y: &mut [f32]) {
    let tokens = x.groups.len() / x.groups_per_row;
    for index in 0..y.len() {
        let (row, token) = (index / tokens, index % tokens);
        y[index] = dot::<F>(rows.row(row), &x.groups[token * x.groups_per_row..][..x.groups_per_row]);
    }
}

/// Returns the dot product of a packed row with a row of activations.
///
/// # Safety
/// [`has_avx512_vnni`] returns true.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn dot<F: Int8Format>(row: &[u8], x: &[ActivationGroup]) -> f32 {
    let (whole, mut sums) = (row.len() / F::BYTES, _mm512_setzero_ps());
    for part in 0..whole {
        // SAFETY: this function enables the target features that [`Int8Format::accumulate`] requires, and the slice
        // holds one part.
        sums = unsafe { F::accumulate(sums, &row[part * F::BYTES..][..F::BYTES], &x[part * F::GROUPS..][..F::GROUPS]) };
    }
    let rest = &row[whole * F::BYTES..];
    if !rest.is_empty() {
        // SAFETY: this function enables the required target features, and `rest` holds the remaining whole blocks of
        // the row.
        sums = unsafe { F::accumulate(sums, rest, &x[whole * F::GROUPS..]) };
    }
    _mm512_reduce_add_ps(sums)
}
