//! The file `summary.json`.

use super::record::BestEvaluation;
use serde::Serialize;

/// The results of a run: `summary.json`.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    /// The mean loss over the target tokens of the validation rows before the first step; none without such rows.
    pub valid_loss_before: Option<f64>,
    /// The same after the last step.
    pub valid_loss_after: Option<f64>,
    /// The evaluation whose weights are the result, with `train.keep_best`; else they are those of the last step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best: Option<BestEvaluation>,
    /// Optimizer steps.
    pub steps: usize,
    /// The time of the run.
    #[serde(flatten)]
    pub time: RunTime,
    /// Tokens trained on, those of prompts included.
    pub tokens: usize,
    /// Training throughput over the time spent in steps.
    pub tokens_per_second: f64,
    /// The peak resident memory of the process.
    pub peak_rss_bytes: u64,
    /// The number of trainable parameters.
    pub trainable_parameters: usize,
}

/// The time of a run.
#[derive(Debug, Serialize)]
pub(crate) struct RunTime {
    /// Seconds from the end of loading to the end of saving.
    pub seconds: f64,
    /// Seconds from the start of the process to the first step; none if no step was left to take.
    pub seconds_to_first_step: Option<f64>,
}
