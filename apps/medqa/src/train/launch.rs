//! From the command line to a run, on the device and among the ranks that it was started with.

use super::{
    interrupt::Watch,
    learner,
    memory::{self, Load},
    run::{Ended, Run},
    state,
    world::{self, World},
};
use crate::{
    backend::{Device, on},
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

use super::record::Summary;

/// The exit code of a run that the user interrupted, as shells have it.
pub const INTERRUPTED: i32 = 130;

/// What the user asks of `train` beside the recipe.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The run folder.
    pub directory: PathBuf,
    /// Whether to go on with the run that is in it.
    pub resume: bool,
    /// Whether burn-train's display takes the terminal.
    pub display: bool,
    /// Where the steps are computed.
    pub device: Device,
}

/// The verb `train`.
pub fn train(path: &Path, sets: &[String], directory: Option<PathBuf>, (resume, device): (bool, Device)) -> Result<()> {
    let (ranks, rank) = world::started();
    let (recipe, notes) = Recipe::load(path, sets, ranks)?;
    if rank == 0 {
        notes.iter().for_each(|note| eprintln!("note: {note}"));
    }
    let world = World::join()?;
    let name = path.file_stem().unwrap_or_default();
    let directory = directory.unwrap_or_else(|| Path::new("runs").join(name));
    if !resume && world.is_first() && directory.read_dir().is_ok_and(|mut files| files.next().is_some()) {
        bail!(
            "{}: the run folder is not empty; choose another with --dir, or go on with its run by --resume",
            directory.display()
        );
    }
    // A rank's terminal is mpirun's invention.
    let (first, alone) = (world.is_first(), !world::launched());
    let options = Options { directory, resume, display: alone && std::io::stdout().is_terminal(), device };
    let summary = serde_json::to_string(&run(recipe, &options, world)?)?;
    if first {
        println!("{summary}");
    }
    Ok(())
}

/// Trains as the recipe says and writes everything into the run folder. When the user interrupts it, it writes a checkpoint
/// and ends the program.
pub fn run(recipe: Recipe, options: &Options, world: World) -> Result<Summary> {
    let directory = &options.directory;
    if options.resume {
        state::same_recipe(directory, &recipe)?;
        if directory.join("summary.json").exists() {
            bail!("{}: the run is complete; there is nothing to resume", directory.display());
        }
    }
    let (first, (communicator, farewell)) = (world.is_first(), world.divide());
    let ended = on!(options.device.ready()?, |B, place| run_on::<B>(recipe, options, (place, communicator)))?;
    farewell.say();
    match ended {
        Ended::Complete(summary) => Ok(summary),
        Ended::Interrupted(step) => {
            if first {
                eprintln!("interrupted after step {step}; go on with --dir {} --resume", directory.display());
            }
            std::process::exit(INTERRUPTED);
        }
    }
}

fn run_on<B: Kernels>(
    recipe: Recipe,
    options: &Options,
    (device, communicator): (&B::Device, Box<dyn Communicator>),
) -> Result<Ended> {
    let watch = Watch::begin()?;
    let config = Checkpoint::open(&fetch::resolve(&recipe.model.path)?)?.config().clone();
    memory::check(&Load::least(&config, &recipe, communicator.world() as u64), &recipe, &options.device)?;
    let mut loaded = model::base::<Autodiff<B>>(&recipe.model.path, recipe.model.dtype.unwrap_or_default(), device)?;
    loaded.model = model::computing(loaded.model, recipe.model.compute)?;
    let (run, model) = Run::<B>::new(recipe, options, (loaded, communicator))?;
    learner::launch(run, model, watch.interrupter())
}
