//! The verb `quickstart`: from nothing to a fine-tuned model, and what it learned, within minutes.
//!
//! ```text
//! lessons (embedded) ─┬─ DIR/data/train.jsonl, valid.jsonl ─► recipe ─► memory estimate
//!                     └─ unseen questions ─► ask ─► LoRA (train::run) ─► ask again ─► report
//! model: fetched, or `tiny`, made on the spot
//! ```
//!
//! What is taught is a form, not knowledge: medical answers under fixed headings, a refusal for any other question.

mod ask;
mod estimate;
mod lessons;
mod report;
mod tiny;

use crate::{
    adapter::Source,
    cli::{ModelArgs, QuickstartArgs},
    fetch,
    recipe::Recipe,
    train::{self, Options, World},
};
use anyhow::{Context, Result, bail};
use ask::Questions;
use estimate::Estimate;
use lessons::{Kind, Lesson, Split};
use report::Report;
use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Instant,
};

/// The model that is made on the spot.
const TINY: &str = "tiny";

/// The verb: progress on stderr, results on stdout.
pub fn quickstart(args: &QuickstartArgs) -> Result<()> {
    let (start, directory) = (Instant::now(), args.dir.as_path());
    if directory.read_dir().is_ok_and(|mut files| files.next().is_some()) {
        bail!("{}: holds an earlier run; remove it or choose another folder with --dir", directory.display());
    }
    let device = args.device.device.ready()?;
    let lessons = lessons::all()?;
    let model = model(args, &lessons)?;
    let recipe = recipe(args, &model, &lessons)?;
    let estimate = Estimate::of(&recipe)?;
    println!("{estimate}");
    let questions = Questions::among(&lessons);
    let named = |adapter: Option<PathBuf>| ModelArgs {
        model: model.clone(),
        adapter: adapter.into_iter().map(Source::from).collect(),
        tokenizer: None,
    };
    let before = questions.ask(&named(None), device)?;
    let options = Options { directory: directory.to_owned(), device: device.clone(), ..Options::default() };
    let summary = train::run(recipe, &options, World::alone())?;
    let after = questions.ask(&named(Some(directory.join("adapter"))), device)?;
    let seconds = start.elapsed().as_secs_f64();
    let report = Report { questions, before, after, summary, estimate, seconds };
    println!("{}\n\n{}", caution(&model, directory), report.text());
    let program = std::env::args().next().unwrap_or_else(|| "medqa".to_owned());
    print!("{}", report::next(&program, Some(model.as_str()).filter(|&model| model != fetch::SMOLLM2), directory));
    Ok(())
}

/// The model's name as a recipe has it, the model being there.
fn model(args: &QuickstartArgs, lessons: &[Lesson]) -> Result<String> {
    match args.model.as_deref() {
        Some(TINY) => tiny::make(&args.dir, lessons, (args.steps, &args.device.device)),
        Some(name) => fetch::resolve(name).map(|_| name.to_owned()),
        None => match fetch::resolve(fetch::SMOLLM2) {
            Ok(_) => Ok(fetch::SMOLLM2.to_owned()),
            Err(error) => {
                eprintln!("{error:#}\nwarning: no model could be fetched; going on with `{TINY}`, made on the spot");
                tiny::make(&args.dir, lessons, (args.steps, &args.device.device))
            }
        },
    }
}

/// Writes the rows into the run folder and says how they are learned.
fn recipe(args: &QuickstartArgs, model: &str, lessons: &[Lesson]) -> Result<Recipe> {
    let data = args.dir.join("data");
    fs::create_dir_all(&data).with_context(|| format!("{}: cannot be made", data.display()))?;
    for (name, split, kinds) in [
        ("medical.jsonl", Split::Train, &[Kind::Medical][..]),
        ("other.jsonl", Split::Train, &[Kind::Other]),
        ("valid.jsonl", Split::Valid, &[Kind::Medical, Kind::Other]),
    ] {
        let rows = lessons.iter().filter(|lesson| lesson.split == split && kinds.contains(&lesson.kind));
        lessons::save(&data.join(name), rows.map(|lesson| (lesson.question.as_str(), lesson.answer.clone())))?;
    }
    let (name, toml) = match args.dir.join(TINY).is_dir() {
        true => ("tiny-lora.toml", include_str!("tiny-lora.toml")),
        false => ("lora.toml", include_str!("lora.toml")),
    };
    filled(name, toml, (model, &data), args.steps.map(NonZeroUsize::get))
}

/// A recipe of ours for the model and the folder of rows, with so many steps if that is asked for.
fn filled(name: &str, toml: &str, (model, data): (&str, &Path), steps: Option<usize>) -> Result<Recipe> {
    let sets: Vec<_> = steps.map(|steps| format!("train.max_steps={steps}")).into_iter().collect();
    let mut recipe = Recipe::parse(toml, Path::new(name), &sets)?;
    recipe.model.path = model.to_owned();
    let sources = recipe.data.train.iter_mut().map(|source| &mut source.path);
    for path in sources.chain(&mut recipe.data.valid) {
        *path = text(&data.join(&*path))?.to_owned();
    }
    Ok(recipe)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{}: expected a path in UTF-8; choose another with --dir", path.display()))
}

/// What the model must not be taken for.
fn caution(model: &str, directory: &Path) -> &'static str {
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
