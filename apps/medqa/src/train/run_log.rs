//! The log of a run on rank 0: the reporters that its recipe and its terminal ask for. The other ranks have none.

use super::{
    event::{Reporter, RunEvent},
    metrics_file::MetricsFile,
    options::TrainOptions,
    plot::LossPlot,
    progress::ProgressLine,
    record::MetricsRecord,
    state::TrainerState,
    tensorboard::TensorBoardWriter,
    wandb::{RunMetadata, WandbWriter},
};
use crate::{
    recipe::{Recipe, ReportTo},
    write,
};
use anyhow::{Context, Result};
use std::{fs, path::Path};

const PROJECT: &str = "medqa";

/// The log of a run.
pub(super) struct RunLog {
    metrics: MetricsFile,
    reporters: Vec<Box<dyn Reporter + Send>>,
}

/// The point from which a log continues; all zeros for a new run.
#[derive(Debug, Clone, Copy)]
struct ResumePoint {
    /// Steps taken.
    step: usize,
    /// The length of `metrics.jsonl`.
    metrics_bytes: u64,
}

impl RunLog {
    /// Opens the record of a run: its recipe, its inputs and its log. The summary of a finished run that goes on is
    /// removed.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub(super) fn begin(recipe: &Recipe, options: &TrainOptions, state: &TrainerState) -> Result<Self> {
        let directory = &options.directory;
        write::write_atomically(&directory.join("recipe.toml"), recipe.to_toml()?.as_bytes())?;
        let inputs = serde_json::to_string_pretty(&state.inputs)?;
        write::write_atomically(&directory.join("inputs.json"), format!("{inputs}\n").as_bytes())?;
        let summary = directory.join("summary.json");
        if summary.exists() {
            fs::remove_file(&summary).with_context(|| format!("{}: cannot be removed", summary.display()))?;
        }
        let resume = ResumePoint { step: state.step, metrics_bytes: state.metrics_bytes };
        Self::open(directory, recipe, resume, options.display)
    }

    /// Opens the files in the run directory, and the progress on the terminal unless burn-train's `display` is there.
    ///
    /// # Errors
    /// If a file cannot be written, or the earlier metrics cannot be read.
    fn open(directory: &Path, recipe: &Recipe, resume: ResumePoint, display: bool) -> Result<Self> {
        let metrics = MetricsFile::open(&directory.join("metrics.jsonl"), resume.metrics_bytes)?;
        let earlier = metrics.records()?;
        let mut reporters: Vec<Box<dyn Reporter + Send>> = Vec::new();
        if !display {
            reporters.push(Box::new(ProgressLine::new()?));
        }
        let wants = |report| recipe.train.eval_save.report_to.contains(&report);
        if wants(ReportTo::TensorBoard) {
            let resume_step = (!earlier.is_empty()).then_some(resume.step as u64);
            reporters.push(Box::new(TensorBoardWriter::create(&directory.join("tensorboard"), resume_step)?));
        }
        if wants(ReportTo::Wandb) {
            let config = serde_json::to_value(recipe)?;
            let config = config.as_object().context("a recipe is a table")?;
            let name = directory.file_name().unwrap_or_default().to_string_lossy();
            let about = RunMetadata { project: PROJECT, name: &name, config };
            reporters.push(Box::new(WandbWriter::create(&directory.join("wandb"), &about, &earlier)?));
        }
        reporters.push(Box::new(LossPlot::new(directory.join("training_loss.png"))));
        Ok(Self { metrics, reporters })
    }

    /// Reads the records written so far.
    ///
    /// # Errors
    /// If `metrics.jsonl` cannot be read.
    pub(super) fn records(&self) -> Result<Vec<MetricsRecord>> {
        self.metrics.records()
    }

    /// Returns the length of `metrics.jsonl`.
    pub(super) fn metrics_bytes(&self) -> u64 {
        self.metrics.bytes()
    }
}

impl Reporter for RunLog {
    fn report(&mut self, event: &RunEvent) -> Result<()> {
        self.metrics.report(event)?;
        self.reporters.iter_mut().try_for_each(|reporter| reporter.report(event))
    }
}
