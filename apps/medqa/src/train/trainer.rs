//! The training loop.

use super::{
    command::{INTERRUPTED_EXIT_CODE, TrainOptions},
    eval_device::{self, Evaluator},
    learner::BurnTrainReporter,
    memory::{self, RunFootprint, peak_rss_bytes},
    plot,
    record::Summary,
    run_log::RunLog,
    setup,
    state::{self, TrainerState},
};
use crate::{
    data::BatchSampler,
    eval::{EvalBatching, loss_sum},
    method_adapter::AttachedAdapter,
    model::LoadedModel,
    process,
    recipe::{ComputeDtype, Recipe},
    write,
};
use anyhow::{Context, Result, bail};
use burn::{backend::Autodiff, module::AutodiffModule};
use burn_llama::{Batch, Example, Llama, SequenceLayout, Tokenizer, checkpoint, kernel::Kernels};
use burn_peft::{DropoutKey, ForwardContext, adapter::QuantizationResidual, param};
use burn_zero::{Engine, StepReport, comm::Communicator};
use serde_json::{Value, json};
use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
    time::Instant,
};

/// The file of a checkpoint that holds the trainable parameters and the optimizer states.
pub const STATE_FILE: &str = "training.safetensors";

/// The trainer of one run.
pub struct Trainer<B: Kernels> {
    recipe: Recipe,
    directory: PathBuf,
    engine: Engine<Autodiff<B>>,
    output: RunOutput,
    sources: Vec<Vec<Example>>,
    batch_sampler: BatchSampler,
    valid: Vec<Example>,
    /// Computes the validation loss on `train.eval_device`, if that is given.
    evaluator: Option<Box<dyn Evaluator>>,
    run_log: RunLog,
    /// True if burn-train's display uses the terminal.
    pub display: bool,
    /// The start time in this process; the time before a resume is in `state`.
    start: Instant,
    /// Seconds from the start of the process to the first step of this run.
    seconds_to_first_step: Option<f64>,
    state: TrainerState,
}

/// The result that a run writes.
enum RunOutput {
    /// An adapter directory.
    Adapter(AttachedAdapter),
    /// A model directory, with the tokenizer. An adapter directory needs none, so the tokenizer is dropped once the
    /// rows are tokens.
    Model(Box<Tokenizer>),
}

/// The outcome of a run.
pub enum RunOutcome {
    /// Everything is written; the contents of `summary.json`.
    Complete(Summary),
    /// The user interrupted it, and there is a checkpoint after this step.
    Interrupted(usize),
}

impl<B: Kernels> Trainer<B> {
    /// Prepares a new or a resumed run, and returns it with its model.
    pub fn new(
        recipe: Recipe,
        options: &TrainOptions,
        (loaded, communicator): (LoadedModel<Autodiff<B>>, Box<dyn Communicator>),
    ) -> Result<(Self, Llama<Autodiff<B>>)> {
        let data = &recipe.data;
        let sources = data.train.iter();
        let sources =
            sources.map(|source| setup::load_examples(&loaded, data, &source.path, &data.schema(Some(source))));
        let sources = sources.collect::<Result<Vec<_>>>()?;
        let valid = data.valid.as_ref().map(|path| setup::load_examples(&loaded, data, path, &data.schema(None)));
        let mut valid = valid.transpose()?.unwrap_or_default();
        valid.truncate(data.valid_limit.unwrap_or(usize::MAX));
        let (model, adapter) = setup::apply_method(loaded.model, &loaded.tokenizer, &recipe)?;
        let elsewhere = eval_device::open(&recipe)?;
        let lengths = |rows: &Vec<Example>| rows.iter().map(|row| row.ids.len()).collect();
        let batch_sampler =
            BatchSampler::new(&recipe, sources.iter().map(lengths).collect(), communicator.world_size())?;
        let footprint = RunFootprint {
            trained: param::count_trainable::<Autodiff<B>, _>(&model) as u64,
            tokens: batch_sampler.max_micro_batch_tokens() as u64,
            ..RunFootprint::lower_bound(model.config(), &recipe, communicator.world_size() as u64)
        };
        memory::check(&footprint, &recipe, &options.device)?;
        let mut engine = setup::engine::<B>(&recipe, communicator)?;
        let first = engine.rank() == 0;
        let directory = options.directory.clone();
        fs::create_dir_all(&directory).with_context(|| format!("{}: cannot be made", directory.display()))?;
        let (mut model, mut progress) = (model, TrainerState::default());
        if let Some(checkpoint) = state::checkpoints(&directory)?.last() {
            progress = state::read_state(checkpoint)?;
            let rows = batch_sampler.rows_per_step();
            if progress.rows_per_step != rows {
                bail!(
                    "{}: `train.batch_size` · `train.gradient_accumulation` · ranks: the run has {} rows per step, now {rows}; \
                     a resumed run keeps them",
                    checkpoint.display(),
                    progress.rows_per_step
                );
            }
            model = engine.restore(model, &checkpoint.join(STATE_FILE)).with_context(|| state::advice(checkpoint))?;
            if first {
                eprintln!("going on after step {} ({})", progress.step, checkpoint.display());
            }
        } else if let Some(QuantizationResidual { layers, without_adapter: taken, with_adapter: left }) =
            setup::init_loftq(&mut model, &recipe)?.filter(|_| first)
        {
            let share = 100.0 * (1.0 - left / taken);
            eprintln!("loftq: the adapters of {layers} layers remove {share:.1} % of the squared error of nf4");
        }
        if first {
            write::write_atomically(&directory.join("recipe.toml"), recipe.to_toml()?.as_bytes())?;
        }
        let resume_point = (progress.step, progress.metrics_bytes);
        let journal = RunLog::open(&directory, &recipe, resume_point, (first, options.display))?;
        let tokenizer = loaded.tokenizer;
        let trained = adapter.map_or_else(|| RunOutput::Model(Box::new(tokenizer)), RunOutput::Adapter);
        let display = options.display;
        let run = Self {
            recipe,
            directory,
            engine,
            output: trained,
            sources,
            batch_sampler,
            valid,
            evaluator: elsewhere,
            run_log: journal,
            display,
            start: Instant::now(),
            seconds_to_first_step: None,
            state: progress,
        };
        Ok((run, model))
    }

    /// Returns the steps between two evaluations, and in total.
    pub fn eval_interval(&self) -> (usize, usize) {
        let steps = self.batch_sampler.total_steps();
        (self.recipe.train.eval_save.eval_every.unwrap_or(steps), steps)
    }

    /// Returns the number of evaluations without improvement after which the run ends.
    pub fn patience(&self) -> Option<usize> {
        self.recipe.train.eval_save.early_stopping
    }

    /// Takes the remaining steps and writes the result.
    pub fn train(&mut self, model: &mut Llama<Autodiff<B>>, reporter: &mut BurnTrainReporter<B>) -> Result<RunOutcome> {
        let steps = self.batch_sampler.total_steps();
        for line in self.run_log.lines()? {
            reporter.report(&line);
        }
        if self.state.step == 0 {
            self.state.valid_loss_before = self.evaluate(model, 0, reporter)?.map(|(loss, _)| loss);
        }
        let mut taken = self.state.step;
        while taken < steps {
            self.step(model, taken, reporter)?;
            taken += 1;
            if taken < steps && self.after_step(model, taken, reporter)? {
                break;
            }
            if taken < steps && self.any_rank(reporter.interrupter.should_stop())? {
                self.save_checkpoint(model, taken)?;
                self.run_log.finish(INTERRUPTED_EXIT_CODE as u8)?;
                return Ok(RunOutcome::Interrupted(taken));
            }
        }
        self.finish(model, taken, reporter).map(RunOutcome::Complete)
    }

    /// Evaluates and saves a checkpoint if they are due after `step`; returns whether to stop early.
    fn after_step(
        &mut self,
        model: &Llama<Autodiff<B>>,
        step: usize,
        reporter: &mut BurnTrainReporter<B>,
    ) -> Result<bool> {
        let saving = &self.recipe.train.eval_save;
        let due = |every: Option<usize>| every.is_some_and(|every| step.is_multiple_of(every));
        let (evaluate, save) = (due(saving.eval_every), due(saving.save_every));
        let stop = evaluate && self.evaluate(model, step, reporter)?.is_some_and(|(_, enough)| enough);
        if save {
            self.save_checkpoint(model, step)?;
        }
        Ok(stop)
    }

    /// Returns the seconds since the run started, without the time between interruption and resume.
    fn elapsed(&self) -> f64 {
        self.state.seconds + self.start.elapsed().as_secs_f64()
    }

    /// Returns whether `said` is true on any rank, so that all ranks take the same branch.
    fn any_rank(&self, value: bool) -> Result<bool> {
        Ok(self.engine.sum_over_ranks(&[f64::from(value)])?[0] > 0.0)
    }

    fn step(&mut self, model: &mut Llama<Autodiff<B>>, step: usize, reporter: &mut BurnTrainReporter<B>) -> Result<()> {
        self.seconds_to_first_step.get_or_insert_with(|| process::uptime().as_secs_f64());
        let (begin, steps, planned) = (Instant::now(), self.batch_sampler.total_steps(), self.batch_sampler.step(step));
        let rows = planned.rows.iter().map(|&(source, row)| self.sources[source][row].clone());
        let rows: Vec<Example> = rows.collect();
        let targets: usize = rows.iter().map(Example::num_targets).sum();
        let tokens: usize = rows.iter().map(|row| row.ids.len()).sum();
        let micro_batches = planned.micro_batches_of_rank(self.engine.rank(), self.engine.world());
        let learning_rate = setup::learning_rate(&self.recipe, step - self.state.skipped, steps)?;
        let loss_scale = self.engine.loss_scale();
        let (loss, report) = B::with_spinning_pool(|| {
            self.run_micro_batches(model, (&rows, targets), (step, micro_batches), learning_rate)
        })?;
        self.state.skipped += usize::from(report.skipped);
        let seconds = begin.elapsed().as_secs_f64();
        self.state.tokens += tokens;
        self.state.stepping += seconds;
        let speed = tokens as f64 / seconds;
        let mut line = json!({
            "step": step + 1, "epoch": planned.epoch, "loss": loss,
            "learning_rate": learning_rate, "grad_norm": report.grad_norm, "tokens": tokens,
            "target_tokens": targets, "tokens_per_second": speed,
            "elapsed_seconds": self.elapsed(), "peak_rss_bytes": peak_rss_bytes(),
        });
        if self.recipe.model.compute == ComputeDtype::F16 {
            line["loss_scale"] = json!(loss_scale);
            line["skipped"] = json!(report.skipped);
        }
        self.log(&line, reporter)?;
        self.run_log.show_progress(step + 1, steps, format!("loss {loss:.4}, {speed:.0} tokens/s"));
        Ok(())
    }

    /// Runs forward and backward passes over this rank's `own` micro-batches, then the optimizer step; returns the loss
    /// of all ranks and the report of the step.
    fn run_micro_batches(
        &mut self,
        model: &mut Llama<Autodiff<B>>,
        (rows, targets): (&[Example], usize),
        (step, micro_batches): (usize, impl Iterator<Item = Range<usize>>),
        learning_rate: f64,
    ) -> Result<(f64, StepReport)> {
        let (mut loss, mut own) = (0.0, micro_batches.peekable());
        while let Some(micro) = own.next() {
            let batch = self.micro_batch(model, (rows, targets), (step, micro))?;
            if own.peek().is_none() {
                let (last, report) = self.engine.forward_backward_step(model, &batch, learning_rate)?;
                return Ok((self.engine.sum_over_ranks(&[loss + last])?[0], report));
            }
            loss += self.engine.forward_backward(model, &batch)?;
        }
        bail!("step {step} has no micro-batch")
    }

    /// Builds one micro-batch of a step.
    fn micro_batch(
        &mut self,
        model: &Llama<Autodiff<B>>,
        (rows, targets): (&[Example], usize),
        (step, micro): (usize, Range<usize>),
    ) -> Result<Batch<Autodiff<B>>> {
        let (first, micro) = (micro.start, &rows[micro]);
        // A rank without rows computes one row with weight 0, because all ranks take part in every collective.
        let (micro, weight) = if micro.is_empty() { (&rows[..1], 0.0) } else { (micro, 1.0 / targets as f32) };
        let lengths: Vec<usize> = micro.iter().map(|row| row.ids.len()).collect();
        let layout = SequenceLayout::from_lengths(&lengths, self.recipe.data.packing.is_padding_free());
        let noise = DropoutKey {
            seed: self.recipe.train.steps.seed,
            step: step as u64,
            tokens: layout.dropout_tokens(first as u64),
        };
        let weight = weight * self.engine.loss_scale() as f32;
        Ok(model.batch(micro, &layout, weight, ForwardContext::training(noise))?)
    }

    /// Writes a line of metrics to the run log and to burn-train; returns whether to stop early.
    fn log(&mut self, line: &Value, reporter: &mut BurnTrainReporter<B>) -> Result<bool> {
        Ok(self.run_log.write(line)? && reporter.report(line))
    }

    /// Computes the validation loss, if there are validation rows; returns it and whether to stop early.
    fn evaluate(
        &mut self,
        model: &Llama<Autodiff<B>>,
        step: usize,
        reporter: &mut BurnTrainReporter<B>,
    ) -> Result<Option<(f64, bool)>> {
        if self.valid.is_empty() {
            return Ok(None);
        }
        let steps = &self.recipe.train.steps;
        let padding_free = self.recipe.data.packing.is_padding_free();
        let batching = EvalBatching { batch_size: steps.batch_size, padding_free };
        // Every rank takes whole batches, in turn.
        let rows = self.valid.chunks(steps.batch_size).skip(self.engine.rank()).step_by(self.engine.world());
        let own: Vec<Example> = rows.flatten().cloned().collect();
        let elsewhere = &mut self.evaluator;
        let (sum, targets) = self.engine.with_full_params(model, |model| match elsewhere {
            Some(there) => there.loss(eval_device::trainable_values::<Autodiff<B>, _>(model), &own, batching),
            None => loss_sum(&model.valid(), &own, batching),
        })??;
        let sums = self.engine.sum_over_ranks(&[sum, targets as f64])?;
        let loss = sums[0] / sums[1];
        let line = json!({ "step": step, "valid_loss": loss, "elapsed_seconds": self.elapsed() });
        let stop = self.log(&line, reporter)?;
        let enough = self.any_rank(stop)?;
        self.run_log.print_line(&format!("step {step}: validation loss {loss:.4}"));
        Ok(Some((loss, enough)))
    }

    /// Writes the result into `directory`: `adapter/` or `model/`. Every rank calls this; rank 0 writes.
    fn save(&mut self, model: &Llama<Autodiff<B>>, directory: &Path) -> Result<()> {
        let (first, trained) = (self.engine.rank() == 0, &self.output);
        self.engine.with_full_params(model, |model| match trained {
            _ if !first => Ok(()),
            RunOutput::Adapter(adapter) => adapter.save(model, &directory.join("adapter")),
            RunOutput::Model(tokenizer) => {
                let directory = directory.join("model");
                checkpoint::save(model, &directory)?;
                Ok(tokenizer.save(&directory)?)
            }
        })?
    }

    /// Writes a checkpoint to resume from after `step`, and removes the oldest ones beyond `train.keep`.
    fn save_checkpoint(&mut self, model: &Llama<Autodiff<B>>, step: usize) -> Result<()> {
        let (seconds, metrics_bytes) = (self.elapsed(), self.run_log.metrics_bytes());
        let rows_per_step = self.batch_sampler.rows_per_step();
        let progress = TrainerState { step, rows_per_step, seconds, metrics_bytes, ..self.state.clone() };
        let path = self.directory.join(format!("checkpoint-{step}"));
        let first = self.engine.rank() == 0;
        let partial = if first { state::create_partial(&path) } else { Ok(state::partial_path(&path)) }?;
        // All ranks write into the folder once it exists; it is complete when all have written.
        self.engine.barrier()?;
        let written = self
            .save(model, &partial)
            .and_then(|()| Ok(self.engine.save(model, &partial.join(STATE_FILE))?))
            .and_then(|()| Ok(self.engine.barrier()?));
        if first {
            state::commit(&path, &progress, written)?;
            let all = state::checkpoints(&self.directory)?;
            let surplus = all.len().saturating_sub(self.recipe.train.eval_save.keep);
            return all[..surplus].iter().try_for_each(|old| state::remove(old));
        }
        written
    }

    fn finish(
        &mut self,
        model: &Llama<Autodiff<B>>,
        steps: usize,
        reporter: &mut BurnTrainReporter<B>,
    ) -> Result<Summary> {
        if let Some(trace) = &self.recipe.parallel.files.trace {
            // Written before the last evaluation, which is not part of training.
            self.engine.write_trace(Path::new(trace))?;
            if let Some(share) = self.engine.trace().overlap_fraction() {
                self.run_log.print_line(&format!(
                    "{trace}: {:.0} % of the time in collectives overlaps computation",
                    100.0 * share
                ));
            }
        }
        let after = self.evaluate(model, steps, reporter)?.map(|(loss, _)| loss);
        let directory = self.directory.clone();
        self.save(model, &directory)?;
        self.run_log.finish(0)?;
        let first = self.engine.rank() == 0;
        let (metrics, picture) = (directory.join("metrics.jsonl"), directory.join("training_loss.png"));
        if let Err(error) = if first { plot::training_loss(&metrics, &picture) } else { Ok(()) } {
            eprintln!("warning: the plot of the losses cannot be written: {error:#}");
        }
        let TrainerState { tokens, stepping, valid_loss_before, .. } = self.state;
        let summary = Summary {
            valid_loss_before,
            valid_loss_after: after,
            steps,
            seconds: self.elapsed(),
            seconds_to_first_step: self.seconds_to_first_step,
            tokens,
            tokens_per_second: tokens as f64 / stepping,
            peak_rss_bytes: peak_rss_bytes(),
            trainable_parameters: self.engine.with_full_params(model, param::count_trainable::<Autodiff<B>, _>)?,
        };
        if first {
            let text = serde_json::to_string_pretty(&summary)?;
            write::write_atomically(&directory.join("summary.json"), format!("{text}\n").as_bytes())?;
        }
        Ok(summary)
    }
}
