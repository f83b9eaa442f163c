//! The verb `train`: reads the recipe and runs it on the ranks of the process group.

use crate::{
    args::DeviceArgs,
    recipe::{LoadedRecipe, Recipe},
    train::{TrainOptions, World, launched_by_mpirun, run, world_size_and_rank},
};
use anyhow::{Result, bail};
use clap::Args;
use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
};

/// Arguments of `train`.
#[derive(Args)]
pub struct TrainArgs {
    /// Recipe: a TOML file with the model, the data, the fine-tuning method and the training settings
    pub recipe: PathBuf,
    /// Override one value of the recipe, for example --set train.max_steps=64; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    #[command(flatten)]
    pub files: FilesArgs,
    /// Run directory, for everything that the run writes; default: runs/NAME-OF-RECIPE
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Resume the run in --dir from its last checkpoint
    #[arg(long)]
    pub resume: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Files besides the recipe; each option is shorthand for a recipe key in `[parallel]`.
#[derive(Args, Clone)]
pub struct FilesArgs {
    /// DeepSpeed configuration (ds_config.json): sets what the recipe leaves unset (recipe key parallel.deepspeed)
    #[arg(long, value_name = "FILE")]
    deepspeed: Option<String>,
    /// YAML file of `accelerate config`: sets what the recipe leaves unset (recipe key parallel.accelerate)
    #[arg(long, value_name = "FILE")]
    accelerate: Option<String>,
    /// Write a timeline of all ranks to this file, to be opened in Perfetto (recipe key parallel.trace)
    #[arg(long, value_name = "FILE")]
    trace: Option<String>,
}

impl FilesArgs {
    /// Returns the same settings as `KEY=VALUE` overrides of the recipe.
    fn overrides(&self) -> impl Iterator<Item = String> {
        let files = [("deepspeed", &self.deepspeed), ("accelerate", &self.accelerate), ("trace", &self.trace)];
        let set = |(key, file): (&str, &Option<String>)| {
            Some(format!("parallel.{key}={}", toml::Value::String(file.clone()?)))
        };
        files.into_iter().filter_map(set)
    }
}

/// Runs the verb `train`: prints the contents of `summary.json` on stdout.
///
/// # Errors
/// If the recipe is invalid, the run directory holds another run, or the run fails.
pub fn train(args: TrainArgs) -> Result<()> {
    let (ranks, rank) = world_size_and_rank();
    let sets: Vec<String> = args.sets.iter().cloned().chain(args.files.overrides()).collect();
    let LoadedRecipe { recipe, notes } = Recipe::load(&args.recipe, &sets, ranks)?;
    if rank == 0 {
        notes.iter().for_each(|note| eprintln!("note: {note}"));
    }
    let world = World::join()?;
    let name = args.recipe.file_stem().unwrap_or_default();
    let directory = args.dir.unwrap_or_else(|| Path::new("runs").join(name));
    if !args.resume && world.is_rank_zero() && directory.read_dir().is_ok_and(|mut files| files.next().is_some()) {
        bail!(
            "{}: the run folder is not empty; choose another with --dir, or go on with its run by --resume",
            directory.display()
        );
    }
    // The terminal that mpirun gives a rank is not the user's.
    let (first, alone) = (world.is_rank_zero(), !launched_by_mpirun());
    let display = alone && std::io::stdout().is_terminal();
    let options = TrainOptions { directory, resume: args.resume, display, device: args.device.device };
    let summary = serde_json::to_string(&run(recipe, &options, world)?)?;
    if first {
        println!("{summary}");
    }
    Ok(())
}
