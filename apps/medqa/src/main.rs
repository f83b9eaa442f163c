//! medqa: a medical question answering system, from data to chat.

use clap::Parser;
use medqa::{cli, doctor, process};
use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    process::ExitCode,
};

fn main() -> ExitCode {
    process::begin();
    let cli = cli::Cli::parse();
    // Deep graphs are walked recursively when they are freed.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(process::threads()).stack_size(64 << 20).build_global();
    if let Err(error) = pool {
        eprintln!("error: threads cannot be started: {error}");
        return ExitCode::from(2);
    }
    let Ok(result) = catch_unwind(AssertUnwindSafe(|| within(|| cli::run(cli)))) else {
        return ExitCode::from(101);
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(if error.is::<doctor::Failed>() { 1 } else { 2 })
        }
    }
}

/// Runs `work` on a thread of the pool, so that a kernel starts its part at once and wakes only the others. A pool of one stays
/// free for those who wait for it.
fn within<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    if rayon::current_num_threads() > 1 {
        return rayon::scope(|_| work());
    }
    std::thread::scope(|scope| {
        let work = std::thread::Builder::new().stack_size(64 << 20).spawn_scoped(scope, work);
        work.expect("a thread starts").join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}
