//! The process: when it began, and how it holds memory that it has freed.

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

static BEGAN: OnceLock<Instant> = OnceLock::new();

/// Notes that the process begins, and keeps freed memory for the next step, which asks for the same sizes: given back, every
/// page of it would be cleared by the kernel again.
///
/// glibc only; elsewhere the allocator does as it likes.
pub fn begin() {
    BEGAN.get_or_init(Instant::now);
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, value) in [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, i32::MAX), (libc::M_ARENA_MAX, 1)] {
        // SAFETY: it sets a number of the allocator's, before other threads run; a refusal changes nothing.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// How long ago [`begin`] was called; nothing if it was not.
pub fn age() -> Duration {
    BEGAN.get().map_or(Duration::ZERO, Instant::elapsed)
}

/// Gives freed memory back: before something that takes more than all before it did, and in other sizes.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it takes no pointer and moves nothing that is in use.
    unsafe {
        libc::malloc_trim(0)
    };
}
