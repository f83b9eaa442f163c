//! Panics of libraries as errors.

use std::panic::{self, AssertUnwindSafe};

/// Runs `work`, and returns the first line of its panic as the error. Nothing is printed.
pub(crate) fn catch_panic<R>(work: impl FnOnce() -> R) -> Result<R, String> {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let done = panic::catch_unwind(AssertUnwindSafe(work));
    panic::set_hook(hook);
    done.map_err(|panic| {
        let words = panic.downcast_ref::<String>().map(String::as_str);
        let words = words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it does not say why");
        words.lines().next().unwrap_or_default().to_owned()
    })
}
