//! medqa: a medical question answering system, from data to chat.

use clap::Parser;
use medqa::{cli, doctor};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    // Deep graphs are walked recursively when they are freed.
    let work = std::thread::Builder::new().stack_size(64 << 20).spawn(move || cli::run(cli));
    let result = match work.map(std::thread::JoinHandle::join) {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => return ExitCode::from(101),
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(if error.is::<doctor::Failed>() { 1 } else { 2 })
        }
    }
}
