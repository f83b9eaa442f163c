//! Worker threads that spin instead of sleeping while they wait for tasks.

use rayon::Yield;
use std::{
    hint::spin_loop,
    sync::atomic::{AtomicBool, Ordering},
};

/// The number of spin-loop hints between two polls for a task.
const SPINS_PER_POLL: usize = 32;

/// Runs `work` on this thread while the other threads of rayon's pool poll for its tasks without falling asleep in
/// between: waking a thread takes as long as many of the tasks. A nested call has no effect.
pub(super) fn with_spinning_pool<R>(work: impl FnOnce() -> R) -> R {
    static SPINNING: AtomicBool = AtomicBool::new(false);
    let threads = rayon::current_num_threads();
    if threads < 2 || SPINNING.swap(true, Ordering::Acquire) {
        return work();
    }
    let (done, caller) = (AtomicBool::new(false), rayon::current_thread_index());
    rayon::in_place_scope(|scope| {
        for _ in 1..threads {
            // The calling thread may pick up this task while it waits for others; it must return at once.
            scope.spawn(|_| {
                while rayon::current_thread_index() != caller && !done.load(Ordering::Acquire) {
                    if rayon::yield_now() != Some(Yield::Executed) {
                        (0..SPINS_PER_POLL).for_each(|_| spin_loop());
                        // Other processes that wait for this core run first.
                        std::thread::yield_now();
                    }
                }
            });
        }
        let _end = StopSpinning(&done, &SPINNING);
        work()
    })
}

/// Guard that lets the threads sleep again when it is dropped, also after a panic.
struct StopSpinning<'a>(&'a AtomicBool, &'a AtomicBool);

impl Drop for StopSpinning<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
        self.1.store(false, Ordering::Release);
    }
}
