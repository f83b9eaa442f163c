//! The files that a run saves: the result, checkpoints, and the weights of the best evaluation.

use super::Trainer;
use crate::train::{
    best, consolidate,
    record::BestEvaluation,
    run_log::RunLog,
    state::{self, STATE_FILE, TimeTaken, TrainerState},
};
use anyhow::{Context, Result, bail};
use burn::{backend::Autodiff, module::Module};
use burn_llama::kernel::Kernels;
use burn_peft::adapter;
use std::{fs, path::Path};

impl<B: Kernels> Trainer<B> {
    /// Saves the weights of an evaluation that is better than all before, if the recipe asks for it.
    pub(super) fn keep_best(&mut self, evaluation: BestEvaluation) -> Result<()> {
        let BestEvaluation { step, valid_loss } = evaluation;
        if self.recipe.train.eval_save.keep_best.is_none() || step == 0 {
            return Ok(());
        }
        let better = self.engine.rank() == 0 && self.validation.best.is_better(valid_loss);
        if !self.any_rank(better)? {
            return Ok(());
        }
        self.save(&best::folder(&self.directory, step))?;
        self.validation.best.set(evaluation);
        Ok(())
    }

    /// Returns true if no rank has the whole model.
    fn is_pipeline(&self) -> bool {
        self.engine.world() > self.engine.replicas()
    }

    /// Writes the result into `directory`: `adapter/` or `model/`. Every rank calls this; rank 0 writes. In a pipeline it
    /// reads what the other ranks have trained from their files.
    ///
    /// # Errors
    /// If a trained weight is not finite, or a file cannot be written.
    pub(super) fn save(&self, directory: &Path) -> Result<()> {
        if !self.is_pipeline() {
            return self.write_result(directory);
        }
        self.check_trained()?;
        let (first, parts) = (self.engine.rank() == 0, directory.join("result"));
        let parts = if first { state::create_partial(&parts) } else { Ok(state::partial_path(&parts)) }?;
        self.engine.barrier()?;
        self.save_parts(&parts)?;
        if first {
            let device = self.engine.model().devices().into_iter().next().unwrap_or_default();
            let folder = directory.join(self.output.folder_name());
            let written = consolidate::write::<B>(&self.recipe, &parts.join(STATE_FILE), &folder, &device);
            written.with_context(|| format!("{}: the trained values are kept there", parts.display()))?;
            fs::remove_dir_all(&parts).with_context(|| parts.display().to_string())?;
        }
        Ok(())
    }

    /// Writes `adapter/` or `model/` from the engine's weights, all of which a rank has or gathers.
    fn write_result(&self, directory: &Path) -> Result<()> {
        self.check_trained()?;
        let (first, output) = (self.engine.rank() == 0, &self.output);
        let folder = directory.join(output.folder_name());
        self.engine.with_full_params(|model| if first { output.save(model, &folder) } else { Ok(()) })?
    }

    /// Refuses weights that are not finite.
    fn check_trained(&self) -> Result<()> {
        self.engine.with_full_params(|model| match adapter::find_trained_not_finite::<Autodiff<B>, _>(model) {
            Some(tensor) => bail!(
                "{tensor} holds NaN or infinity after the last step, so nothing is saved; lower `train.learning_rate`"
            ),
            None => Ok(()),
        })?
    }

    /// Writes the trained parameters and optimizer states of all ranks into a folder, which all can see.
    fn save_parts(&self, folder: &Path) -> Result<()> {
        self.engine.save(&folder.join(STATE_FILE))?;
        Ok(self.engine.barrier()?)
    }

    /// Writes a checkpoint to resume from after `step`, and removes the oldest ones beyond `train.keep`.
    pub(super) fn save_checkpoint(&mut self, step: usize) -> Result<()> {
        let state = TrainerState {
            step,
            rows_per_step: self.data.batch_sampler.rows_per_step(),
            time: TimeTaken { seconds: self.progress.elapsed_seconds(), ..self.progress.state.time },
            metrics_bytes: self.run_log.as_ref().map_or(0, RunLog::metrics_bytes),
            ..self.progress.state.clone()
        };
        let path = self.directory.join(format!("checkpoint-{step}"));
        let first = self.engine.rank() == 0;
        let partial = if first { state::create_partial(&path) } else { Ok(state::partial_path(&path)) }?;
        // All ranks write into the folder once it exists; it is complete when all have written.
        self.engine.barrier()?;
        let whole = if self.is_pipeline() { Ok(()) } else { self.write_result(&partial) };
        let allocation = || self.progress.allocation.as_ref().map_or(Ok(()), |it| it.save(&self.engine, &partial));
        let written = whole.and_then(|()| allocation()).and_then(|()| self.save_parts(&partial));
        if first {
            state::commit(&path, &state, written)?;
            let all = state::checkpoints(&self.directory)?;
            let surplus = all.len().saturating_sub(self.recipe.train.eval_save.keep);
            all[..surplus].iter().try_for_each(|old| state::remove(old))?;
            let records = self.run_log.as_ref().map(RunLog::records).transpose()?.unwrap_or_default();
            return self.validation.best.remove_others(&records, &self.directory);
        }
        written
    }
}
