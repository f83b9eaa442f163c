//! Threads that wait for their parts awake.

use rayon::Yield;
use std::{
    hint::spin_loop,
    sync::atomic::{AtomicBool, Ordering},
};

/// Pauses between two looks for a part.
const PAUSES: usize = 32;

/// Runs `work` on this thread while the others of rayon's pool look for parts of it without falling asleep between them: to wake
/// a thread takes as long as many a part. Within another such work it changes nothing.
pub fn awake<R>(work: impl FnOnce() -> R) -> R {
    static AWAKE: AtomicBool = AtomicBool::new(false);
    let threads = rayon::current_num_threads();
    if threads < 2 || AWAKE.swap(true, Ordering::Acquire) {
        return work();
    }
    let (done, own) = (AtomicBool::new(false), rayon::current_thread_index());
    rayon::in_place_scope(|scope| {
        for _ in 1..threads {
            // This thread may come upon it while it waits for others; it has something else to do.
            scope.spawn(|_| {
                while rayon::current_thread_index() != own && !done.load(Ordering::Acquire) {
                    if rayon::yield_now() != Some(Yield::Executed) {
                        (0..PAUSES).for_each(|_| spin_loop());
                        // Whoever else waits for this core goes first.
                        std::thread::yield_now();
                    }
                }
            });
        }
        let _end = End(&done, &AWAKE);
        work()
    })
}

/// Lets the threads sleep again, after a panic too.
struct End<'a>(&'a AtomicBool, &'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
        self.1.store(false, Ordering::Release);
    }
}
