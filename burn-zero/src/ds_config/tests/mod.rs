//! Tests of reading configurations.

mod accelerate;
mod blocks;
mod hjson;
mod keys;
mod resolve;

use super::*;
use crate::{ConfigError, OffloadDevice, ZeroStage};

/// Resolves a JSON text for two ranks, with the default values for `"auto"`.
fn resolve(text: &str) -> Result<DsConfig, ConfigError> {
    RawDsConfig::from_hjson(text)?.resolve(2, &AutoValues::default())
}

/// Resolves a text without batch sizes, with a micro-batch of 1.
fn with_batch(text: &str) -> Result<DsConfig, ConfigError> {
    let text = text.trim().strip_prefix('{').unwrap();
    let comma = if text.trim_start().starts_with('}') { "" } else { "," };
    resolve(&format!("{{\"train_micro_batch_size_per_gpu\": 1{comma} {text}"))
}

fn message<T: std::fmt::Debug, E: std::error::Error>(result: Result<T, E>) -> String {
    result.unwrap_err().to_string()
}

fn keys(config: &DsConfig) -> Vec<&str> {
    config.unhonoured.iter().map(|it| it.key.as_str()).collect()
}
