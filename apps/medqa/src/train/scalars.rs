//! What a line of `metrics.jsonl` says, under the names that dashboards group by.

use anyhow::{Context, Result};
use serde_json::Value;

/// The key of a line, and its name in a dashboard.
pub const NAMES: [(&str, &str); 9] = [
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

/// The step of a line.
pub fn step(line: &Value) -> Result<u64> {
    line["step"].as_u64().with_context(|| format!("metrics: expected `step` to be a whole number, found {line}"))
}

/// What a line measures, by its name. JSON has no NaN and no infinity: `null` stands for them and comes back as NaN.
pub fn scalars(line: &Value) -> impl Iterator<Item = (&'static str, f64)> {
    NAMES.iter().filter_map(|&(key, name)| Some((name, line.get(key)?.as_f64().unwrap_or(f64::NAN))))
}
