//! The table `[parallel]`: pipelines, sharding, offload, and configuration files of other programs. One flat table in
//! the file, four small structs in the program.

use super::PipelineOptions;
use burn_zero::{OffloadDevice, ZeroStage, ds_config::fsdp_stage};
use serde::{Deserialize, Deserializer, Serialize, de::Error};

/// The table `[parallel]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ParallelConfig {
    /// The pipeline.
    #[serde(flatten)]
    pub pipeline: PipelineOptions,
    /// Sharding among ranks.
    #[serde(flatten)]
    pub sharding: ShardingConfig,
    /// Offload from the training device.
    #[serde(flatten)]
    pub offload: OffloadConfig,
    /// Configuration files of other programs, and the timeline that a run writes.
    #[serde(flatten)]
    pub files: ParallelFiles,
}

/// Sharding among ranks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ShardingConfig {
    /// The ZeRO stage, which tells what is sharded among the ranks that `mpirun` starts: nothing (0), optimizer states
    /// (1), gradients too (2), weights too (3); or FSDP's `NO_SHARD`, `SHARD_GRAD_OP`, `FULL_SHARD`.
    #[serde(deserialize_with = "deserialize_stage")]
    pub zero_stage: ZeroStage,
    /// The bucket size: the number of values that are reduced or gathered at a time.
    pub bucket_size: usize,
    /// True if communication and optimizer updates overlap the computation of the next segment. It changes no result.
    pub overlap: bool,
}

/// Offload from the training device.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OffloadConfig {
    /// The location of the optimizer states.
    pub offload_optimizer: OffloadDevice,
    /// The location of this rank's parameter shard, with stage 3.
    pub offload_param: OffloadDevice,
    /// The folder of the offload files, with `nvme`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvme_path: Option<String>,
}

/// Configuration files of other programs, and the timeline of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ParallelFiles {
    /// A ds_config.json, whose settings fill keys that this recipe leaves out. A recipe that was loaded has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deepspeed: Option<String>,
    /// The same for a YAML file of `accelerate config`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerate: Option<String>,
    /// A file for the timeline of all ranks, to be opened in Perfetto.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
}

impl Default for ShardingConfig {
    fn default() -> Self {
        Self { zero_stage: ZeroStage::Disabled, bucket_size: 4 << 20, overlap: true }
    }
}

fn deserialize_stage<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ZeroStage, D::Error> {
    let expected = "0, 1, 2, 3, \"NO_SHARD\", \"SHARD_GRAD_OP\" or \"FULL_SHARD\"";
    parse_stage(&toml::Value::deserialize(deserializer)?)
        .ok_or_else(|| D::Error::custom(format!("expected {expected}")))
}

/// Returns the stage that a value names.
pub(super) fn parse_stage(value: &toml::Value) -> Option<ZeroStage> {
    match value {
        toml::Value::Integer(number) => u8::try_from(*number).ok().and_then(|number| ZeroStage::try_from(number).ok()),
        toml::Value::String(name) => fsdp_stage(name).ok(),
        _ => None,
    }
}
