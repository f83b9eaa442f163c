//! The table `[parallel]`: what is divided among ranks, and where optimizer states are.

use burn_zero::ds_config::{Stage, fsdp_stage};
use serde::{Deserialize, Deserializer, Serialize, de::Error};

/// `[parallel]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Parallel {
    /// What ZeRO divides among the ranks that `mpirun` starts: nothing (0), optimizer states (1), gradients too (2), weights too
    /// (3); or FSDP's `NO_SHARD`, `SHARD_GRAD_OP`, `FULL_SHARD`.
    #[serde(deserialize_with = "stage")]
    pub zero_stage: Stage,
    /// So many values are reduced or gathered at a time.
    pub bucket_size: usize,
    /// Where optimizer states are.
    pub offload_optimizer: Offload,
    /// The folder for them with `nvme`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvme_path: Option<String>,
}

/// Where optimizer states are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Offload {
    /// On the device that trains.
    #[default]
    None,
    /// In this machine's memory, updated by its processor.
    Cpu,
    /// In a file, updated through a few buffers.
    Nvme,
}

impl Default for Parallel {
    fn default() -> Self {
        Self { zero_stage: Stage::Replicated, bucket_size: 4 << 20, offload_optimizer: Offload::None, nvme_path: None }
    }
}

fn stage<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Stage, D::Error> {
    let expected = "0, 1, 2, 3, \"NO_SHARD\", \"SHARD_GRAD_OP\" or \"FULL_SHARD\"";
    match toml::Value::deserialize(deserializer)? {
        toml::Value::Integer(number) => u8::try_from(number).ok().and_then(|number| Stage::try_from(number).ok()),
        toml::Value::String(name) => fsdp_stage(&name).ok(),
        _ => None,
    }
    .ok_or_else(|| D::Error::custom(format!("expected {expected}")))
}
