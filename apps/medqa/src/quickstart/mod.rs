//! The verb `quickstart`: fine-tunes a model within minutes and compares its answers before and after.
//!
//! ```text
//! lessons (embedded) ─┬─ DIR/data/train.jsonl, valid.jsonl ─► recipe ─► memory estimate
//!                     └─ unseen questions ─► ask ─► LoRA (train::run) ─► ask again ─► report
//! model: fetched, or `tiny`, trained from scratch
//! ```
//!
//! The lessons teach a form, not knowledge: medical answers under fixed headings, a refusal for any other question.

mod ask;
mod estimate;
mod lessons;
mod report;
mod tiny;

use crate::{
    args::{AdapterPath, DeviceArgs, ModelArgs, parse_positive},
    fetch,
    recipe::{Recipe, ValidationRows},
    train::{self, TrainOptions, World},
};
use anyhow::{Context, Result, bail};
use ask::Questions;
use clap::Args;
use estimate::MemoryEstimate;
use lessons::{Lesson, LessonKind, LessonSplit};
use report::QuickstartReport;
use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Instant,
};

/// Arguments of `quickstart`.
#[derive(Args)]
pub(crate) struct QuickstartArgs {
    /// Run directory, for everything that the run writes
    #[arg(long, default_value = "runs/quickstart")]
    pub dir: PathBuf,
    /// Model as for `chat`, or `tiny`, a small model that is trained on the spot and needs no network; default:
    /// smollm2-135m-instruct, or `tiny` if that cannot be fetched
    #[arg(long)]
    pub model: Option<String>,
    /// Number of optimizer steps; fewer steps take less time and teach less
    #[arg(long, value_parser = parse_positive::<NonZeroUsize>)]
    pub steps: Option<NonZeroUsize>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// The name of the model that is trained from scratch.
const TINY: &str = "tiny";

/// Runs the verb `quickstart`: progress goes to stderr, results to stdout.
pub(crate) fn quickstart(args: &QuickstartArgs) -> Result<()> {
    let (start, directory) = (Instant::now(), args.dir.as_path());
    if directory.read_dir().is_ok_and(|mut files| files.next().is_some()) {
        bail!("{}: holds an earlier run; remove it or choose another folder with --dir", directory.display());
    }
    let device = args.device.device.ensure_ready()?;
    let lessons = lessons::all()?;
    let model = resolve_model(args, &lessons)?;
    let recipe = prepare_recipe(args, &model, &lessons)?;
    let estimate = MemoryEstimate::for_recipe(&recipe)?;
    println!("{estimate}");
    let questions = Questions::select(&lessons);
    let named = |adapter: Option<PathBuf>| ModelArgs {
        model: model.clone(),
        adapter: adapter.into_iter().map(AdapterPath::from).collect(),
        tokenizer: None,
    };
    let before = questions.ask(&named(None), device)?;
    let options = TrainOptions { directory: directory.to_owned(), device: device.clone(), ..TrainOptions::default() };
    let summary = train::run(recipe, &options, World::single_process())?;
    let after = questions.ask(&named(Some(directory.join("adapter"))), device)?;
    let seconds = start.elapsed().as_secs_f64();
    let report = QuickstartReport { questions, before, after, summary, estimate, seconds };
    println!("{}\n\n{}", disclaimer(&model, directory), report.text());
    let program = std::env::args().next().unwrap_or_else(|| "medqa".to_owned());
    print!(
        "{}",
        report::next_steps(&program, Some(model.as_str()).filter(|&model| model != fetch::SMOLLM2), directory)
    );
    Ok(())
}

/// Fetches or creates the model, and returns its name for a recipe.
fn resolve_model(args: &QuickstartArgs, lessons: &[Lesson]) -> Result<String> {
    match args.model.as_deref() {
        Some(TINY) => tiny::create(&args.dir, lessons, args.steps, &args.device.device),
        Some(name) => fetch::resolve(name).map(|_| name.to_owned()),
        None => match fetch::resolve(fetch::SMOLLM2) {
            Ok(_) => Ok(fetch::SMOLLM2.to_owned()),
            Err(error) => {
                eprintln!("{error:#}\nwarning: no model could be fetched; continuing with `{TINY}`, made on the spot");
                tiny::create(&args.dir, lessons, args.steps, &args.device.device)
            }
        },
    }
}

/// Writes the rows into the run directory, and returns the recipe that trains on them.
fn prepare_recipe(args: &QuickstartArgs, model: &str, lessons: &[Lesson]) -> Result<Recipe> {
    let data = args.dir.join("data");
    fs::create_dir_all(&data).with_context(|| format!("{}: cannot be made", data.display()))?;
    for (name, split, kinds) in [
        ("medical.jsonl", LessonSplit::Train, &[LessonKind::Medical][..]),
        ("other.jsonl", LessonSplit::Train, &[LessonKind::Other]),
        ("valid.jsonl", LessonSplit::Valid, &[LessonKind::Medical, LessonKind::Other]),
    ] {
        let rows = lessons.iter().filter(|lesson| lesson.split == split && kinds.contains(&lesson.kind));
        lessons::save(&data.join(name), rows.map(|lesson| (lesson.question.as_str(), lesson.answer.clone())))?;
    }
    let (name, toml) = match args.dir.join(TINY).is_dir() {
        true => ("tiny-lora.toml", include_str!("tiny-lora.toml")),
        false => ("lora.toml", include_str!("lora.toml")),
    };
    fill_recipe(name, toml, model, &data, args.steps.map(NonZeroUsize::get))
}

/// Parses an embedded recipe and fills in the model, the folder of rows and, if given, the number of steps.
fn fill_recipe(name: &str, toml: &str, model: &str, data: &Path, steps: Option<usize>) -> Result<Recipe> {
    let sets: Vec<_> = steps.map(|steps| format!("train.max_steps={steps}")).into_iter().collect();
    let mut recipe = Recipe::parse(toml, Path::new(name), &sets)?;
    recipe.model.path = model.to_owned();
    let sources = recipe.data.train.iter_mut().map(|source| &mut source.path);
    let valid = recipe.data.valid.as_mut().and_then(ValidationRows::path_mut);
    for path in sources.chain(valid) {
        *path = utf8_path(&data.join(&*path))?.to_owned();
    }
    Ok(recipe)
}

fn utf8_path(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{}: expected a path in UTF-8; choose another with --dir", path.display()))
}

/// Returns the warning that the model is no source of medical facts.
fn disclaimer(model: &str, directory: &Path) -> &'static str {
    if Path::new(model) == directory.join(TINY) {
        "`tiny` has seen nothing but the lessons. It only parrots their words, cannot tell a medical question from another\n\
         and is no source of medical facts; what it shows is that everything works."
    } else if model == fetch::SMOLLM2 {
        "What is taught is a form, not medicine: a model of 135 M parameters is no source of medical facts.\n\
         Much of what it says below is wrong, before and after."
    } else {
        "What is taught is a form, not medicine: the model is no source of medical facts."
    }
}
