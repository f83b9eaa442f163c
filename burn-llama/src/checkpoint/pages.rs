//! Pages of mapped files.

use memmap2::Mmap;

/// Gives the pages of a tensor that was copied back to the system: else the whole file counts as the process's memory beside the
/// copies. Whoever reads them again gets them from the file.
pub(super) fn forget(map: &Mmap, start: usize, bytes: usize) {
    #[cfg(unix)]
    {
        // SAFETY: the map is read-only and of a file, so that a page that is dropped comes back with the same content.
        let result = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, bytes) };
        // A system that keeps them costs memory, nothing else.
        let _ = result;
    }
    #[cfg(not(unix))]
    let _ = (map, start, bytes);
}
