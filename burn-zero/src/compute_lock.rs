//! A lock for ranks that share a process, so that one of them computes at a time.

use std::{
    cell::RefCell,
    sync::{Arc, Condvar, Mutex, PoisonError},
};

/// A lock that lets one rank of a process compute at a time, because concurrent backward passes lose gradients in Burn
/// 0.21. A thread computes inside `locked`, and releases the lock by `unlocked` wherever it waits for a peer. The
/// default is the lock of a rank that has a process to itself; it never blocks.
#[derive(Debug, Clone, Default)]
pub struct ComputeLock(Option<Arc<LockState>>);

#[derive(Debug, Default)]
struct LockState {
    locked: Mutex<bool>,
    released: Condvar,
}

thread_local! {
    /// The locks that this thread holds.
    static HELD_LOCKS: RefCell<Vec<Arc<LockState>>> = const { RefCell::new(Vec::new()) };
}

impl LockState {
    fn acquire(self: &Arc<Self>) {
        let locked = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        let mut locked = self.released.wait_while(locked, |locked| *locked).unwrap_or_else(PoisonError::into_inner);
        *locked = true;
        HELD_LOCKS.with_borrow_mut(|locks| locks.push(self.clone()));
    }

    fn release(self: &Arc<Self>) {
        HELD_LOCKS.with_borrow_mut(|locks| locks.retain(|lock| !Arc::ptr_eq(lock, self)));
        *self.locked.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.released.notify_one();
    }

    fn is_held_by_this_thread(self: &Arc<Self>) -> bool {
        HELD_LOCKS.with_borrow(|locks| locks.iter().any(|lock| Arc::ptr_eq(lock, self)))
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
    pub(crate) fn locked<R>(&self, work: impl FnOnce() -> R) -> R {
        let Some(lock) = &self.0 else { return work() };
        lock.acquire();
        let _guard = OnDrop(|| lock.release());
        work()
    }

    /// Runs `wait` with the lock released, so that other ranks can compute. Without the lock it just runs `wait`.
    pub(crate) fn unlocked<R>(&self, wait: impl FnOnce() -> R) -> R {
        let Some(lock) = self.0.as_ref().filter(|lock| lock.is_held_by_this_thread()) else { return wait() };
        lock.release();
        let _guard = OnDrop(|| lock.acquire());
        wait()
    }
}
