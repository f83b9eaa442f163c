//! Ctrl-C during a run: the first one stops it after the current step, the second one at once. Outside a run, Ctrl-C
//! ends the program as usual.

use anyhow::{Context, Result};
use burn::train::Interrupter;
use std::sync::{
    OnceLock,
    atomic::{AtomicBool, Ordering},
};

/// The exit code of a run that the user interrupted, as in shells.
pub(super) const INTERRUPTED_EXIT_CODE: u8 = 130;

static INTERRUPTER: OnceLock<Interrupter> = OnceLock::new();
static RUNNING: AtomicBool = AtomicBool::new(false);

/// A guard: while it lives, Ctrl-C requests a stop through [`InterruptGuard::interrupter`] instead of ending the
/// program.
pub(super) struct InterruptGuard(Interrupter);

impl InterruptGuard {
    /// Installs the signal handler.
    ///
    /// # Errors
    /// If the signal handler cannot be installed.
    pub(super) fn install() -> Result<Self> {
        let known = INTERRUPTER.get().cloned();
        let interrupter = INTERRUPTER.get_or_init(Interrupter::new).clone();
        if known.is_none() {
            let asked = interrupter.clone();
            let stop = move || {
                if asked.should_stop() || !RUNNING.load(Ordering::SeqCst) {
                    std::process::exit(INTERRUPTED_EXIT_CODE.into());
                }
                asked.stop(Some("by a signal"));
                eprintln!("stopping after this step with a checkpoint; press Ctrl-C again to stop at once");
            };
            ctrlc::set_handler(stop).context("the handler of Ctrl-C cannot be installed")?;
        }
        RUNNING.store(true, Ordering::SeqCst);
        Ok(Self(interrupter))
    }

    /// Returns the interrupter, which all runs of the program share.
    pub(super) fn interrupter(&self) -> Interrupter {
        self.0.clone()
    }
}

impl Drop for InterruptGuard {
    fn drop(&mut self) {
        RUNNING.store(false, Ordering::SeqCst);
    }
}
