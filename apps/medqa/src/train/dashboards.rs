//! The writers for dashboards, TensorBoard and Weights & Biases, as chosen by `train.report_to`.

use super::{
    tensorboard::TensorBoardWriter,
    wandb::{self, WandbWriter},
};
use crate::recipe::{Recipe, ReportTo};
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::Path;

const PROJECT: &str = "medqa";

/// The writers for dashboards, besides `metrics.jsonl`.
pub struct Dashboards {
    tensorboard: Option<TensorBoardWriter>,
    wandb: Option<WandbWriter>,
}

impl Dashboards {
    /// Creates the writers, or continues after `step` with the earlier `lines` of metrics.
    pub fn open(directory: &Path, recipe: &Recipe, step: usize, lines: &[Value]) -> Result<Self> {
        let wants = |report| recipe.train.eval_save.report_to.contains(&report);
        let resumed = (!lines.is_empty()).then_some(step as u64);
        let tensorboard = wants(ReportTo::TensorBoard)
            .then(|| TensorBoardWriter::create(&directory.join("tensorboard"), resumed))
            .transpose()?;
        let wandb = wants(ReportTo::Wandb).then(|| {
            let config = serde_json::to_value(recipe)?;
            let config = config.as_object().context("a recipe is a table")?;
            let name = directory.file_name().unwrap_or_default().to_string_lossy();
            WandbWriter::create(
                &directory.join("wandb"),
                &wandb::RunMetadata { project: PROJECT, name: &name, config },
                lines,
            )
        });
        Ok(Self { tensorboard, wandb: wandb.transpose()? })
    }

    pub fn write(&mut self, line: &Value) -> Result<()> {
        self.tensorboard.as_mut().map_or(Ok(()), |board| board.write(line))?;
        self.wandb.as_mut().map_or(Ok(()), |wandb| wandb.write(line))
    }

    /// Closes the writers with exit code 0, or with that of an interruption.
    pub fn finish(&mut self, code: u8) -> Result<()> {
        let Some(wandb) = self.wandb.take() else { return Ok(()) };
        eprintln!("to upload the run: wandb sync {}", wandb.folder().display());
        wandb.finish(code)
    }
}
