//! The training loop.

mod saving;
mod validation;

use super::{
    adalora::{self, RankAllocation},
    best::BestWeights,
    early_stopping::EarlyStopping,
    eval_device,
    event::{Reporter, RunEnd, RunEvent, RunStart, TraceReport},
    inputs::RunInputs,
    memory::{self, RunSizes, peak_rss_bytes},
    method::{FittedModel, apply_method},
    model_loader::{LlamaEngine, ModelLoader},
    options::TrainOptions,
    pipeline::{self, MeanRow, RankPipeline},
    record::{LossScaling, MetricsRecord, NoteRecord, ProcessUsage, StepRecord, TokenCounts},
    resume::{Start, Started},
    run_log::RunLog,
    run_output::RunOutput,
    setup,
    state::{self, TrainerState},
    step_rows::{StepRows, TrainData},
    summary::{RunTime, Summary},
};
use crate::{
    model::LoadedModel,
    process,
    recipe::{ComputeDtype, Recipe},
    write,
};
use anyhow::{Context, Result, anyhow};
use burn::{backend::Autodiff, train::Interrupter};
use burn_llama::{Batch, Llama, SequenceLayout, kernel::Kernels};
use burn_peft::{DropoutKey, ForwardContext, adapter};
use burn_zero::{TrainStepOutput, comm::Communicator};
use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
    time::Instant,
};
use validation::ValidationData;

/// The trainer of one run.
pub(super) struct Trainer<B: Kernels> {
    recipe: Recipe,
    directory: PathBuf,
    engine: LlamaEngine<B>,
    output: RunOutput,
    data: TrainData,
    validation: ValidationData,
    /// Absent on other ranks than 0.
    run_log: Option<RunLog>,
    progress: RunProgress<B>,
}

/// The progress of a run.
struct RunProgress<B: Kernels> {
    state: TrainerState,
    /// The ranks allocated so far, with AdaLoRA.
    allocation: Option<RankAllocation<B>>,
    /// The start time in this process; the time before a resume is in `state`.
    start: Instant,
    /// Seconds from the start of the process to the first step of this run.
    seconds_to_first_step: Option<f64>,
    /// A note that is still to be written to the run's record.
    note: Option<String>,
}

impl<B: Kernels> RunProgress<B> {
    /// Returns the seconds since the run started, without the time between interruption and resume.
    fn elapsed_seconds(&self) -> f64 {
        self.state.time.seconds + self.start.elapsed().as_secs_f64()
    }
}

/// The outcome of a run.
pub(super) enum RunOutcome {
    /// Everything is written; the contents of `summary.json`.
    Complete(Summary),
    /// The user interrupted it, and there is a checkpoint after this step.
    Interrupted(usize),
}

impl<B: Kernels> Trainer<B> {
    /// Prepares a new or a resumed run.
    ///
    /// # Errors
    /// If the data, the adapter or a checkpoint cannot be read, the run directory cannot be written, or the run does
    /// not fit into memory.
    pub(super) fn new(
        recipe: Recipe,
        options: &TrainOptions,
        (loader, loaded): (ModelLoader<B>, LoadedModel<Autodiff<B>>),
        communicator: Box<dyn Communicator>,
    ) -> Result<Self> {
        adalora::check_world(&recipe, communicator.world_size())?;
        let setup::RunRows { train: sources, valid: rows } = setup::RunRows::load(&loaded, &recipe.data)?;
        let inputs = RunInputs::new(&loaded, &sources, &rows)?;
        let row = MeanRow::of(sources.iter().flatten());
        let replicas = pipeline::replicas(&recipe.parallel.pipeline, communicator.world_size())?;
        let data = TrainData::new(&recipe, sources, replicas)?;
        let (rows_per_step, total_steps) = (data.batch_sampler.rows_per_step(), data.batch_sampler.total_steps());
        let complete = setup::with_max_steps(&recipe, total_steps)?;
        let FittedModel { model, adapter, .. } = apply_method(loaded.model, &loaded.tokenizer, &complete)?;
        let validation = ValidationData {
            rows,
            evaluator: eval_device::open(&recipe)?,
            early_stopping: None,
            best: BestWeights::default(),
        };
        let pipeline = RankPipeline::new(&recipe, model.config(), row, communicator.as_ref())?;
        let config = setup::engine_config(&recipe, communicator)?;
        let start = Start {
            recipe: &recipe,
            loader: &loader,
            tokenizer: &loaded.tokenizer,
            pipeline: pipeline.as_ref(),
            options,
            inputs,
            rows_per_step,
            total_steps,
        };
        let Started { engine, allocation, state, note } = start.engine(model, config)?;
        let sizes = RunSizes {
            trained: trainable_parameters(&engine)? as u64,
            tokens: data.batch_sampler.max_micro_batch_tokens() as u64,
            stages: pipeline.map(|pipeline| pipeline.stages),
            ..RunSizes::lower_bound(engine.model().config(), &recipe, engine.replicas() as u64)
        };
        memory::check(&sizes, &recipe, &options.device)?;
        let directory = options.directory.clone();
        fs::create_dir_all(&directory).with_context(|| format!("{}: cannot be made", directory.display()))?;
        let run_log = if engine.rank() == 0 { Some(RunLog::begin(&recipe, options, &state)?) } else { None };
        let output = RunOutput::new(adapter, loaded.tokenizer);
        let progress = RunProgress { state, allocation, start: Instant::now(), seconds_to_first_step: None, note };
        Ok(Self { recipe, directory, engine, output, data, validation, run_log, progress })
    }

    /// Returns the model; in ZeRO stage 3 its weights are placeholders.
    pub(super) fn model(&self) -> &Llama<Autodiff<B>> {
        self.engine.model()
    }

    /// Takes the remaining steps and writes the result. Rank 0 reports every event to the run's log and to `display`.
    ///
    /// # Errors
    /// If a step fails, or a file cannot be written.
    pub(super) fn train(&mut self, display: &mut dyn Reporter, interrupter: &Interrupter) -> Result<RunOutcome> {
        let steps = self.data.batch_sampler.total_steps();
        self.start(display)?;
        if self.progress.state.step == 0 {
            self.progress.state.valid_loss_before = self.evaluate(0, display)?.map(|found| found.loss);
        }
        let mut taken = self.progress.state.step;
        while taken < steps {
            self.step(taken, display)?;
            taken += 1;
            if taken < steps && self.after_step(taken, display)? {
                break;
            }
            if taken < steps && self.any_rank(interrupter.should_stop())? {
                self.save_checkpoint(taken)?;
                self.report(&RunEvent::Finished(RunEnd::Interrupted), display)?;
                return Ok(RunOutcome::Interrupted(taken));
            }
        }
        self.finish(taken, display).map(RunOutcome::Complete)
    }

    /// Reports the start, with the records from before a resume, and continues early stopping after these.
    fn start(&mut self, display: &mut dyn Reporter) -> Result<()> {
        let Some(run_log) = &self.run_log else { return Ok(()) };
        let (earlier, total_steps) = (run_log.records()?, self.data.batch_sampler.total_steps());
        let settings = &self.recipe.train.eval_save;
        let losses = earlier.iter().filter_map(MetricsRecord::valid_loss_after_training);
        self.validation.early_stopping = settings.early_stopping.map(|patience| EarlyStopping::after(patience, losses));
        if settings.keep_best.is_some() {
            self.validation.best = BestWeights::after(&earlier, &self.directory)?;
        }
        let eval_every = settings.eval_every.unwrap_or(total_steps);
        self.report(&RunEvent::Started(RunStart { total_steps, eval_every, earlier: &earlier }), display)?;
        let Some(note) = self.progress.note.take() else { return Ok(()) };
        let (step, elapsed_seconds) = (self.progress.state.step, self.progress.elapsed_seconds());
        let record = MetricsRecord::Note(NoteRecord { step, note, elapsed_seconds });
        self.report(&RunEvent::Record(&record), display)
    }

    fn report(&mut self, event: &RunEvent, display: &mut dyn Reporter) -> Result<()> {
        let Some(run_log) = &mut self.run_log else { return Ok(()) };
        run_log.report(event)?;
        display.report(event)
    }

    /// Evaluates and saves a checkpoint if they are due after `step`; returns whether to stop early.
    fn after_step(&mut self, step: usize, display: &mut dyn Reporter) -> Result<bool> {
        let saving = &self.recipe.train.eval_save;
        let due = |every: Option<usize>| every.is_some_and(|every| step.is_multiple_of(every));
        let (evaluate, save) = (due(saving.eval_every), due(saving.save_every));
        let stop = evaluate && self.evaluate(step, display)?.is_some_and(|found| found.stop_early);
        if save {
            self.save_checkpoint(step)?;
        }
        Ok(stop)
    }

    /// Returns whether `value` is true on any rank, so that all ranks take the same branch.
    fn any_rank(&self, value: bool) -> Result<bool> {
        Ok(self.engine.sum_over_ranks(&[f64::from(value)])?[0] > 0.0)
    }

    /// Takes one step, counted from 0, and reports it.
    fn step(&mut self, step: usize, display: &mut dyn Reporter) -> Result<()> {
        self.progress.seconds_to_first_step.get_or_insert_with(|| process::uptime().as_secs_f64());
        let (begin, steps) = (Instant::now(), self.data.batch_sampler.total_steps());
        let rows = self.data.step(step);
        let (tokens, target_tokens, epoch) = (rows.tokens, rows.target_tokens, rows.batch.epoch);
        let micro_batches = rows.batch.micro_batches_of_rank(self.engine.replica(), self.engine.replicas());
        let learning_rate = setup::learning_rate(&self.recipe, step - self.progress.state.skipped, steps)?;
        let loss_scale = self.engine.loss_scale();
        let stepped = B::with_spinning_pool(|| self.run_micro_batches(&rows, micro_batches, learning_rate));
        let TrainStepOutput { loss, report } = stepped.or_else(|error| Err(self.name_cause(step, error)?))?;
        let (seconds, state) = (begin.elapsed().as_secs_f64(), &mut self.progress.state);
        state.skipped += usize::from(report.skipped);
        state.tokens += tokens;
        state.time.stepping += seconds;
        let is_f16 = self.recipe.model.compute == ComputeDtype::F16;
        let record = StepRecord {
            step: step + 1,
            epoch,
            loss,
            learning_rate,
            grad_norm: report.grad_norm,
            tokens: TokenCounts { tokens, target_tokens, tokens_per_second: tokens as f64 / seconds },
            usage: ProcessUsage { elapsed_seconds: self.progress.elapsed_seconds(), peak_rss_bytes: peak_rss_bytes() },
            loss_scaling: is_f16.then_some(LossScaling { loss_scale, skipped: report.skipped }),
        };
        self.report(&RunEvent::Record(&MetricsRecord::Step(record)), display)
    }

    /// Names the tensor of the model that is not finite as the cause of a failed step, if no step before it has changed
    /// the model. If updates overlap the backward pass, the failed step itself has.
    fn name_cause(&mut self, step: usize, error: anyhow::Error) -> Result<anyhow::Error> {
        let numeric = matches!(error.downcast_ref(), Some(burn_zero::Error::Numeric(_)));
        let clips = self.recipe.train.optimizer.max_grad_norm > 0.0;
        if !numeric || !clips || self.progress.state.skipped != step {
            return Ok(error);
        }
        let tensor = self.engine.with_full_params(adapter::find_not_finite::<Autodiff<B>, _>)?;
        Ok(tensor.map_or(error, |tensor| {
            anyhow!(
                "step {step}: gradient: expected finite numbers, found NaN or infinity: {tensor} holds them; use another \
                 file of it"
            )
        }))
    }

    /// Runs forward and backward passes over this rank's `micro_batches`, then the optimizer step; returns the loss of
    /// all ranks and the report of the step.
    fn run_micro_batches(
        &mut self,
        rows: &StepRows,
        micro_batches: impl Iterator<Item = Range<usize>>,
        learning_rate: f64,
    ) -> Result<TrainStepOutput> {
        let micro_batches = micro_batches.map(|micro| self.micro_batch(rows, micro)).collect::<Result<Vec<_>>>()?;
        let output = match &mut self.progress.allocation {
            Some(allocation) => {
                allocation.train_step(&mut self.engine, &micro_batches, rows.step + 1, learning_rate)?
            }
            None => self.engine.train_step(&micro_batches, learning_rate)?,
        };
        let loss = self.engine.sum_over_ranks(&[output.loss])?[0];
        Ok(TrainStepOutput { loss, ..output })
    }

    /// Builds the micro-batch of the rows in the range `micro`.
    fn micro_batch(&self, step: &StepRows, micro: Range<usize>) -> Result<Batch<Autodiff<B>>> {
        let (first, micro) = (micro.start, &step.rows[micro]);
        // A rank without rows computes one row with weight 0, because all ranks take part in every collective.
        let (micro, weight) =
            if micro.is_empty() { (&step.rows[..1], 0.0) } else { (micro, 1.0 / step.target_tokens as f32) };
        let lengths: Vec<usize> = micro.iter().map(|row| row.ids.len()).collect();
        let layout = SequenceLayout::from_lengths(&lengths, self.recipe.data.packing.is_padding_free());
        let noise = DropoutKey {
            seed: self.recipe.train.steps.seed,
            step: step.step as u64,
            tokens: layout.dropout_tokens(first as u64),
        };
        let weight = weight * self.engine.loss_scale() as f32;
        Ok(self.engine.model().batch(micro, &layout, weight, ForwardContext::training(noise))?)
    }

    /// Evaluates a last time and writes the result and the summary.
    fn finish(&mut self, steps: usize, display: &mut dyn Reporter) -> Result<Summary> {
        // Written before the last evaluation, which is not part of training.
        self.write_trace(display)?;
        let valid_loss_after = self.evaluate(steps, display)?.map(|found| found.loss);
        let directory = self.directory.clone();
        // Without a finite validation loss, no evaluation is the best one.
        let best = self.validation.best.evaluation();
        if self.any_rank(best.is_some())? {
            if self.engine.rank() == 0 {
                let resumable = !state::checkpoints(&directory)?.is_empty();
                self.validation.best.publish(&directory, self.output.folder_name(), resumable)?;
            }
        } else {
            self.save(&directory)?;
        }
        self.report(&RunEvent::Finished(RunEnd::Complete), display)?;
        let TrainerState { tokens, time, valid_loss_before, .. } = self.progress.state;
        let summary = Summary {
            valid_loss_before,
            valid_loss_after,
            best,
            steps,
            time: RunTime {
                seconds: self.progress.elapsed_seconds(),
                seconds_to_first_step: self.progress.seconds_to_first_step,
            },
            tokens,
            tokens_per_second: tokens as f64 / time.stepping,
            peak_rss_bytes: peak_rss_bytes(),
            trainable_parameters: trainable_parameters(&self.engine)?,
        };
        if self.engine.rank() == 0 {
            let text = serde_json::to_string_pretty(&summary)?;
            write::write_atomically(&directory.join("summary.json"), format!("{text}\n").as_bytes())?;
        }
        Ok(summary)
    }

    /// Writes the trace of the collectives, if the recipe asks for it, and reports how much of it overlaps computation.
    fn write_trace(&mut self, display: &mut dyn Reporter) -> Result<()> {
        let Some(path) = self.recipe.parallel.files.trace.clone() else { return Ok(()) };
        self.engine.write_trace(Path::new(&path))?;
        let Some(overlap_fraction) = self.engine.trace().overlap_fraction() else { return Ok(()) };
        self.report(&RunEvent::TraceWritten(TraceReport { path: &path, overlap_fraction }), display)
    }
}

/// Returns the number of trained values of the whole model, of which the ranks of a pipeline have different ones.
fn trainable_parameters<B: Kernels>(engine: &LlamaEngine<B>) -> Result<usize> {
    let sum = engine.sum_over_ranks(&[engine.trainable_parameters() as f64])?[0];
    Ok((sum / engine.replicas() as f64) as usize)
}
