//! Starts a run on the chosen device and the ranks of the process group.

use super::{
    interrupt::InterruptGuard,
    learner,
    memory::{self, RunSizes},
    state,
    trainer::{RunOutcome, Trainer},
    world::World,
};
use crate::{
    backend::{Device, with_backend},
    fetch, model,
    recipe::Recipe,
};
use anyhow::{Result, bail};
use burn::backend::Autodiff;
use burn_llama::{Checkpoint, kernel::Kernels};
use burn_zero::comm::Communicator;
use std::path::PathBuf;

use super::record::Summary;

/// The exit code of a run that the user interrupted, as in shells.
pub const INTERRUPTED_EXIT_CODE: i32 = 130;

/// Options of `train` besides the recipe.
#[derive(Debug, Clone, Default)]
pub struct TrainOptions {
    /// The run directory.
    pub directory: PathBuf,
    /// True to resume the run that is in it.
    pub resume: bool,
    /// True if burn-train's display uses the terminal.
    pub display: bool,
    /// The training device.
    pub device: Device,
}

/// Trains by the recipe and writes everything into the run directory. If the user interrupts it, it writes a checkpoint
/// and exits the program.
pub fn run(recipe: Recipe, options: &TrainOptions, world: World) -> Result<Summary> {
    let directory = &options.directory;
    if options.resume {
        state::ensure_same_recipe(directory, &recipe)?;
        if directory.join("summary.json").exists() {
            bail!("{}: the run is complete; there is nothing to resume", directory.display());
        }
    }
    let (first, (communicator, mpi_guard)) = (world.is_rank_zero(), world.into_parts());
    let ended = with_backend!(options.device.ensure_ready()?, |B, device| run_on::<B>(
        recipe,
        options,
        (device, communicator)
    ))?;
    mpi_guard.finalize();
    match ended {
        RunOutcome::Complete(summary) => Ok(summary),
        RunOutcome::Interrupted(step) => {
            if first {
                eprintln!("interrupted after step {step}; go on with --dir {} --resume", directory.display());
            }
            std::process::exit(INTERRUPTED_EXIT_CODE);
        }
    }
}

fn run_on<B: Kernels>(
    recipe: Recipe,
    options: &TrainOptions,
    (device, communicator): (&B::Device, Box<dyn Communicator>),
) -> Result<RunOutcome> {
    let interrupt_guard = InterruptGuard::install()?;
    let config = Checkpoint::open(&fetch::resolve(&recipe.model.path)?)?.config().clone();
    memory::check(
        &RunSizes::lower_bound(&config, &recipe, communicator.world_size() as u64),
        &recipe,
        &options.device,
    )?;
    let mut loaded =
        model::load_base::<Autodiff<B>>(&recipe.model.path, recipe.model.dtype.unwrap_or_default(), device)?;
    loaded.model = model::with_compute(loaded.model, recipe.model.compute)?;
    let run = Trainer::<B>::new(recipe, options, (loaded, communicator))?;
    learner::run_in_burn_train(run, interrupt_guard.interrupter())
}
