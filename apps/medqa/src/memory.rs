//! How the process holds memory that it has freed.

/// Keeps freed memory for the next step, which asks for the same sizes: given back, every page of it would be cleared by the
/// kernel again. The peak stays what it was.
///
/// glibc only; elsewhere the allocator does as it likes.
pub fn keep() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, value) in [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, i32::MAX), (libc::M_ARENA_MAX, 1)] {
        // SAFETY: it sets a number of the allocator's, before other threads run; a refusal changes nothing.
        unsafe { libc::mallopt(parameter, value) };
    }
}
