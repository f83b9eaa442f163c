//! Ctrl-C: the first asks the run to end after its step, the second ends it at once.

use anyhow::{Context, Result};
use burn::train::Interrupter;

/// Starts to listen; the interrupter says whether the user has asked to stop.
pub fn watch() -> Result<Interrupter> {
    let interrupter = Interrupter::new();
    let asked = interrupter.clone();
    let stop = move || {
        if asked.should_stop() {
            std::process::exit(130);
        }
        asked.stop(Some("by a signal"));
        eprintln!("stopping after this step with a checkpoint; once more to stop at once");
    };
    ctrlc::set_handler(stop).context("signals cannot be listened to")?;
    Ok(interrupter)
}
