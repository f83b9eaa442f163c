//! Release of memory-mapped pages.

use memmap2::Mmap;

/// Tells the system that the pages of a tensor already copied are no longer needed. Otherwise the whole file would
/// count towards the process's resident memory in addition to the copies. A later access reads the pages from the file
/// again.
pub(super) fn release(map: &Mmap, start: usize, bytes: usize) {
    #[cfg(unix)]
    {
        // SAFETY: the map is read-only and backed by a file, so a dropped page is reloaded with the same content.
        let result = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, bytes) };
        // If the advice is refused, the process only uses more memory.
        let _ = result;
    }
    #[cfg(not(unix))]
    let _ = (map, start, bytes);
}
