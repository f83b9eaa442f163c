//! A lock for ranks that share a process, so that one of them computes at a time.

use std::{
    cell::RefCell,
    sync::{Arc, Condvar, Mutex, PoisonError},
};

/// A lock that lets one rank of a process compute at a time, because concurrent backward passes lose gradients in Burn
/// 0.21. A thread computes inside [`ComputeLock::locked`], and releases the lock by [`ComputeLock::unlocked`] wherever
/// it waits for a peer. The default is the lock of a rank that has a process to itself; it never blocks.
#[derive(Debug, Clone, Default)]
pub struct ComputeLock(Option<Arc<LockState>>);

#[derive(Debug, Default)]
struct LockState {
    held: Mutex<bool>,
    released: Condvar,
}

thread_local! {
    /// The locks that this thread holds.
    static HELD: RefCell<Vec<Arc<LockState>>> = const { RefCell::new(Vec::new()) };
}

impl LockState {
    fn acquire(self: &Arc<Self>) {
        let taken = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = self.released.wait_while(taken, |taken| *taken).unwrap_or_else(PoisonError::into_inner);
        *taken = true;
        HELD.with_borrow_mut(|inside| inside.push(self.clone()));
    }

    fn release(self: &Arc<Self>) {
        HELD.with_borrow_mut(|inside| inside.retain(|gate| !Arc::ptr_eq(gate, self)));
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.released.notify_one();
    }

    fn is_held_here(self: &Arc<Self>) -> bool {
        HELD.with_borrow(|inside| inside.iter().any(|gate| Arc::ptr_eq(gate, self)))
    }
}

/// Runs a closure when it is dropped, also during a panic.
struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl ComputeLock {
    /// Returns a lock for the ranks of one process; each gets a clone.
    pub(crate) fn shared() -> Self {
        Self(Some(Arc::default()))
    }

    /// Runs `work` with the lock held.
    pub fn locked<R>(&self, work: impl FnOnce() -> R) -> R {
        let Some(gate) = &self.0 else { return work() };
        gate.acquire();
        let _undo = OnDrop(|| gate.release());
        work()
    }

    /// Runs `wait` with the lock released, so that other ranks can compute. Without the lock it just runs `wait`.
    pub fn unlocked<R>(&self, wait: impl FnOnce() -> R) -> R {
        let Some(gate) = self.0.as_ref().filter(|gate| gate.is_held_here()) else { return wait() };
        gate.release();
        let _undo = OnDrop(|| gate.acquire());
        wait()
    }
}
