//! Starts a run on the chosen device and the ranks of the process group.

use super::{
    inputs,
    interrupt::{INTERRUPTED_EXIT_CODE, InterruptGuard},
    learner,
    memory::{self, RunSizes},
    model_loader::ModelLoader,
    options::TrainOptions,
    pipeline::{self, MeanRow, RankPipeline},
    state,
    summary::Summary,
    trainer::{RunOutcome, Trainer},
    world::World,
};
use crate::{backend::with_backend, fetch, recipe::Recipe};
use anyhow::Result;
use burn_llama::kernel::Kernels;
use burn_zero::comm::Communicator;

/// Trains by the recipe and writes everything into the run directory. If the user interrupts it, it writes a checkpoint
/// and exits the program.
pub(crate) fn run(recipe: Recipe, options: &TrainOptions, world: World) -> Result<Summary> {
    let directory = &options.directory;
    if options.resume {
        state::ensure_same_recipe(directory, &recipe)?;
        state::ensure_not_complete(directory, &recipe)?;
    }
    let (first, (communicator, mpi_guard)) = (world.is_rank_zero(), world.into_parts());
    let device = options.device.ensure_ready()?;
    let ended = with_backend!(device, |B, device| run_on::<B>(recipe, options, device, communicator))?;
    mpi_guard.finalize();
    match ended {
        RunOutcome::Complete(summary) => Ok(summary),
        RunOutcome::Interrupted(step) => {
            if first {
                let at = directory.display();
                eprintln!("interrupted after step {step}; resume: medqa train {at}/recipe.toml --dir {at} --resume");
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
    let config = fetch::open_checkpoint(&recipe.model.path)?.config().clone();
    let replicas = pipeline::replicas(&recipe.parallel.pipeline, communicator.world_size())?;
    let pipeline = RankPipeline::new(&recipe, &config, MeanRow::TYPICAL, communicator.as_ref())?;
    let sizes = RunSizes {
        stages: pipeline.map(|pipeline| pipeline.stages),
        ..RunSizes::lower_bound(&config, &recipe, replicas as u64)
    };
    memory::check(&sizes, &recipe, &options.device)?;
    let (loader, mut loaded) = ModelLoader::<B>::open(&recipe, communicator.world_size(), device)?;
    let checkpoint = if options.resume { state::checkpoints(&options.directory)?.pop() } else { None };
    if let Some(checkpoint) = checkpoint {
        let state = state::read_state(&checkpoint)?;
        loaded.tokenizer = inputs::with_time_of_run(loaded.tokenizer, state.inputs.as_ref())?;
    }
    let trainer = Trainer::new(recipe, options, (loader, loaded), communicator)?;
    learner::run_in_burn_train(trainer, options.display, interrupt_guard.interrupter())
}
