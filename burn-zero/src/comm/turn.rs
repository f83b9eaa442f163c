//! Turns at computing, for ranks that share a process.

use std::{
    cell::RefCell,
    sync::{Arc, Condvar, Mutex, PoisonError},
};

/// What the ranks of one process take turns at: gradients of concurrent backward passes are not safe in Burn 0.21. A thread
/// computes inside [`Turn::take`], and wherever it waits for a peer it gives way by [`Turn::outside`]. The default turn is
/// that of a rank with a process of its own, which waits for no one.
#[derive(Debug, Clone, Default)]
pub struct Turn(Option<Arc<Gate>>);

#[derive(Debug, Default)]
struct Gate {
    taken: Mutex<bool>,
    free: Condvar,
}

thread_local! {
    /// The gates that this thread has passed.
    static INSIDE: RefCell<Vec<Arc<Gate>>> = const { RefCell::new(Vec::new()) };
}

impl Gate {
    fn enter(self: &Arc<Self>) {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = self.free.wait_while(taken, |taken| *taken).unwrap_or_else(PoisonError::into_inner);
        *taken = true;
        INSIDE.with_borrow_mut(|inside| inside.push(self.clone()));
    }

    fn leave(self: &Arc<Self>) {
        INSIDE.with_borrow_mut(|inside| inside.retain(|gate| !Arc::ptr_eq(gate, self)));
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.free.notify_one();
    }

    fn is_inside(self: &Arc<Self>) -> bool {
        INSIDE.with_borrow(|inside| inside.iter().any(|gate| Arc::ptr_eq(gate, self)))
    }
}

/// Undoes an entry or a leave, panic or not.
struct Undo<F: FnMut()>(F);

impl<F: FnMut()> Drop for Undo<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl Turn {
    /// A turn for ranks that share a process, to be cloned for each.
    pub(super) fn shared() -> Self {
        Self(Some(Arc::default()))
    }

    /// Computes while no one else does.
    pub fn take<R>(&self, work: impl FnOnce() -> R) -> R {
        let Some(gate) = &self.0 else { return work() };
        gate.enter();
        let _undo = Undo(|| gate.leave());
        work()
    }

    /// Waits while others may compute. A thread that has not taken the turn just waits.
    pub fn outside<R>(&self, wait: impl FnOnce() -> R) -> R {
        let Some(gate) = self.0.as_ref().filter(|gate| gate.is_inside()) else { return wait() };
        gate.leave();
        let _undo = Undo(|| gate.enter());
        wait()
    }
}
