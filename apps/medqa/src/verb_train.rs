//! The verb `train`: reads the recipe, or makes it from the options, and runs it on the ranks of the process group.

use crate::{
    args::DeviceArgs,
    recipe::{LoadedRecipe, MethodKind, Recipe, RecipeText},
    train::{RankInfo, TrainOptions, World, launched_by_mpirun, read_recipe, run},
};
use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
};

/// Arguments of `train`.
#[derive(Args)]
pub(crate) struct TrainArgs {
    /// Recipe: a TOML file with the model, the data, the fine-tuning method and the training settings; without it,
    /// --model and --data are needed
    pub recipe: Option<PathBuf>,
    #[command(flatten)]
    pub parts: RecipeParts,
    /// Override one value of the recipe, for example --set train.max_steps=64; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    #[command(flatten)]
    pub files: FilesArgs,
    /// Run directory, for everything that the run writes; default: runs/NAME-OF-RECIPE, or runs/NAME-OF-DATA-METHOD
    /// without a recipe
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Resume the run in --dir from its last checkpoint
    #[arg(long)]
    pub resume: bool,
    /// With --resume: go on even if the data, the tokenizer or the chat template are not those of the run
    #[arg(long, requires = "resume")]
    pub allow_changed_data: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Options that make a recipe, instead of a recipe file.
#[derive(Args, Clone)]
pub(crate) struct RecipeParts {
    /// Without a recipe: the model, as for `chat` (recipe key model.path)
    #[arg(long)]
    model: Option<String>,
    /// Without a recipe: the file of training rows (recipe key data.train)
    #[arg(long, value_name = "FILE")]
    data: Option<String>,
    /// Without a recipe: the file of validation rows (recipe key data.valid)
    #[arg(long, value_name = "FILE")]
    valid: Option<String>,
    /// Without a recipe: the fine-tuning method, by default lora (recipe key method.kind)
    #[arg(long)]
    method: Option<MethodKind>,
}

/// An option of [`RecipeParts`] that was given.
struct RecipePart {
    option: &'static str,
    /// The recipe key that it sets.
    key: &'static str,
    value: String,
}

impl RecipeParts {
    /// Returns the options that were given.
    fn given(&self) -> Vec<RecipePart> {
        let method = self.method.map(method_name);
        let part = |option, key, value: &Option<String>| Some(RecipePart { option, key, value: value.clone()? });
        let parts = [
            part("--model", "model.path", &self.model),
            part("--data", "data.train", &self.data),
            part("--valid", "data.valid", &self.valid),
            part("--method", "method.kind", &method),
        ];
        parts.into_iter().flatten().collect()
    }

    /// Returns the recipe that the options make, and the name of its run directory.
    ///
    /// # Errors
    /// If the model or the data is missing.
    fn to_recipe(&self) -> Result<(RecipeText, PathBuf)> {
        let given = self.given();
        let (Some(_), Some(data)) = (&self.model, &self.data) else {
            let found = if given.is_empty() { "neither".to_owned() } else { options(&given) };
            bail!("train: expected a recipe file, or --model MODEL and --data FILE, found {found}");
        };
        let line = |part: &RecipePart| format!("{} = {}\n", part.key, toml::Value::String(part.value.clone()));
        let text = given.iter().map(line).collect();
        let name = Path::new(data).file_stem().unwrap_or_default().to_string_lossy();
        let name = format!("{name}-{}", method_name(self.method.unwrap_or_default()));
        Ok((RecipeText { text, origin: "command line".into() }, name.into()))
    }
}

/// Returns the method's name in a recipe.
fn method_name(method: MethodKind) -> String {
    method.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn options(parts: &[RecipePart]) -> String {
    parts.iter().map(|part| part.option).collect::<Vec<_>>().join(", ")
}

/// Files besides the recipe; each option is shorthand for a recipe key in `[parallel]`.
#[derive(Args, Clone)]
pub(crate) struct FilesArgs {
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

impl TrainArgs {
    /// Returns the text of the recipe, from its file or from the options, and the name of its run directory.
    ///
    /// # Errors
    /// If the file cannot be read, if there are a file and options, or if there is neither.
    fn recipe_text(&self) -> Result<(RecipeText, PathBuf)> {
        let (Some(file), parts) = (&self.recipe, self.parts.given()) else { return self.parts.to_recipe() };
        if !parts.is_empty() {
            let sets: Vec<String> = parts.iter().map(|part| format!("--set {}={}", part.key, part.value)).collect();
            bail!(
                "{} and {}: expected a recipe file or these options, found both; leave the options out, or override the \
                 recipe by {}",
                file.display(),
                options(&parts),
                sets.join(" ")
            );
        }
        Ok((RecipeText::read(file)?, file.file_stem().unwrap_or_default().into()))
    }
}

/// Runs the verb `train`: prints the contents of `summary.json` on stdout.
///
/// # Errors
/// If the recipe is invalid, the run directory holds another run, or the run fails.
pub(crate) fn train(args: TrainArgs) -> Result<()> {
    let RankInfo { rank, world_size } = RankInfo::from_env();
    let sets: Vec<String> = args.sets.iter().cloned().chain(args.files.overrides()).collect();
    let (text, run_name) = args.recipe_text()?;
    let directory = args.dir.unwrap_or_else(|| Path::new("runs").join(run_name));
    let earlier = if args.resume { Some(read_recipe(&directory)?) } else { None };
    let LoadedRecipe { recipe, notes } = Recipe::load(&text, &sets, world_size, earlier.as_ref())?;
    if rank == 0 {
        notes.iter().for_each(|note| eprintln!("note: {note}"));
        let arguments = recipe.data.template_arguments.iter();
        let arguments: Vec<_> = arguments.map(|(name, value)| format!("--template-arg {name}={value}")).collect();
        if !arguments.is_empty() {
            eprintln!("note: to ask the result as in training, add {}", arguments.join(" "));
        }
    }
    let world = World::join()?;
    if !args.resume && world.is_rank_zero() && directory.read_dir().is_ok_and(|mut files| files.next().is_some()) {
        bail!(
            "{}: the run directory is not empty; choose another one with --dir, or resume its run with --resume",
            directory.display()
        );
    }
    // The terminal that mpirun gives a rank is not the user's.
    let (first, alone) = (world.is_rank_zero(), !launched_by_mpirun());
    let display = alone && std::io::stdout().is_terminal();
    let TrainArgs { resume, allow_changed_data, device, .. } = args;
    let options = TrainOptions { directory, resume, allow_changed_data, display, device: device.device };
    let summary = serde_json::to_string(&run(recipe, &options, world)?)?;
    if first {
        println!("{summary}");
    }
    Ok(())
}
