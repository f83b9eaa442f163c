//! The table `[parallel]`: what is divided among ranks, where it is, and whose files say so. One flat table in the file, three
//! small structs in the program.

use burn_zero::ds_config::{Stage, fsdp_stage};
use serde::{Deserialize, Deserializer, Serialize, de::Error};

/// `[parallel]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Parallel {
    /// What is divided.
    #[serde(flatten)]
    pub division: Division,
    /// What is not on the device that trains.
    #[serde(flatten)]
    pub offload: Offload,
    /// Files that say what this table does, and one that a run writes.
    #[serde(flatten)]
    pub files: Files,
}

/// What is divided among ranks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Division {
    /// What ZeRO divides among the ranks that `mpirun` starts: nothing (0), optimizer states (1), gradients too (2), weights too
    /// (3); or FSDP's `NO_SHARD`, `SHARD_GRAD_OP`, `FULL_SHARD`.
    #[serde(deserialize_with = "stage")]
    pub zero_stage: Stage,
    /// So many values are reduced or gathered at a time.
    pub bucket_size: usize,
    /// Whether communication and updates go on while the next segment computes. It changes no result.
    pub overlap: bool,
}

/// What is not on the device that trains.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Offload {
    /// Where optimizer states are.
    pub offload_optimizer: Place,
    /// Where this rank's part of the weights is, with stage 3.
    pub offload_param: Place,
    /// The folder for what is in files, with `nvme`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvme_path: Option<String>,
}

/// Other programs' files, and the timeline.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Files {
    /// A ds_config.json: what it says is put where this recipe says nothing. A recipe that was loaded has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deepspeed: Option<String>,
    /// The same for a YAML file of `accelerate config`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerate: Option<String>,
    /// A file for the timeline of all ranks, to be opened in Perfetto.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
}

/// Where something is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// On the device that trains.
    #[default]
    None,
    /// In this machine's memory; optimizer states are updated by its processor.
    Cpu,
    /// In a file, through a few buffers.
    Nvme,
}

impl Default for Division {
    fn default() -> Self {
        Self { zero_stage: Stage::Replicated, bucket_size: 4 << 20, overlap: true }
    }
}

fn stage<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Stage, D::Error> {
    let expected = "0, 1, 2, 3, \"NO_SHARD\", \"SHARD_GRAD_OP\" or \"FULL_SHARD\"";
    stage_of(&toml::Value::deserialize(deserializer)?).ok_or_else(|| D::Error::custom(format!("expected {expected}")))
}

/// The stage that a value names.
pub fn stage_of(value: &toml::Value) -> Option<Stage> {
    match value {
        toml::Value::Integer(number) => u8::try_from(*number).ok().and_then(|number| Stage::try_from(number).ok()),
        toml::Value::String(name) => fsdp_stage(name).ok(),
        _ => None,
    }
}
