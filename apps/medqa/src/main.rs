//! medqa: a medical question answering system, from data preparation to chat.

use clap::Parser;
use medqa::{cli, doctor, generate, process};
use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    process::ExitCode,
};

fn main() -> ExitCode {
    process::init();
    let cli = cli::Cli::parse();
    // Freeing a deep autodiff graph recurses, so threads get large stacks.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(process::num_threads()).stack_size(64 << 20).build_global();
    if let Err(error) = pool {
        eprintln!("error: threads cannot be started: {error}");
        return ExitCode::from(2);
    }
    let Ok(result) = catch_unwind(AssertUnwindSafe(|| run_in_pool(|| cli::run(cli)))) else {
        return ExitCode::from(101);
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(match () {
                () if error.is::<doctor::ChecksFailed>() => 1,
                () if error.is::<generate::BudgetReached>() => generate::BudgetReached::EXIT_CODE,
                () => 2,
            })
        }
    }
}

/// Runs `work` on a thread of the rayon pool, so that a kernel starts its own share at once and wakes only the other
/// threads. With a pool of one thread, `work` runs outside the pool, whose thread stays free for jobs that `work` waits
/// for.
fn run_in_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    if rayon::current_num_threads() > 1 {
        return rayon::scope(|_| work());
    }
    std::thread::scope(|scope| {
        let work = std::thread::Builder::new().stack_size(64 << 20).spawn_scoped(scope, work);
        work.expect("a thread starts").join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}
