//! The records of a run, one per step and per evaluation: the lines of `metrics.jsonl`.

use anyhow::{Context, Result};
use serde::{Deserialize, Deserializer, Serialize};

/// An evaluation, as `summary.json` has it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct BestEvaluation {
    /// Steps before the evaluation.
    pub step: usize,
    pub valid_loss: f64,
}

/// The names of all scalars, by which dashboards group them.
pub(super) const SCALAR_NAMES: [&str; 9] = [
    "train/loss",
    "train/learning_rate",
    "train/grad_norm",
    "train/epoch",
    "train/tokens",
    "train/target_tokens",
    "train/tokens_per_second",
    "valid/loss",
    "system/peak_rss_bytes",
];

/// A scalar with its name among [`SCALAR_NAMES`].
pub(super) type Scalar = (&'static str, f64);

/// The record of an optimizer step. JSON has no NaN and no infinity: they are written as `null`, which is read as NaN.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct StepRecord {
    /// The number of the step, counted from 1.
    pub step: usize,
    /// Passes over the data at the end of the step.
    pub epoch: f64,
    /// Mean loss per target token over all ranks, in nats.
    #[serde(deserialize_with = "nan_from_null")]
    pub loss: f64,
    /// The learning rate of the step.
    #[serde(deserialize_with = "nan_from_null")]
    pub learning_rate: f64,
    /// The global L2 norm of the gradient, before clipping.
    #[serde(deserialize_with = "nan_from_null")]
    pub grad_norm: f64,
    /// The tokens of the step.
    #[serde(flatten)]
    pub tokens: TokenCounts,
    /// The time and memory of the process.
    #[serde(flatten)]
    pub usage: ProcessUsage,
    /// The scaling of the loss, if the model computes in f16.
    #[serde(flatten)]
    pub loss_scaling: Option<LossScaling>,
}

/// The tokens of a step, over all ranks.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct TokenCounts {
    /// Input tokens, without padding.
    pub tokens: usize,
    /// Target tokens among these.
    pub target_tokens: usize,
    /// Input tokens per second.
    #[serde(deserialize_with = "nan_from_null")]
    pub tokens_per_second: f64,
}

/// The time and memory of the process at the end of a step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct ProcessUsage {
    /// Seconds since the run started, without the time between interruption and resume.
    pub elapsed_seconds: f64,
    /// The peak resident memory of rank 0, in bytes.
    pub peak_rss_bytes: u64,
}

/// The scaling of the loss in a step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct LossScaling {
    /// The factor by which the loss was scaled.
    pub loss_scale: f64,
    /// True if nothing was updated because the gradients overflowed.
    pub skipped: bool,
}

/// The record of an evaluation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct EvalRecord {
    /// Steps taken before the evaluation.
    pub step: usize,
    /// Mean loss per target token of the validation rows, in nats.
    #[serde(deserialize_with = "nan_from_null")]
    pub valid_loss: f64,
    /// Seconds since the run started, without the time between interruption and resume.
    pub elapsed_seconds: f64,
}

/// A note about the run, such as that its data has changed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct NoteRecord {
    /// Steps taken before it.
    pub step: usize,
    /// The note, in one line.
    pub note: String,
    /// Seconds since the run started, without the time between interruption and resume.
    pub elapsed_seconds: f64,
}

/// A line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum MetricsRecord {
    Step(StepRecord),
    Eval(EvalRecord),
    Note(NoteRecord),
}

impl StepRecord {
    fn scalars(&self) -> Vec<Scalar> {
        let TokenCounts { tokens, target_tokens, tokens_per_second } = self.tokens;
        vec![
            ("train/loss", self.loss),
            ("train/learning_rate", self.learning_rate),
            ("train/grad_norm", self.grad_norm),
            ("train/epoch", self.epoch),
            ("train/tokens", tokens as f64),
            ("train/target_tokens", target_tokens as f64),
            ("train/tokens_per_second", tokens_per_second),
            ("system/peak_rss_bytes", self.usage.peak_rss_bytes as f64),
        ]
    }
}

impl MetricsRecord {
    /// Parses a line of `metrics.jsonl`.
    ///
    /// # Errors
    /// If the line is not the record of a step or of an evaluation, or a note.
    pub(super) fn parse(line: &str) -> Result<Self> {
        serde_json::from_str(line)
            .with_context(|| format!("expected the record of a step or of an evaluation, found {line}"))
    }

    /// Returns the number of the step, or the steps before the evaluation.
    pub(super) fn step(&self) -> usize {
        match self {
            Self::Step(record) => record.step,
            Self::Eval(record) => record.step,
            Self::Note(record) => record.step,
        }
    }

    /// Returns the seconds since the run started.
    pub(super) fn elapsed_seconds(&self) -> f64 {
        match self {
            Self::Step(record) => record.usage.elapsed_seconds,
            Self::Eval(record) => record.elapsed_seconds,
            Self::Note(record) => record.elapsed_seconds,
        }
    }

    /// Returns the validation loss of an evaluation after the first step or later.
    pub(super) fn valid_loss_after_training(&self) -> Option<f64> {
        match self {
            Self::Eval(record) if record.step > 0 => Some(record.valid_loss),
            _ => None,
        }
    }

    /// Returns an evaluation after the first step or later.
    pub(super) fn evaluation_after_training(&self) -> Option<BestEvaluation> {
        match self {
            Self::Eval(record) if record.step > 0 => {
                Some(BestEvaluation { step: record.step, valid_loss: record.valid_loss })
            }
            _ => None,
        }
    }

    /// Returns the scalars for dashboards, in the order of [`SCALAR_NAMES`]. A value that is not finite is NaN.
    pub(super) fn scalars(&self) -> Vec<Scalar> {
        let mut scalars = match self {
            Self::Step(record) => record.scalars(),
            Self::Eval(record) => vec![("valid/loss", record.valid_loss)],
            Self::Note(_) => Vec::new(),
        };
        for (_, value) in &mut scalars {
            if !value.is_finite() {
                *value = f64::NAN;
            }
        }
        scalars
    }
}

fn nan_from_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: &str = r#"{"step":3,"epoch":0.5,"loss":2.5,"learning_rate":0.0001,"grad_norm":1.25,"tokens":64,"target_tokens":32,"tokens_per_second":128.0,"elapsed_seconds":1.5,"peak_rss_bytes":4096}"#;
    const STEP_F16: &str = r#"{"step":3,"epoch":0.5,"loss":2.5,"learning_rate":0.0001,"grad_norm":1.25,"tokens":64,"target_tokens":32,"tokens_per_second":128.0,"elapsed_seconds":1.5,"peak_rss_bytes":4096,"loss_scale":256.0,"skipped":true}"#;
    const EVAL: &str = r#"{"step":3,"valid_loss":2.25,"elapsed_seconds":1.5}"#;
    const NOTE: &str = r#"{"step":3,"note":"other rows","elapsed_seconds":1.5}"#;

    #[test]
    fn lines_are_read_and_written_alike() {
        for line in [STEP, STEP_F16, EVAL, NOTE] {
            let record = MetricsRecord::parse(line).unwrap();
            assert_eq!((record.step(), record.elapsed_seconds()), (3, 1.5));
            assert_eq!(serde_json::to_string(&record).unwrap(), line);
        }
        let MetricsRecord::Step(step) = MetricsRecord::parse(STEP_F16).unwrap() else { panic!("a step") };
        assert_eq!(step.loss_scaling, Some(LossScaling { loss_scale: 256.0, skipped: true }));
    }

    #[test]
    fn values_that_are_not_finite_are_null_and_nan() {
        let usage = ProcessUsage { elapsed_seconds: 1.5, peak_rss_bytes: 4096 };
        let step = StepRecord { loss: f64::NAN, grad_norm: f64::INFINITY, usage, ..StepRecord::default() };
        let record = MetricsRecord::Step(step);
        let line = serde_json::to_string(&record).unwrap();
        assert!(line.contains(r#""loss":null"#) && line.contains(r#""grad_norm":null"#), "{line}");
        for record in [record, MetricsRecord::parse(&line).unwrap()] {
            let scalars = record.scalars();
            let nan: Vec<_> = scalars.iter().filter(|(_, value)| value.is_nan()).map(|&(name, _)| name).collect();
            assert_eq!(nan, ["train/loss", "train/grad_norm"]);
        }
    }

    #[test]
    fn scalars_have_their_names_in_order() {
        let names = |line| MetricsRecord::parse(line).unwrap().scalars().into_iter().map(|(name, _)| name);
        let (step, eval): (Vec<_>, Vec<_>) = (names(STEP_F16).collect(), names(EVAL).collect());
        assert_eq!(eval, ["valid/loss"]);
        let expected: Vec<_> = SCALAR_NAMES.into_iter().filter(|name| *name != "valid/loss").collect();
        assert_eq!(step, expected);
    }

    #[test]
    fn other_lines_are_refused() {
        for line in
            [r#"{"loss":1.0}"#, r#"{"step":"one","valid_loss":1.0,"elapsed_seconds":0.0}"#, "{\"step\": 2, \"lo"]
        {
            let error = MetricsRecord::parse(line).unwrap_err().to_string();
            assert_eq!(error, format!("expected the record of a step or of an evaluation, found {line}"));
        }
    }
}
