//! The step loop.

use super::{
    elsewhere::{self, Elsewhere},
    journal::Journal,
    launch::{INTERRUPTED, Options},
    learner::Feed,
    memory::{self, Load},
    plot,
    record::{Summary, peak_rss_bytes},
    setup,
    state::{self, Progress},
};
use crate::{
    adapter::Adapter,
    data::Plan,
    eval::loss,
    model::Loaded,
    process,
    recipe::{Compute, Recipe},
    write,
};
use anyhow::{Context, Result, bail};
use burn::{backend::Autodiff, module::AutodiffModule};
use burn_llama::{Batch, Example, Layout, Llama, Tokenizer, checkpoint, kernel::Kernels};
use burn_peft::{Noise, Pass, adapter::Rounding, param};
use burn_zero::{Engine, StepReport, comm::Communicator};
use serde_json::{Value, json};
use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
    time::Instant,
};

/// The file of a checkpoint that holds what learns and what the optimizer remembers.
pub const STATE: &str = "training.safetensors";

/// A run under way.
pub struct Run<B: Kernels> {
    recipe: Recipe,
    directory: PathBuf,
    engine: Engine<Autodiff<B>>,
    trained: Trained,
    sources: Vec<Vec<Example>>,
    plan: Plan,
    valid: Vec<Example>,
    /// Where validation is computed, if not here.
    elsewhere: Option<Box<dyn Elsewhere>>,
    journal: Journal,
    /// Whether burn-train's display has the terminal.
    pub display: bool,
    /// Of this process; what came before is in `progress`.
    start: Instant,
    /// From the start of the process to the first step of this run, in seconds.
    until_first_step: Option<f64>,
    progress: Progress,
}

/// What a run writes.
enum Trained {
    /// An adapter directory.
    Adapter(Adapter),
    /// A model directory, its tokenizer with it. Else the tokenizer has done its work when the rows are tokens.
    Model(Box<Tokenizer>),
}

/// How a run came to its end.
pub enum Ended {
    /// With everything written; what `summary.json` says.
    Complete(Summary),
    /// With a checkpoint after this step.
    Interrupted(usize),
}

impl<B: Kernels> Run<B> {
    /// A run that is about to begin, or to go on, and its model.
    pub fn new(
        recipe: Recipe,
        options: &Options,
        (loaded, communicator): (Loaded<Autodiff<B>>, Box<dyn Communicator>),
    ) -> Result<(Self, Llama<Autodiff<B>>)> {
        let data = &recipe.data;
        let sources = data.train.iter();
        let sources = sources.map(|source| setup::rows(&loaded, data, &source.path, &data.schema(Some(source))));
        let sources = sources.collect::<Result<Vec<_>>>()?;
        let valid = data.valid.as_ref().map(|path| setup::rows(&loaded, data, path, &data.schema(None)));
        let mut valid = valid.transpose()?.unwrap_or_default();
        valid.truncate(data.valid_limit.unwrap_or(usize::MAX));
        let (model, adapter) = setup::adapt(loaded.model, &loaded.tokenizer, &recipe)?;
        let elsewhere = elsewhere::open(&recipe)?;
        let lengths = |rows: &Vec<Example>| rows.iter().map(|row| row.ids.len()).collect();
        let plan = Plan::new(&recipe, sources.iter().map(lengths).collect(), communicator.world())?;
        let load = Load {
            trained: param::count_trainable::<Autodiff<B>, _>(&model) as u64,
            tokens: plan.most_tokens() as u64,
            ..Load::least(model.config(), &recipe, communicator.world() as u64)
        };
        memory::check(&load, &recipe, &options.device)?;
        let mut engine = setup::engine::<B>(&recipe, communicator)?;
        let first = engine.rank() == 0;
        let directory = options.directory.clone();
        fs::create_dir_all(&directory).with_context(|| format!("{}: cannot be made", directory.display()))?;
        let (mut model, mut progress) = (model, Progress::default());
        if let Some(checkpoint) = state::checkpoints(&directory)?.last() {
            progress = state::read(checkpoint)?;
            let rows = plan.rows_per_step();
            if progress.rows_per_step != rows {
                bail!(
                    "{}: `train.batch_size` · `train.gradient_accumulation` · ranks: the run has {} rows per step, now {rows}; \
                     a resumed run keeps them",
                    checkpoint.display(),
                    progress.rows_per_step
                );
            }
            model = engine.restore(model, &checkpoint.join(STATE)).with_context(|| state::advice(checkpoint))?;
            if first {
                eprintln!("going on after step {} ({})", progress.step, checkpoint.display());
            }
        } else if let Some(Rounding { layers, taken, left }) = setup::start(&mut model, &recipe)?.filter(|_| first) {
            let share = 100.0 * (1.0 - left / taken);
            eprintln!("loftq: the adapters of {layers} layers give back {share:.1} % of the squares that nf4 took");
        }
        if first {
            write::whole(&directory.join("recipe.toml"), recipe.to_toml()?.as_bytes())?;
        }
        let place = (progress.step, progress.metrics_bytes);
        let journal = Journal::open(&directory, &recipe, place, (first, options.display))?;
        let tokenizer = loaded.tokenizer;
        let trained = adapter.map_or_else(|| Trained::Model(Box::new(tokenizer)), Trained::Adapter);
        let display = options.display;
        let run = Self {
            recipe,
            directory,
            engine,
            trained,
            sources,
            plan,
            valid,
            elsewhere,
            journal,
            display,
            start: Instant::now(),
            until_first_step: None,
            progress,
        };
        Ok((run, model))
    }

    /// Steps from one evaluation to the next, and in all.
    pub fn evaluated_every(&self) -> (usize, usize) {
        let steps = self.plan.total();
        (self.recipe.train.saving.eval_every.unwrap_or(steps), steps)
    }

    /// Evaluations without improvement after which the run ends.
    pub fn patience(&self) -> Option<usize> {
        self.recipe.train.saving.early_stopping
    }

    /// Takes the steps that are left and writes what has been learned.
    pub fn go(&mut self, model: &mut Llama<Autodiff<B>>, feed: &mut Feed<B>) -> Result<Ended> {
        let steps = self.plan.total();
        for line in self.journal.lines()? {
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
            if taken < steps && self.all_heard(feed.interrupter.should_stop())? {
                self.checkpoint(model, taken)?;
                self.journal.finish(INTERRUPTED as u8)?;
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

    /// Whether any rank says so: only together can they change their way.
    fn all_heard(&self, said: bool) -> Result<bool> {
        Ok(self.engine.sum_over_ranks(&[f64::from(said)])?[0] > 0.0)
    }

    fn step(&mut self, model: &mut Llama<Autodiff<B>>, step: usize, feed: &mut Feed<B>) -> Result<()> {
        self.until_first_step.get_or_insert_with(|| process::age().as_secs_f64());
        let (begin, steps, planned) = (Instant::now(), self.plan.total(), self.plan.step(step));
        let rows = planned.rows.iter().map(|&(source, row)| self.sources[source][row].clone());
        let rows: Vec<Example> = rows.collect();
        let targets: usize = rows.iter().map(Example::targets).sum();
        let tokens: usize = rows.iter().map(|row| row.ids.len()).sum();
        let own = planned.of_rank(self.engine.rank(), self.engine.world());
        let learning_rate = setup::learning_rate(&self.recipe, step - self.progress.skipped, steps)?;
        let loss_scale = self.engine.loss_scale();
        let (loss, report) = B::at_work(|| self.learn(model, (&rows, targets), (step, own), learning_rate))?;
        self.progress.skipped += usize::from(report.skipped);
        let seconds = begin.elapsed().as_secs_f64();
        self.progress.tokens += tokens;
        self.progress.stepping += seconds;
        let speed = tokens as f64 / seconds;
        let mut line = json!({
            "step": step + 1, "epoch": planned.epoch, "loss": loss,
            "learning_rate": learning_rate, "grad_norm": report.grad_norm, "tokens": tokens,
            "target_tokens": targets, "tokens_per_second": speed,
            "elapsed_seconds": self.elapsed(), "peak_rss_bytes": peak_rss_bytes(),
        });
        if self.recipe.model.compute == Compute::F16 {
            line["loss_scale"] = json!(loss_scale);
            line["skipped"] = json!(report.skipped);
        }
        self.note(&line, feed)?;
        self.journal.show(step + 1, steps, format!("loss {loss:.4}, {speed:.0} tokens/s"));
        Ok(())
    }

    /// Learns a step's rows, each rank those of its `own` micro-batches; the loss of all, and what the step found.
    fn learn(
        &mut self,
        model: &mut Llama<Autodiff<B>>,
        (rows, targets): (&[Example], usize),
        (step, own): (usize, impl Iterator<Item = Range<usize>>),
        learning_rate: f64,
    ) -> Result<(f64, StepReport)> {
        let (mut loss, mut own) = (0.0, own.peekable());
        while let Some(micro) = own.next() {
            let batch = self.batch(model, (rows, targets), (step, micro))?;
            if own.peek().is_none() {
                let (last, report) = self.engine.accumulate_and_step(model, &batch, learning_rate)?;
                return Ok((self.engine.sum_over_ranks(&[loss + last])?[0], report));
            }
            loss += self.engine.accumulate(model, &batch)?;
        }
        bail!("step {step} has no micro-batch")
    }

    /// One micro-batch of a step.
    fn batch(
        &mut self,
        model: &Llama<Autodiff<B>>,
        (rows, targets): (&[Example], usize),
        (step, micro): (usize, Range<usize>),
    ) -> Result<Batch<Autodiff<B>>> {
        let (first, micro) = (micro.start, &rows[micro]);
        // A rank without a row of its own computes one that weighs nothing: all take part in every exchange.
        let (micro, weight) = if micro.is_empty() { (&rows[..1], 0.0) } else { (micro, 1.0 / targets as f32) };
        let lengths: Vec<usize> = micro.iter().map(|row| row.ids.len()).collect();
        let layout = Layout::of(&lengths, self.recipe.data.packing.joins());
        let noise =
            Noise { seed: self.recipe.train.steps.seed, step: step as u64, tokens: layout.tokens(first as u64) };
        let weight = weight * self.engine.loss_scale() as f32;
        Ok(model.batch(micro, &layout, weight, Pass::training(noise))?)
    }

    /// Writes a line wherever lines go; whether early stopping has had enough.
    fn note(&mut self, line: &Value, feed: &mut Feed<B>) -> Result<bool> {
        Ok(self.journal.write(line)? && feed.line(line))
    }

    /// The validation loss, if there are rows to validate on, and whether early stopping has had enough.
    fn evaluate(&mut self, model: &Llama<Autodiff<B>>, step: usize, feed: &mut Feed<B>) -> Result<Option<(f64, bool)>> {
        if self.valid.is_empty() {
            return Ok(None);
        }
        let steps = &self.recipe.train.steps;
        let batching = (steps.batch_size, self.recipe.data.packing.joins());
        // Whole batches, in turn.
        let own = self.valid.chunks(steps.batch_size).skip(self.engine.rank()).step_by(self.engine.world());
        let own: Vec<Example> = own.flatten().cloned().collect();
        let elsewhere = &mut self.elsewhere;
        let (sum, targets) = self.engine.with_whole(model, |model| match elsewhere {
            Some(there) => there.loss(elsewhere::trained::<Autodiff<B>, _>(model), &own, batching),
            None => loss(&model.valid(), &own, batching),
        })??;
        let sums = self.engine.sum_over_ranks(&[sum, targets as f64])?;
        let loss = sums[0] / sums[1];
        let line = json!({ "step": step, "valid_loss": loss, "elapsed_seconds": self.elapsed() });
        let enough = self.note(&line, feed)?;
        let enough = self.all_heard(enough)?;
        self.journal.say(&format!("step {step}: validation loss {loss:.4}"));
        Ok(Some((loss, enough)))
    }

    /// Writes what is trained into `directory`: `adapter/` or `model/`. Every rank calls this, the first one writes.
    fn save(&mut self, model: &Llama<Autodiff<B>>, directory: &Path) -> Result<()> {
        let (first, trained) = (self.engine.rank() == 0, &self.trained);
        self.engine.with_whole(model, |model| match trained {
            _ if !first => Ok(()),
            Trained::Adapter(adapter) => adapter.save(model, &directory.join("adapter")),
            Trained::Model(tokenizer) => {
                let directory = directory.join("model");
                checkpoint::save(model, &directory)?;
                Ok(tokenizer.save(&directory)?)
            }
        })?
    }

    /// Writes all that it takes to go on after `step`, and removes what is older than the recipe keeps.
    fn checkpoint(&mut self, model: &Llama<Autodiff<B>>, step: usize) -> Result<()> {
        let (seconds, metrics_bytes) = (self.elapsed(), self.journal.bytes());
        let rows_per_step = self.plan.rows_per_step();
        let progress = Progress { step, rows_per_step, seconds, metrics_bytes, ..self.progress.clone() };
        let place = self.directory.join(format!("checkpoint-{step}"));
        let first = self.engine.rank() == 0;
        let beside = if first { state::begin(&place) } else { Ok(state::beside(&place)) }?;
        // All ranks write into the folder, once it is there, and it is whole when all have.
        self.engine.barrier()?;
        let written = self
            .save(model, &beside)
            .and_then(|()| Ok(self.engine.save(model, &beside.join(STATE))?))
            .and_then(|()| Ok(self.engine.barrier()?));
        if first {
            state::commit(&place, &progress, written)?;
            let all = state::checkpoints(&self.directory)?;
            let surplus = all.len().saturating_sub(self.recipe.train.saving.keep);
            return all[..surplus].iter().try_for_each(|old| state::remove(old));
        }
        written
    }

    fn finish(&mut self, model: &Llama<Autodiff<B>>, steps: usize, feed: &mut Feed<B>) -> Result<Summary> {
        if let Some(trace) = &self.recipe.parallel.files.trace {
            // Before the last evaluation, which is no part of training.
            self.engine.write_trace(Path::new(trace))?;
            if let Some(share) = self.engine.trace().hidden_share() {
                self.journal.say(&format!(
                    "{trace}: {:.0} % of the time in collectives lies inside computation",
                    100.0 * share
                ));
            }
        }
        let after = self.evaluate(model, steps, feed)?.map(|(loss, _)| loss);
        let directory = self.directory.clone();
        self.save(model, &directory)?;
        self.journal.finish(0)?;
        let first = self.engine.rank() == 0;
        let (metrics, picture) = (directory.join("metrics.jsonl"), directory.join("training_loss.png"));
        if let Err(error) = if first { plot::training_loss(&metrics, &picture) } else { Ok(()) } {
            eprintln!("warning: no picture of the losses: {error:#}");
        }
        let Progress { tokens, stepping, valid_loss_before, .. } = self.progress;
        let summary = Summary {
            valid_loss_before,
            valid_loss_after: after,
            steps,
            seconds: self.elapsed(),
            seconds_to_first_step: self.until_first_step,
            tokens,
            tokens_per_second: tokens as f64 / stepping,
            peak_rss_bytes: peak_rss_bytes(),
            trainable_parameters: self.engine.with_whole(model, param::count_trainable::<Autodiff<B>, _>)?,
        };
        if first {
            let text = serde_json::to_string_pretty(&summary)?;
            write::whole(&directory.join("summary.json"), format!("{text}\n").as_bytes())?;
        }
        Ok(summary)
    }
}
