//! The weights of the best evaluation of a run, for `train.keep_best`.

use super::{
    record::{BestEvaluation, MetricsRecord},
    state,
};
use crate::write;
use anyhow::{Context, Result, bail};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The best evaluation so far. Its weights are in the folder `best-STEP` of the run directory. The folders of those that
/// were the best ones at a checkpoint stay too, because a resumed run goes on from there.
#[derive(Debug, Default)]
pub(super) struct BestWeights {
    best: Option<BestEvaluation>,
}

impl BestWeights {
    /// Returns the best evaluation of a run with these records, and removes the folders that no checkpoint needs.
    ///
    /// # Errors
    /// If the folder of the best one is gone, or another one cannot be removed.
    pub(super) fn after(records: &[MetricsRecord], directory: &Path) -> Result<Self> {
        let kept = Self { best: lowest(records, usize::MAX) };
        kept.remove_others(records, directory)?;
        if let Some(folder) = kept.best.map(|best| folder(directory, best.step)).filter(|folder| !folder.is_dir()) {
            bail!("{}: expected the weights of the best evaluation so far, found no such directory", folder.display());
        }
        Ok(kept)
    }

    /// Returns whether a loss is lower than all before.
    pub(super) fn is_better(&self, valid_loss: f64) -> bool {
        valid_loss.is_finite() && self.best.is_none_or(|best| valid_loss < best.valid_loss)
    }

    /// Takes an evaluation whose weights are saved.
    pub(super) fn set(&mut self, best: BestEvaluation) {
        self.best = Some(best);
    }

    /// Returns the best evaluation.
    pub(super) fn evaluation(&self) -> Option<BestEvaluation> {
        self.best
    }

    /// Removes the folders of all evaluations but those that were the best ones at a checkpoint or are it now.
    ///
    /// # Errors
    /// If a folder cannot be removed.
    pub(super) fn remove_others(&self, records: &[MetricsRecord], directory: &Path) -> Result<()> {
        let steps = state::checkpoints(directory)?;
        let steps = steps.iter().filter_map(|path| path.file_name()?.to_str()?.rsplit('-').next()?.parse().ok());
        let kept: Vec<usize> =
            steps.filter_map(|step| lowest(records, step)).chain(self.best).map(|best| best.step).collect();
        let context = || format!("{}: cannot be read", directory.display());
        for entry in fs::read_dir(directory).with_context(context)? {
            let path = entry.with_context(context)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let Some(step) = name.strip_prefix("best-") else { continue };
            if !step.parse().is_ok_and(|step| kept.contains(&step)) {
                fs::remove_dir_all(&path).with_context(|| format!("{}: cannot be removed", path.display()))?;
            }
        }
        Ok(())
    }

    /// Makes the weights of the best evaluation the result of the run, its folder `name`. If a checkpoint is there to go
    /// on from, the folders of evaluations stay for it.
    ///
    /// # Errors
    /// If the weights cannot be moved or copied.
    pub(super) fn publish(&self, directory: &Path, name: &str, resumable: bool) -> Result<()> {
        let Some(best) = self.best else { return Ok(()) };
        let (from, result) = (folder(directory, best.step).join(name), directory.join(name));
        if result.exists() {
            fs::remove_dir_all(&result).with_context(|| format!("{}: cannot be replaced", result.display()))?;
        }
        if !resumable {
            fs::rename(&from, &result).with_context(|| format!("{}: cannot be moved", from.display()))?;
            return Self::default().remove_others(&[], directory);
        }
        write::write_dir_atomically(&result, |partial| {
            for entry in fs::read_dir(&from).with_context(|| format!("{}: cannot be read", from.display()))? {
                let entry = entry?;
                fs::copy(entry.path(), partial.join(entry.file_name()))
                    .with_context(|| format!("{}: cannot be copied", entry.path().display()))?;
            }
            Ok(())
        })
    }
}

/// Returns the evaluation with the lowest loss among those after at most `until` steps, the first one of equal ones.
fn lowest(records: &[MetricsRecord], until: usize) -> Option<BestEvaluation> {
    let all = records.iter().filter_map(MetricsRecord::evaluation_after_training);
    let finite = all.filter(|found| found.step <= until && found.valid_loss.is_finite());
    finite.reduce(|best, found| if found.valid_loss < best.valid_loss { found } else { best })
}

/// Returns the folder with the weights after `step` steps.
pub(super) fn folder(directory: &Path, step: usize) -> PathBuf {
    directory.join(format!("best-{step}"))
}
