//! The arguments and the course of the verb.

use super::{
    batch,
    budget::Budget,
    engine::{Engine, ItemQueue, StopReason},
    journal::{Journal, JournalEntry},
    output::{RowsOutput, write_file},
    plan::{GenerationPlan, MethodName},
    provider::{ApiProvider, LocalProvider, Provider},
    recipe::{GenerateRecipe, Language},
    report,
};
use crate::{
    args::{DeviceArgs, ModelArgs, WeightsArgs, parse_positive},
    backend::with_backend,
    fetch, model,
    schema::Format,
    write::{create_parent_dir, write_atomically},
};
use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use std::{
    collections::HashMap,
    fmt, fs,
    num::{NonZeroU64, NonZeroUsize},
    path::{Path, PathBuf},
};

/// Arguments of `generate`.
#[derive(Args)]
pub(crate) struct GenerateArgs {
    /// Method by which rows are written
    #[arg(value_enum)]
    pub method: MethodName,
    /// File for the rows, in JSONL; the folder FILE.generate beside it holds the journal, from which a run goes on
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    #[command(flatten)]
    pub recipe: GenerateRecipeArgs,
    #[command(flatten)]
    pub limits: LimitArgs,
    #[command(flatten)]
    pub mode: ModeArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub weights: WeightsArgs,
}

/// The recipe, and keys of it that have options of their own.
#[derive(Args)]
pub(crate) struct GenerateRecipeArgs {
    /// Recipe file (TOML); the options below override it
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Key of the recipe, such as sampling.temperature=0.7 or api.price.input=0.15; may be given several times
    #[arg(long = "set", value_name = "TABLE.KEY=VALUE")]
    pub sets: Vec<String>,
    /// Model: its name at the API, or a local model as for `chat`; default: smollm2-135m-instruct
    #[arg(long)]
    pub model: Option<String>,
    /// Base URL of an OpenAI-compatible API, such as https://api.openai.com/v1; its key is read from the environment
    /// variable that `api.api_key_env` names (OPENAI_API_KEY); without a URL, the model runs in this process
    #[arg(long, value_name = "URL")]
    pub base_url: Option<String>,
    /// File that the method starts from: seed tasks, questions, passages or a graph
    #[arg(long, value_name = "FILE", visible_aliases = ["seeds", "graph"])]
    pub input: Option<PathBuf>,
    /// Format of the rows in --input
    #[arg(long)]
    pub format: Option<Format>,
    /// Language of the prompts and rows
    #[arg(long)]
    pub language: Option<Language>,
    /// Random seed
    #[arg(long)]
    pub seed: Option<u64>,
}

/// Limits of a generation.
#[derive(Args)]
pub(crate) struct LimitArgs {
    /// Number of rows to keep; without it, methods with a file of input work off the whole file
    #[arg(short = 'n', long = "rows", value_parser = parse_positive::<NonZeroU64>)]
    pub rows: Option<NonZeroU64>,
    /// Most requests, over all runs; a request that is sent again after an error counts once
    #[arg(long)]
    pub requests: Option<u64>,
    /// Most tokens of prompts and answers, over all runs
    #[arg(long, value_name = "TOKENS")]
    pub budget_tokens: Option<u64>,
    /// Most money, over all runs, in the currency of `api.price`
    #[arg(long, value_name = "AMOUNT")]
    pub budget_money: Option<f64>,
    /// Most requests in flight at a time; changes no row
    #[arg(long, default_value = "8", value_parser = parse_concurrency)]
    pub concurrency: NonZeroUsize,
}

/// Other work than sending requests, and permissions.
#[derive(Args)]
pub(crate) struct ModeArgs {
    /// Only estimate requests, tokens and money
    #[arg(long)]
    pub dry_run: bool,
    /// Send nothing; write the requests that are open to a batch file in OpenAI's format
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dry_run", "batch_in"])]
    pub batch_out: Option<PathBuf>,
    /// Send nothing; read the results of a batch file and write the rows that follow from all answers so far
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    pub batch_in: Option<PathBuf>,
    /// Send input even if phone or identity numbers stand in it
    #[arg(long)]
    pub allow_personal_data: bool,
    /// Send prompts and the key unencrypted to another machine
    #[arg(long)]
    pub allow_http: bool,
}

fn parse_concurrency(text: &str) -> Result<NonZeroUsize, String> {
    let number = parse_positive::<NonZeroUsize>(text)?;
    if number.get() > 64 { Err("expected a number from 1 to 64".to_owned()) } else { Ok(number) }
}

/// A generation that has stopped at its budget; the rows so far are written.
#[derive(Debug)]
pub struct BudgetReached(String);

impl BudgetReached {
    /// The exit code of the program.
    pub const EXIT_CODE: u8 = 3;
}

impl fmt::Display for BudgetReached {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BudgetReached {}

/// Runs the verb `generate`.
pub(crate) fn generate(args: &GenerateArgs) -> Result<()> {
    let recipe = recipe(args)?;
    // A local model answers nothing that leaves the machine.
    let allow_personal = args.mode.allow_personal_data || recipe.api.base_url.is_none();
    let plan = GenerationPlan::new(args.method, &recipe, &model_args(&recipe), allow_personal)?;
    let endless = plan.method.num_items().is_none();
    if endless && args.limits.rows.is_none() && recipe.budget == Default::default() {
        bail!("{}: the method has no end of its own: say -n ROWS, --requests N or a budget", plan.source.method);
    }
    let folder = run_folder(&args.out)?;
    if args.mode.dry_run {
        return dry_run(args, &recipe, &plan, &folder);
    }
    create_parent_dir(&folder.join("journal.jsonl"))?;
    let mut engine = open(args, &recipe, &plan, &folder)?;
    if let Some(path) = &args.mode.batch_out {
        return write_batch(args, &mut engine, path);
    }
    let provider = match &args.mode.batch_in {
        Some(path) => {
            read_batch(args, &mut engine, path)?;
            None
        }
        None => Some(provider(args, &recipe)?),
    };
    let done = match provider {
        Some(provider) => engine.run(provider.as_ref(), args.limits.concurrency.get()),
        None => replay_batch(&mut engine),
    };
    engine.output.end_progress();
    done?;
    finish(args, &engine, &plan, &folder)
}

fn recipe(args: &GenerateArgs) -> Result<GenerateRecipe> {
    let GenerateRecipeArgs { recipe, sets, model, base_url, input, format, language, seed } = &args.recipe;
    let mut sets = sets.clone();
    let text = |path: &PathBuf| {
        path.to_str().map(str::to_owned).with_context(|| format!("{}: expected a path in UTF-8", path.display()))
    };
    let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
    let mut set = |key: &str, value: Option<String>| sets.extend(value.map(|value| format!("{key}={value}")));
    set("api.model", model.as_deref().map(quoted));
    set("api.base_url", base_url.as_deref().map(quoted));
    set("input", input.as_ref().map(text).transpose()?.as_deref().map(quoted));
    set("format", format.map(|format| quoted(format.name())));
    set("language", language.map(|language| quoted(language.name())));
    set("seed", seed.map(|seed| seed.to_string()));
    set("budget.requests", args.limits.requests.map(|n| n.to_string()));
    set("budget.tokens", args.limits.budget_tokens.map(|n| n.to_string()));
    set("budget.money", args.limits.budget_money.map(|n| format!("{n:?}")));
    GenerateRecipe::load(recipe.as_deref(), &sets)
}

fn model_args(recipe: &GenerateRecipe) -> ModelArgs {
    ModelArgs { model: recipe.api.model.clone(), adapter: Vec::new(), tokenizer: None }
}

/// Returns the folder beside the file of rows. A file of rows without that folder is not overwritten.
fn run_folder(out: &Path) -> Result<PathBuf> {
    let name = out.file_name().with_context(|| format!("--out {}: expected the name of a file", out.display()))?;
    let mut name = name.to_owned();
    name.push(".generate");
    let folder = out.with_file_name(name);
    if out.exists() && !folder.is_dir() {
        bail!("--out {}: another file stands there; remove it or choose another name", out.display());
    }
    Ok(folder)
}

fn open<'a>(
    args: &GenerateArgs,
    recipe: &'a GenerateRecipe,
    plan: &'a GenerationPlan,
    folder: &Path,
) -> Result<Engine<'a>> {
    let mut budget = Budget::new(recipe.budget.clone(), recipe.api.price.clone());
    let mut format = recipe.api.response_format;
    let journal = Journal::open(&folder.join("journal.jsonl"), |entry| {
        budget.record(entry);
        if let JournalEntry::Format { response_format } = entry {
            format = *response_format;
        }
    })?;
    budget.close_lost();
    write_file(&folder.join("recipe.toml"), recipe.to_toml()?.as_bytes())?;
    let wanted = args.limits.rows.map(NonZeroU64::get);
    let output = RowsOutput::new(plan.rules.clone(), plan.source.clone(), wanted);
    let (method, queue) = (plan.method.as_ref(), ItemQueue::default());
    Ok(Engine { method, recipe, journal, budget, output, format, queue, stop: None })
}

fn provider(args: &GenerateArgs, recipe: &GenerateRecipe) -> Result<Box<dyn Provider>> {
    if let Some(url) = &recipe.api.base_url {
        return Ok(Box::new(ApiProvider::new(&recipe.api, url, args.mode.allow_http)?));
    }
    let model = model_args(recipe);
    fetch::resolve(&model.model).with_context(|| "without `api.base_url`, `api.model` names a local model")?;
    with_backend!(args.device.device.ensure_ready()?, |B, device| {
        let mut loaded = model::load::<B>(&model, args.weights.weights, device)?;
        loaded.model = model::with_compute(loaded.model, args.weights.compute)?;
        Ok(Box::new(LocalProvider::<B>::new(loaded)))
    })
}

/// Returns the number of items that a batch or an estimate has.
fn planned_items(args: &GenerateArgs, engine: &Engine) -> u64 {
    let size = engine.method.expected_size();
    let by_rows = args.limits.rows.map(|rows| (rows.get() as f64 / size.rows).ceil() as u64);
    let by_requests = engine.recipe.budget.requests.map(|requests| (requests as f64 / size.requests).ceil() as u64);
    let planned = [by_rows, by_requests, engine.method.num_items()].into_iter().flatten().min();
    planned.unwrap_or(1).max(engine.journal.end_item)
}

fn dry_run(args: &GenerateArgs, recipe: &GenerateRecipe, plan: &GenerationPlan, folder: &Path) -> Result<()> {
    // The estimate needs a journal, which is thrown away unless there is one.
    let temporary = tempfile::tempdir().context("no temporary folder can be made")?;
    let journal = folder.join("journal.jsonl");
    if journal.is_file() {
        fs::copy(&journal, temporary.path().join("journal.jsonl")).with_context(|| journal.display().to_string())?;
    }
    let mut engine = open(args, recipe, plan, temporary.path())?;
    let items = planned_items(args, &engine);
    let earlier = report::mean_usage(&engine.journal);
    let open = engine.replay(items)?;
    let remaining = if engine.output.is_complete() { 0 } else { open.len() as u64 };
    let estimate = report::SizeEstimate::new(engine.method, remaining, &open, earlier);
    println!("{}", estimate.text(&engine.budget, recipe));
    Ok(())
}

fn write_batch(args: &GenerateArgs, engine: &mut Engine, path: &Path) -> Result<()> {
    let open = engine.replay(planned_items(args, engine))?;
    if open.is_empty() {
        bail!("{}: no request is open: every answer is there; --batch-in or a run writes the rows", path.display());
    }
    batch::write_requests(path, &open, engine.format)?;
    println!("{}: {} requests; read the results with --batch-in", path.display(), open.len());
    Ok(())
}

fn read_batch(args: &GenerateArgs, engine: &mut Engine, path: &Path) -> Result<()> {
    let end = planned_items(args, engine);
    let empty = engine.output.emptied();
    let output = std::mem::replace(&mut engine.output, empty);
    let open = engine.replay(end)?;
    engine.output = output;
    let items: HashMap<_, _> = open.into_iter().map(|request| (request.key, request.place.item)).collect();
    let results = batch::read_results(path, &items, |key| engine.journal.answer(key).is_some())?;
    for entry in results.entries {
        engine.record(entry)?;
    }
    engine.journal.sync()?;
    for problem in &results.problems {
        eprintln!("note: {problem}");
    }
    Ok(())
}

fn replay_batch(engine: &mut Engine) -> Result<()> {
    let open = engine.replay(engine.journal.end_item)?;
    if !open.is_empty() && !engine.output.is_complete() {
        eprintln!(
            "note: {} requests are open; --batch-out writes them, and a run without --batch-in sends them",
            open.len()
        );
    }
    Ok(())
}

/// Writes the files and says how the generation has ended.
fn finish(args: &GenerateArgs, engine: &Engine, plan: &GenerationPlan, folder: &Path) -> Result<()> {
    let (counts, texts) = (&engine.output.counts, engine.output.texts());
    write_file(&folder.join("rejected.jsonl"), &texts.rejected)?;
    let figures = report::figures(counts, &engine.budget, engine.recipe, engine.stop.as_ref());
    write_file(&folder.join("report.json"), format!("{figures:#}\n").as_bytes())?;
    if counts.rows > 0 {
        if !texts.pairs.is_empty() {
            write_atomically(&args.out.with_extension("pairs.jsonl"), &texts.pairs)?;
        }
        write_atomically(&args.out, &texts.rows)?;
    }
    eprint!("{}", report::table(counts, &engine.budget));
    println!("{figures}");
    let (out, rows) = (args.out.display(), counts.rows);
    match &engine.stop {
        Some(StopReason::Failure(message)) => Err(anyhow!("{message}; {rows} rows so far; the same command goes on")),
        Some(StopReason::Budget("requests")) if args.limits.rows.is_none() && rows > 0 => Ok(()),
        Some(StopReason::Budget(limit)) => {
            let option = if *limit == "requests" { "--requests".to_owned() } else { format!("--budget-{limit}") };
            let wanted = args.limits.rows.map(|wanted| format!(" of {wanted}")).unwrap_or_default();
            let message = format!(
                "stopped at the budget of {limit}: {out} has {rows}{wanted} rows, spent {}; the same command with a higher \
                 {option} goes on",
                engine.budget.describe()
            );
            Err(BudgetReached(message).into())
        }
        None if rows == 0 => {
            let folder = folder.display();
            Err(anyhow!("no row was kept; {folder}/rejected.jsonl has the reasons, and no {out} was written"))
        }
        None => {
            eprintln!("{out}: {rows} rows in the format {}", plan.format);
            Ok(())
        }
    }
}
