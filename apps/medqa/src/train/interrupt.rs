//! Ctrl-C: the first asks the run to end after its step, the second ends it at once.

use anyhow::{Context, Result};
use std::sync::atomic::{AtomicBool, Ordering};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Starts to listen; the flag says whether the user has asked to stop.
pub fn watch() -> Result<&'static AtomicBool> {
    let asked = || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("stopping after this step with a checkpoint; once more to stop at once");
    };
    ctrlc::set_handler(asked).context("signals cannot be listened to")?;
    Ok(&INTERRUPTED)
}
