//! The process: when it began, and how it holds memory that it has freed.

#[cfg(all(target_os = "linux", target_env = "gnu"))]
use std::{os::unix::process::CommandExt, process::Command};
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
    take_huge_pages();
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, value) in [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, i32::MAX), (libc::M_ARENA_MAX, 1)] {
        // SAFETY: it sets a number of the allocator's, before other threads run; a refusal changes nothing.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Begins the process anew with malloc's memory in huge pages, unless GLIBC_TUNABLES is set: a pass over weights and activations
/// waits for one translation of addresses where it waited for 512. glibc reads the variable before anything of ours runs.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn take_huge_pages() {
    const TUNABLES: &str = "GLIBC_TUNABLES";
    let (mut arguments, program) = (std::env::args_os(), std::env::current_exe());
    let (Some(name), Ok(program), None) = (arguments.next(), program, std::env::var_os(TUNABLES)) else { return };
    // It returns only if that cannot be done; then pages stay small.
    let _ = Command::new(program).arg0(name).args(arguments).env(TUNABLES, "glibc.malloc.hugetlb=1").exec();
}

/// How many ranks `mpirun` has started on this machine; 1 without it.
pub fn ranks_here() -> usize {
    let ranks = std::env::var("OMPI_COMM_WORLD_LOCAL_SIZE").ok();
    ranks.and_then(|text| text.parse().ok()).unwrap_or(1).max(1)
}

/// The threads that this process computes with: RAYON_NUM_THREADS where it is set, else its share of the machine's cores.
pub fn threads() -> usize {
    let said =
        std::env::var("RAYON_NUM_THREADS").ok().and_then(|text| text.parse().ok()).filter(|&threads| threads > 0);
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    said.unwrap_or_else(|| (cores() / ranks_here()).max(1))
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

/// From now on blocks of a MiB go back as soon as they are freed: what a process holds is what it uses, and slower.
pub fn keep_nothing() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, value) in [(libc::M_MMAP_MAX, 1 << 16), (libc::M_MMAP_THRESHOLD, 1 << 20)] {
        // SAFETY: it sets a number of the allocator's; a refusal changes nothing.
        unsafe { libc::mallopt(parameter, value) };
    }
}
