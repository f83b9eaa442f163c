//! Memory that stays with a thread, and loops compiled for the machine's own vector instructions.

use super::instructions;
use std::{
    cell::{Cell, RefCell},
    ops::Deref,
};

/// Runs `work` compiled for the widest vector instructions that it may use on this machine. Everything it calls must be
/// `#[inline(always)]` to take part.
#[inline(always)]
pub fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    instructions::vectors().dispatch(work)
}

/// Runs `work` with the widest vectors that it may use on this machine.
#[inline(always)]
pub fn simd<W: pulp::WithSimd>(work: W) -> W::Output {
    instructions::vectors().dispatch(work)
}

thread_local! {
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Runs `work` with at least `n` values of memory that stays with the thread. What they hold is left from before.
pub fn with_scratch<R>(n: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut scratch = SCRATCH.take();
    if scratch.len() < n {
        scratch.resize(n, 0.0);
    }
    let result = work(&mut scratch[..n]);
    SCRATCH.set(scratch);
    result
}

/// Values in memory that goes back to the thread, for the next to take.
#[derive(Debug, Default)]
pub(super) struct Lent(Vec<f32>);

thread_local! {
    static LENDABLE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

impl Lent {
    /// Those values.
    pub(super) fn of(values: impl Iterator<Item = f32>) -> Self {
        let mut room = LENDABLE.with_borrow_mut(Vec::pop).unwrap_or_default();
        room.clear();
        room.extend(values);
        Self(room)
    }
}

impl Deref for Lent {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let room = std::mem::take(&mut self.0);
        LENDABLE.with_borrow_mut(|all| all.push(room));
    }
}

/// Memory for `n` values, every one of which the caller writes before anything reads it. For the kernels of these crates only.
#[doc(hidden)]
#[allow(clippy::uninit_vec)]
pub fn unwritten(n: usize) -> Vec<f32> {
    let mut values = Vec::with_capacity(n);
    // SAFETY: the capacity is there, every bit pattern is an f32, and the callers write before they read.
    unsafe { values.set_len(n) };
    values
}
