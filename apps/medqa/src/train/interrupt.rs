//! Ctrl-C during a run: the first asks it to end after its step, the second ends it at once. Outside a run it ends the
//! program, as ever.

use anyhow::{Context, Result};
use burn::train::Interrupter;
use std::sync::{
    OnceLock,
    atomic::{AtomicBool, Ordering},
};

static INTERRUPTER: OnceLock<Interrupter> = OnceLock::new();
static RUNNING: AtomicBool = AtomicBool::new(false);

/// While it lives, Ctrl-C is a wish that [`Watch::interrupter`] tells.
pub struct Watch(Interrupter);

impl Watch {
    /// Starts to listen.
    ///
    /// # Errors
    /// If the system does not let us.
    pub fn begin() -> Result<Self> {
        let known = INTERRUPTER.get().cloned();
        let interrupter = INTERRUPTER.get_or_init(Interrupter::new).clone();
        if known.is_none() {
            let asked = interrupter.clone();
            let stop = move || {
                if asked.should_stop() || !RUNNING.load(Ordering::SeqCst) {
                    std::process::exit(130);
                }
                asked.stop(Some("by a signal"));
                eprintln!("stopping after this step with a checkpoint; once more to stop at once");
            };
            ctrlc::set_handler(stop).context("signals cannot be listened to")?;
        }
        RUNNING.store(true, Ordering::SeqCst);
        Ok(Self(interrupter))
    }

    /// One for all runs of the program.
    pub fn interrupter(&self) -> Interrupter {
        self.0.clone()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        RUNNING.store(false, Ordering::SeqCst);
    }
}
