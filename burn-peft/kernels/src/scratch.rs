//! Memory that stays with a thread, and memory that is not initialized.

use std::{
    cell::{Cell, RefCell},
    ops::Deref,
};

thread_local! {
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Runs `work` with at least `n` values of scratch memory that belongs to the thread. Its contents are unspecified.
pub fn with_scratch<R>(n: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut scratch = SCRATCH.take();
    if scratch.len() < n {
        scratch.resize(n, 0.0);
    }
    let result = work(&mut scratch[..n]);
    SCRATCH.set(scratch);
    result
}

/// A vector whose memory comes from a pool of the thread and returns to it when the vector is dropped.
#[derive(Debug, Default)]
pub(crate) struct PooledVec(Vec<f32>);

thread_local! {
    static VEC_POOL: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

impl PooledVec {
    /// Collects the values into a vector from the pool.
    pub(crate) fn collect(values: impl Iterator<Item = f32>) -> Self {
        let mut room = VEC_POOL.with_borrow_mut(Vec::pop).unwrap_or_default();
        room.clear();
        room.extend(values);
        Self(room)
    }
}

impl Deref for PooledVec {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl Drop for PooledVec {
    fn drop(&mut self) {
        let room = std::mem::take(&mut self.0);
        VEC_POOL.with_borrow_mut(|all| all.push(room));
    }
}

/// Allocates `n` values without initializing them, for a kernel that writes each of them exactly once.
///
/// # Safety
/// The caller writes every value before anything reads it, and does not let go of the vector before that.
#[allow(clippy::uninit_vec)]
pub unsafe fn uninit_vec(n: usize) -> Vec<f32> {
    let mut values = Vec::with_capacity(n);
    // SAFETY: the capacity was allocated above. The caller initializes the values before they are read, and dropping
    // an f32 reads nothing.
    unsafe { values.set_len(n) };
    values
}
