//! Settings of the process: its start time, its number of threads, and how the allocator holds freed memory.

#[cfg(all(target_os = "linux", target_env = "gnu"))]
use std::{os::unix::process::CommandExt, process::Command};
use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

static STARTED_AT: OnceLock<Instant> = OnceLock::new();

/// Records the start time, and makes the allocator keep freed memory for the next step, which requests the same sizes:
/// if it were returned, the kernel would clear every page again.
///
/// The allocator is configured with glibc only; elsewhere its defaults apply.
pub fn init() {
    STARTED_AT.get_or_init(Instant::now);
    #[cfg(all(target_os = "linux", any(feature = "vulkan", feature = "wgpu")))]
    set_runtime_dir();
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    reexec_with_huge_pages();
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, value) in [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, i32::MAX), (libc::M_ARENA_MAX, 1)] {
        // SAFETY: `mallopt` takes two integers and no pointer, and no other thread runs yet that could allocate
        // meanwhile; a refused parameter changes nothing.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Sets XDG_RUNTIME_DIR to the folder of temporary files where it is unset, as in containers. Mesa looks for a Wayland
/// display there when it lists the Vulkan devices, and libwayland prints an error for each if the variable is missing.
#[cfg(all(target_os = "linux", any(feature = "vulkan", feature = "wgpu")))]
fn set_runtime_dir() {
    const RUNTIME_DIR: &str = "XDG_RUNTIME_DIR";
    if std::env::var_os(RUNTIME_DIR).is_none() {
        // SAFETY: no other thread runs yet that could read the environment meanwhile.
        unsafe { std::env::set_var(RUNTIME_DIR, std::env::temp_dir()) };
    }
}

/// Re-executes the program with malloc's memory in huge pages, unless GLIBC_TUNABLES is set: a pass over weights and
/// activations then waits for one address translation where it waited for 512. glibc reads the variable before `main`
/// runs.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn reexec_with_huge_pages() {
    const TUNABLES: &str = "GLIBC_TUNABLES";
    let (mut arguments, program) = (std::env::args_os(), std::env::current_exe());
    let (Some(name), Ok(program), None) = (arguments.next(), program, std::env::var_os(TUNABLES)) else { return };
    // `exec` returns only if it fails; the pages then stay small.
    let _ = Command::new(program).arg0(name).args(arguments).env(TUNABLES, "glibc.malloc.hugetlb=1").exec();
}

/// Returns the number of ranks that `mpirun` started on this machine; 1 without it.
pub fn local_world_size() -> usize {
    let ranks = std::env::var("OMPI_COMM_WORLD_LOCAL_SIZE").ok();
    ranks.and_then(|text| text.parse().ok()).unwrap_or(1).max(1)
}

/// Returns the number of threads that this process computes with: RAYON_NUM_THREADS if it is set, else its share of the
/// machine's cores.
pub fn num_threads() -> usize {
    let said =
        std::env::var("RAYON_NUM_THREADS").ok().and_then(|text| text.parse().ok()).filter(|&threads| threads > 0);
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    said.unwrap_or_else(|| (cores() / local_world_size()).max(1))
}

/// Returns the time since [`init`] was called; zero if it was not.
pub fn uptime() -> Duration {
    STARTED_AT.get().map_or(Duration::ZERO, Instant::elapsed)
}

/// Returns freed memory to the kernel. Called before work that needs more memory than all before it, in other sizes.
pub fn trim_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `malloc_trim` takes no pointer, locks the arenas that it trims, and releases only pages of free blocks.
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Makes the allocator return blocks of a MiB and more to the kernel as soon as they are freed: the process then holds
/// only what it uses, but allocates more slowly.
pub fn disable_memory_retention() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, value) in [(libc::M_MMAP_MAX, 1 << 16), (libc::M_MMAP_THRESHOLD, 1 << 20)] {
        // SAFETY: `mallopt` takes two integers and no pointer. A thread that allocates meanwhile sees the old or the
        // new threshold, both of which are valid; a refused parameter changes nothing.
        unsafe { libc::mallopt(parameter, value) };
    }
}
