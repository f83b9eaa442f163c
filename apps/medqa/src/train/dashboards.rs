//! The run's lines for programs that draw them: TensorBoard and Weights & Biases, as far as the recipe asks.

use super::{
    tensorboard::TensorBoard,
    wandb::{self, Wandb},
};
use crate::recipe::{Recipe, ReportTo};
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::Path;

const PROJECT: &str = "medqa";

/// The files that are written besides `metrics.jsonl`.
pub struct Dashboards {
    tensorboard: Option<TensorBoard>,
    wandb: Option<Wandb>,
}

impl Dashboards {
    /// Begins, or goes on behind `lines` and the steps they tell of.
    pub fn open(directory: &Path, recipe: &Recipe, step: usize, lines: &[Value]) -> Result<Self> {
        let wants = |report| recipe.train.saving.report_to.contains(&report);
        let resumed = (!lines.is_empty()).then_some(step as u64);
        let tensorboard = wants(ReportTo::TensorBoard)
            .then(|| TensorBoard::create(&directory.join("tensorboard"), resumed))
            .transpose()?;
        let wandb = wants(ReportTo::Wandb).then(|| {
            let config = serde_json::to_value(recipe)?;
            let config = config.as_object().context("a recipe is a table")?;
            let name = directory.file_name().unwrap_or_default().to_string_lossy();
            Wandb::create(&directory.join("wandb"), &wandb::Run { project: PROJECT, name: &name, config }, lines)
        });
        Ok(Self { tensorboard, wandb: wandb.transpose()? })
    }

    pub fn write(&mut self, line: &Value) -> Result<()> {
        self.tensorboard.as_mut().map_or(Ok(()), |board| board.write(line))?;
        self.wandb.as_mut().map_or(Ok(()), |wandb| wandb.write(line))
    }

    /// Ends the run for those who ask how it ended: with 0, or with the code of the interruption.
    pub fn finish(&mut self, code: u8) -> Result<()> {
        let Some(wandb) = self.wandb.take() else { return Ok(()) };
        eprintln!("to upload the run: wandb sync {}", wandb.folder().display());
        wandb.finish(code)
    }
}
