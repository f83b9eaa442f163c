//! The command `train`: starts a run on the chosen device and the ranks of the process group.

use super::{
    interrupt::{INTERRUPTED_EXIT_CODE, InterruptGuard},
    learner,
    memory::{self, RunFootprint},
    options::TrainOptions,
    state,
    summary::Summary,
    trainer::{RunOutcome, Trainer},
    world::{self, World},
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
use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
};

/// Runs the command `train`.
pub fn train(path: &Path, sets: &[String], directory: Option<PathBuf>, resume: bool, device: Device) -> Result<()> {
    let (ranks, rank) = world::world_size_and_rank();
    let (recipe, notes) = Recipe::load(path, sets, ranks)?;
    if rank == 0 {
        notes.iter().for_each(|note| eprintln!("note: {note}"));
    }
    let world = World::join()?;
    let name = path.file_stem().unwrap_or_default();
    let directory = directory.unwrap_or_else(|| Path::new("runs").join(name));
    if !resume && world.is_rank_zero() && directory.read_dir().is_ok_and(|mut files| files.next().is_some()) {
        bail!(
            "{}: the run folder is not empty; choose another with --dir, or go on with its run by --resume",
            directory.display()
        );
    }
    // The terminal that mpirun gives a rank is not the user's.
    let (first, alone) = (world.is_rank_zero(), !world::launched_by_mpirun());
    let options = TrainOptions { directory, resume, display: alone && std::io::stdout().is_terminal(), device };
    let summary = serde_json::to_string(&run(recipe, &options, world)?)?;
    if first {
        println!("{summary}");
    }
    Ok(())
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
    let device = options.device.ensure_ready()?;
    let ended = with_backend!(device, |B, device| run_on::<B>(recipe, options, device, communicator))?;
    mpi_guard.finalize();
    match ended {
        RunOutcome::Complete(summary) => Ok(summary),
        RunOutcome::Interrupted(step) => {
            if first {
                eprintln!("interrupted after step {step}; go on with --dir {} --resume", directory.display());
            }
            std::process::exit(INTERRUPTED_EXIT_CODE.into());
        }
    }
}

fn run_on<B: Kernels>(
    recipe: Recipe,
    options: &TrainOptions,
    device: &B::Device,
    communicator: Box<dyn Communicator>,
) -> Result<RunOutcome> {
    let interrupt_guard = InterruptGuard::install()?;
    let config = Checkpoint::open(&fetch::resolve(&recipe.model.path)?)?.config().clone();
    memory::check(
        &RunFootprint::lower_bound(&config, &recipe, communicator.world_size() as u64),
        &recipe,
        &options.device,
    )?;
    let mut loaded =
        model::load_base::<Autodiff<B>>(&recipe.model.path, recipe.model.dtype.unwrap_or_default(), device)?;
    loaded.model = model::with_compute(loaded.model, recipe.model.compute)?;
    let (trainer, model) = Trainer::<B>::new(recipe, options, loaded, communicator)?;
    learner::run_in_burn_train(trainer, model, options.display, interrupt_guard.interrupter())
}
