//! The step loop.

use super::{
    dashboards::Dashboards,
    elsewhere::{self, Elsewhere},
    interrupt::Watch,
    learner::{self, Feed},
    plot,
    record::{Metrics, Summary, peak_rss_bytes},
    setup,
    state::{self, Progress},
};
use crate::{
    adapter::Adapter,
    backend::{Device, on},
    data::epoch_order,
    eval::mean_loss,
    model::{self, Loaded},
    recipe::Recipe,
    write,
};
use anyhow::{Context, Result, bail};
use burn::{backend::Autodiff, module::AutodiffModule};
use burn_llama::{Example, Layout, Llama, Tokenizer, checkpoint, kernel::Kernels};
use burn_peft::{Noise, Pass, param};
use burn_zero::Engine;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::{
    fs,
    io::IsTerminal,
    path::{Path, PathBuf},
    time::Instant,
};

/// The exit code of a run that the user interrupted, as shells have it.
const INTERRUPTED: i32 = 130;
/// The file of a checkpoint that holds what learns and what the optimizer remembers.
const STATE: &str = "training.safetensors";

/// A run under way.
pub struct Run<B: Kernels> {
    recipe: Recipe,
    directory: PathBuf,
    engine: Engine<Autodiff<B>>,
    adapter: Option<Adapter>,
    tokenizer: Tokenizer,
    sources: Vec<Vec<Example>>,
    valid: Vec<Example>,
    /// Where validation is computed, if not here.
    elsewhere: Option<Box<dyn Elsewhere>>,
    metrics: Metrics,
    dashboards: Dashboards,
    /// Whether burn-train's display has the terminal.
    pub display: bool,
    bar: ProgressBar,
    /// Of this process; what came before is in `progress`.
    start: Instant,
    progress: Progress,
}

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
    let recipe = Recipe::load(path, sets)?;
    let name = path.file_stem().unwrap_or_default();
    let directory = directory.unwrap_or_else(|| Path::new("runs").join(name));
    if !resume && directory.read_dir().is_ok_and(|mut files| files.next().is_some()) {
        bail!(
            "{}: the run folder is not empty; choose another with --dir, or go on with its run by --resume",
            directory.display()
        );
    }
    let options = Options { directory, resume, display: std::io::stdout().is_terminal(), device };
    println!("{}", serde_json::to_string(&run(recipe, &options)?)?);
    Ok(())
}

/// Trains as the recipe says and writes everything into the run folder. When the user interrupts it, it writes a checkpoint
/// and ends the program.
pub fn run(recipe: Recipe, options: &Options) -> Result<Summary> {
    let directory = &options.directory;
    if options.resume {
        state::same_recipe(directory, &recipe)?;
        if directory.join("summary.json").exists() {
            bail!("{}: the run is complete; there is nothing to resume", directory.display());
        }
    }
    match on!(options.device.ready()?, |B, place| run_on::<B>(recipe, options, place))? {
        Ended::Complete(summary) => Ok(summary),
        Ended::Interrupted(step) => {
            eprintln!("interrupted after step {step}; go on with --dir {} --resume", directory.display());
            std::process::exit(INTERRUPTED);
        }
    }
}

fn run_on<B: Kernels>(recipe: Recipe, options: &Options, device: &B::Device) -> Result<Ended> {
    let watch = Watch::begin()?;
    let loaded = model::base::<Autodiff<B>>(&recipe.model.path, setup::stored(recipe.model.dtype), device)?;
    let (run, model) = Run::<B>::new(recipe, options, loaded)?;
    learner::launch(run, model, watch.interrupter())
}

/// How a run came to its end.
pub enum Ended {
    /// With everything written; what `summary.json` says.
    Complete(Summary),
    /// With a checkpoint after this step.
    Interrupted(usize),
}

impl<B: Kernels> Run<B> {
    fn new(recipe: Recipe, options: &Options, loaded: Loaded<Autodiff<B>>) -> Result<(Self, Llama<Autodiff<B>>)> {
        let data = &recipe.data;
        let sources = data.train.iter();
        let sources = sources.map(|source| setup::rows(&loaded, data, &source.path, &data.schema(Some(source))));
        let sources = sources.collect::<Result<Vec<_>>>()?;
        let valid = data.valid.as_ref().map(|path| setup::rows(&loaded, data, path, &data.schema(None)));
        let mut valid = valid.transpose()?.unwrap_or_default();
        valid.truncate(data.valid_limit.unwrap_or(usize::MAX));
        let (model, adapter) = setup::adapt(loaded.model, &loaded.tokenizer, &recipe)?;
        let elsewhere = elsewhere::open(&recipe)?;
        let clip = Some(recipe.train.optimizer.max_grad_norm).filter(|&norm| norm > 0.0);
        let mut engine = Engine::new(setup::optimizer(&recipe), clip, setup::checkpointing(&recipe));
        let directory = options.directory.clone();
        fs::create_dir_all(&directory).with_context(|| format!("{}: cannot be made", directory.display()))?;
        let (mut model, mut progress) = (model, Progress::default());
        if let Some(checkpoint) = state::checkpoints(&directory)?.last() {
            progress = state::read(checkpoint)?;
            model = engine.restore(model, &checkpoint.join(STATE)).with_context(|| state::advice(checkpoint))?;
            eprintln!("going on after step {} ({})", progress.step, checkpoint.display());
        }
        write::whole(&directory.join("recipe.toml"), recipe.to_toml()?.as_bytes())?;
        let metrics = Metrics::open(&directory.join("metrics.jsonl"), progress.metrics_bytes)?;
        let dashboards = Dashboards::open(&directory, &recipe, progress.step, &metrics.lines()?)?;
        let bar =
            ProgressBar::new(0).with_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}, {eta} left")?);
        let (tokenizer, start) = (loaded.tokenizer, Instant::now());
        let display = options.display;
        let run = Self {
            recipe,
            directory,
            engine,
            adapter,
            tokenizer,
            sources,
            valid,
            elsewhere,
            metrics,
            dashboards,
            display,
            bar,
            start,
            progress,
        };
        Ok((run, model))
    }

    /// Steps from one evaluation to the next, and in all.
    pub fn evaluated_every(&self) -> (usize, usize) {
        let steps = self.steps();
        (self.recipe.train.saving.eval_every.unwrap_or(steps), steps)
    }

    /// Evaluations without improvement after which the run ends.
    pub fn patience(&self) -> Option<usize> {
        self.recipe.train.saving.early_stopping
    }

    /// Takes the steps that are left and writes what has been learned.
    pub fn go(&mut self, model: &mut Llama<Autodiff<B>>, feed: &mut Feed<B>) -> Result<Ended> {
        let steps = self.steps();
        self.bar.set_length(steps as u64);
        for line in self.metrics.lines()? {
            feed.line(&line);
        }
        if self.progress.step == 0 {
            self.progress.valid_loss_before = self.evaluate(model, 0, feed)?.map(|(loss, _)| loss);
        }
        let mut taken = self.progress.step;
        while taken < steps {
            self.step(model, taken, feed)?;
            taken += 1;
            if taken < steps && self.between(model, taken, feed)? {
                break;
            }
            if taken < steps && feed.interrupter.should_stop() {
                self.checkpoint(model, taken)?;
                self.bar.finish_and_clear();
                self.dashboards.finish(INTERRUPTED as u8)?;
                return Ok(Ended::Interrupted(taken));
            }
        }
        self.finish(model, taken, feed).map(Ended::Complete)
    }

    /// What is due between two steps; whether early stopping has had enough.
    fn between(&mut self, model: &Llama<Autodiff<B>>, step: usize, feed: &mut Feed<B>) -> Result<bool> {
        let saving = &self.recipe.train.saving;
        let due = |every: Option<usize>| every.is_some_and(|every| step.is_multiple_of(every));
        let (evaluate, save) = (due(saving.eval_every), due(saving.save_every));
        let enough = evaluate && self.evaluate(model, step, feed)?.is_some_and(|(_, enough)| enough);
        if save {
            self.checkpoint(model, step)?;
        }
        Ok(enough)
    }

    /// Seconds since the run began, pauses aside.
    fn elapsed(&self) -> f64 {
        self.progress.seconds + self.start.elapsed().as_secs_f64()
    }

    /// Rows per optimizer step.
    fn rows_per_step(&self) -> usize {
        self.recipe.train.steps.batch_size * self.recipe.train.steps.gradient_accumulation
    }

    fn order(&self, epoch: usize) -> Vec<(usize, usize)> {
        let sources = self.sources.iter().zip(&self.recipe.data.train);
        let sizes: Vec<_> = sources.map(|(rows, source)| (rows.len(), source.weight)).collect();
        epoch_order(&sizes, self.recipe.train.steps.seed, epoch as u64, self.recipe.data.shuffle)
    }

    fn steps_per_epoch(&self) -> usize {
        self.order(0).len().div_ceil(self.rows_per_step())
    }

    fn steps(&self) -> usize {
        self.recipe.train.steps.total(self.order(0).len())
    }

    fn step(&mut self, model: &mut Llama<Autodiff<B>>, step: usize, feed: &mut Feed<B>) -> Result<()> {
        let steps = self.steps();
        let (begin, per_epoch, per_step) = (Instant::now(), self.steps_per_epoch(), self.rows_per_step());
        let order = self.order(step / per_epoch);
        let first = step % per_epoch * per_step;
        let rows = order[first..order.len().min(first + per_step)].iter();
        let rows: Vec<Example> = rows.map(|&(source, row)| self.sources[source][row].clone()).collect();
        let targets: usize = rows.iter().map(Example::targets).sum();
        let tokens: usize = rows.iter().map(|row| row.ids.len()).sum();
        let mut loss = 0.0;
        for (index, micro) in rows.chunks(self.recipe.train.steps.batch_size).enumerate() {
            let lengths: Vec<usize> = micro.iter().map(|row| row.ids.len()).collect();
            let layout = Layout::of(&lengths, self.recipe.data.packing);
            let tokens = layout.tokens((index * self.recipe.train.steps.batch_size) as u64);
            let noise = Noise { seed: self.recipe.train.steps.seed, step: step as u64, tokens };
            let batch = model.batch(micro, &layout, 1.0 / targets as f32, Pass::training(noise))?;
            loss += self.engine.accumulate(model, &batch)?;
        }
        let learning_rate = setup::schedule(&self.recipe, steps).at(step);
        let report = self.engine.step(model, learning_rate)?;
        let seconds = begin.elapsed().as_secs_f64();
        self.progress.tokens += tokens;
        self.progress.stepping += seconds;
        let speed = tokens as f64 / seconds;
        let line = json!({
            "step": step + 1, "epoch": (step + 1) as f64 / per_epoch as f64, "loss": loss,
            "learning_rate": learning_rate, "grad_norm": report.grad_norm, "tokens": tokens,
            "target_tokens": targets, "tokens_per_second": speed,
            "elapsed_seconds": self.elapsed(), "peak_rss_bytes": peak_rss_bytes(),
        });
        self.note(&line, feed)?;
        self.show(step + 1, steps, format!("loss {loss:.4}, {speed:.0} tokens/s"));
        Ok(())
    }

    /// Writes a line wherever lines go; whether early stopping has had enough.
    fn note(&mut self, line: &Value, feed: &mut Feed<B>) -> Result<bool> {
        self.metrics.write(line)?;
        self.dashboards.write(line)?;
        Ok(feed.line(line))
    }

    /// A progress bar on a terminal, a line every tenth of the way otherwise; nothing beside burn-train's display.
    fn show(&self, step: usize, steps: usize, message: String) {
        if self.display {
            return;
        }
        if self.bar.is_hidden() {
            if step == 1 || step.is_multiple_of((steps / 10).max(1)) || step == steps {
                let left = self.start.elapsed().as_secs_f64() / step as f64 * (steps - step) as f64;
                eprintln!("step {step}/{steps}: {message}, {left:.0} s left");
            }
        } else {
            self.bar.set_message(message);
            self.bar.set_position(step as u64);
        }
    }

    /// The validation loss, if there are rows to validate on, and whether early stopping has had enough.
    fn evaluate(&mut self, model: &Llama<Autodiff<B>>, step: usize, feed: &mut Feed<B>) -> Result<Option<(f64, bool)>> {
        if self.valid.is_empty() {
            return Ok(None);
        }
        let batching = (self.recipe.train.steps.batch_size, self.recipe.data.packing);
        let loss = match &mut self.elsewhere {
            Some(there) => there.mean_loss(elsewhere::trained::<Autodiff<B>, _>(model), &self.valid, batching)?,
            None => mean_loss(&model.valid(), &self.valid, batching)?.0,
        };
        let line = json!({ "step": step, "valid_loss": loss, "elapsed_seconds": self.elapsed() });
        let enough = self.note(&line, feed)?;
        let message = format!("step {step}: validation loss {loss:.4}");
        match (self.display, self.bar.is_hidden()) {
            (true, _) => {}
            (false, true) => eprintln!("{message}"),
            (false, false) => self.bar.println(message),
        }
        Ok(Some((loss, enough)))
    }

    /// Writes what is trained into `directory`: `adapter/` or `model/`.
    fn save(&self, model: &Llama<Autodiff<B>>, directory: &Path) -> Result<()> {
        match &self.adapter {
            Some(adapter) => adapter.save(model, &directory.join("adapter"))?,
            None => {
                let directory = directory.join("model");
                checkpoint::save(model, &directory)?;
                self.tokenizer.save(&directory)?;
            }
        }
        Ok(())
    }

    /// Writes all that it takes to go on after `step`, and removes what is older than the recipe keeps.
    fn checkpoint(&mut self, model: &Llama<Autodiff<B>>, step: usize) -> Result<()> {
        let progress =
            Progress { step, seconds: self.elapsed(), metrics_bytes: self.metrics.bytes(), ..self.progress.clone() };
        state::commit(&self.directory.join(format!("checkpoint-{step}")), &progress, |directory| {
            self.save(model, directory)?;
            Ok(self.engine.save(model, &directory.join(STATE))?)
        })?;
        let all = state::checkpoints(&self.directory)?;
        let surplus = all.len().saturating_sub(self.recipe.train.saving.keep);
        all[..surplus].iter().try_for_each(|old| state::remove(old))
    }

    fn finish(&mut self, model: &Llama<Autodiff<B>>, steps: usize, feed: &mut Feed<B>) -> Result<Summary> {
        let after = self.evaluate(model, steps, feed)?.map(|(loss, _)| loss);
        let directory = self.directory.clone();
        self.save(model, &directory)?;
        self.bar.finish_and_clear();
        self.dashboards.finish(0)?;
        if let Err(error) = plot::training_loss(&directory.join("metrics.jsonl"), &directory.join("training_loss.png"))
        {
            eprintln!("warning: no picture of the losses: {error:#}");
        }
        let Progress { tokens, stepping, valid_loss_before, .. } = self.progress;
        let summary = Summary {
            valid_loss_before,
            valid_loss_after: after,
            steps,
            seconds: self.elapsed(),
            tokens,
            tokens_per_second: tokens as f64 / stepping,
            peak_rss_bytes: peak_rss_bytes(),
            trainable_parameters: param::count_trainable::<Autodiff<B>, _>(model),
        };
        let text = serde_json::to_string_pretty(&summary)?;
        write::whole(&directory.join("summary.json"), format!("{text}\n").as_bytes())?;
        Ok(summary)
    }
}
