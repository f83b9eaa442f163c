//! The verb `launch`: starts several ranks on this machine or on those of a host file.

use crate::args::parse_positive;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::{
    env,
    ffi::OsString,
    num::NonZeroUsize,
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::PathBuf,
    process::Command,
};

/// Arguments of `launch`.
#[derive(Args)]
pub(crate) struct LaunchArgs {
    /// Number of ranks (processes)
    #[arg(short = 'n', long, value_parser = parse_positive::<NonZeroUsize>)]
    pub ranks: NonZeroUsize,
    /// mpirun's host file, which lists machines and their slots; without it, all ranks run on this machine
    #[arg(long)]
    pub hostfile: Option<PathBuf>,
    /// Command to run on every rank, with its arguments, for example train RECIPE
    #[arg(last = true, required = true)]
    pub command: Vec<OsString>,
}

/// Runs the verb `launch`: replaces this process by `mpirun`, which starts the program once per rank; each rank gets
/// its share of the cores.
pub(crate) fn launch(args: &LaunchArgs) -> Result<()> {
    if !cfg!(feature = "mpi") {
        bail!(
            "launch needs a medqa that was built with the feature `mpi`: cargo build --release -p medqa --features mpi"
        );
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let mut found = env::split_paths(&path).map(|folder| folder.join("mpirun"));
    let Some(mpirun) = found.find(|path| path.is_file()) else {
        bail!("mpirun: not found on PATH; install Open MPI (Debian: openmpi-bin)");
    };
    let ranks = args.ranks.get();
    let mut command = Command::new(mpirun);
    command.args(["-n", &ranks.to_string(), "--bind-to", "none"]);
    match &args.hostfile {
        Some(file) => {
            command.arg("--hostfile").arg(file);
        }
        None => {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let threads = (cores / ranks).max(1).to_string();
            command.arg("--oversubscribe");
            for name in ["RAYON_NUM_THREADS", "OMP_NUM_THREADS"] {
                command.args(["-x", &format!("{name}={threads}")]);
            }
        }
    }
    // mpirun refuses to run as root without this option, and a container often has no other user.
    if std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0) {
        command.arg("--allow-run-as-root");
    }
    let program = env::current_exe().context("the path of this program")?;
    Err(command.arg(program).args(&args.command).exec()).context("mpirun cannot be started")
}
