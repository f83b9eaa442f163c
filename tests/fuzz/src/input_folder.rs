//! The folder in which fuzz inputs are written as files.

use std::path::PathBuf;

/// Creates the folder of this process, in memory (`/dev/shm`) if possible.
pub fn folder() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
    let folder = parent.join(format!("fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for inputs can be made");
    folder
}
