//! Ctrl-C: the first asks the run to end after its step, the second ends it at once.

use anyhow::{Context, Result};
use burn::train::Interrupter;
use std::sync::OnceLock;

static INTERRUPTER: OnceLock<Interrupter> = OnceLock::new();

/// Starts to listen; the interrupter, one for all runs of the program, says whether the user has asked to stop.
pub fn watch() -> Result<Interrupter> {
    if let Some(interrupter) = INTERRUPTER.get() {
        return Ok(interrupter.clone());
    }
    let interrupter = INTERRUPTER.get_or_init(Interrupter::new).clone();
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
