//! The scalars in a line of `metrics.jsonl`, under the names that dashboards group by.

use anyhow::{Context, Result};
use serde_json::Value;

/// The keys of a line, each with its name in a dashboard.
pub const SCALAR_NAMES: [(&str, &str); 9] = [
    ("loss", "train/loss"),
    ("learning_rate", "train/learning_rate"),
    ("grad_norm", "train/grad_norm"),
    ("epoch", "train/epoch"),
    ("tokens", "train/tokens"),
    ("target_tokens", "train/target_tokens"),
    ("tokens_per_second", "train/tokens_per_second"),
    ("valid_loss", "valid/loss"),
    ("peak_rss_bytes", "system/peak_rss_bytes"),
];

/// Returns the step of a line.
pub fn step(line: &Value) -> Result<u64> {
    line["step"].as_u64().with_context(|| format!("metrics: expected `step` to be a whole number, found {line}"))
}

/// Returns the scalars of a line with their names. JSON has no NaN and no infinity: they are written as `null`, which
/// is read as NaN.
pub fn scalars(line: &Value) -> impl Iterator<Item = (&'static str, f64)> {
    SCALAR_NAMES.iter().filter_map(|&(key, name)| Some((name, line.get(key)?.as_f64().unwrap_or(f64::NAN))))
}
