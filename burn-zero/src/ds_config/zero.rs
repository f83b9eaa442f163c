//! What is divided among the ranks, and where it is kept.

use super::check::wrong;
use crate::Error;
use std::path::PathBuf;

/// What ZeRO divides among the ranks: DeepSpeed's stages 0 to 3, each with what the ones before it divide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(into = "u8", try_from = "u8")]
pub enum Stage {
    /// Nothing: every rank holds all (stage 0).
    #[default]
    Replicated,
    /// Optimizer states (stage 1).
    States,
    /// Gradients too (stage 2).
    Gradients,
    /// Weights too (stage 3).
    Weights,
}

impl From<Stage> for u8 {
    fn from(stage: Stage) -> u8 {
        stage as u8
    }
}

impl TryFrom<u8> for Stage {
    type Error = Error;

    fn try_from(number: u8) -> Result<Self, Error> {
        let stages = [Self::Replicated, Self::States, Self::Gradients, Self::Weights];
        let stage = stages.get(usize::from(number)).copied();
        stage.ok_or_else(|| wrong("zero_optimization.stage", "a whole number from 0 to 3", &number.to_string()))
    }
}

/// Where something is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// On the device that trains.
    #[default]
    None,
    /// In the host's memory.
    Cpu,
    /// In files.
    Nvme,
}

/// `offload_optimizer` or `offload_param`.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Offload {
    /// Where.
    pub device: Device,
    /// The folder of the files, with [`Device::Nvme`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvme_path: Option<PathBuf>,
}

/// `zero_optimization`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Zero {
    /// What is divided.
    pub stage: Stage,
    /// Where the optimizer's states are, and where it runs; stages 1 to 3.
    pub offload_optimizer: Offload,
    /// Where the weights are; stage 3.
    pub offload_param: Offload,
    /// The number of gradients that are reduced at a time.
    pub reduce_bucket_size: u64,
    /// The number of weights that are gathered at a time.
    pub allgather_bucket_size: u64,
    /// Whether gradients are reduced while the backward pass goes on; DeepSpeed's default is stage 3 only.
    pub overlap_comm: bool,
    /// Whether gradients are copied into one buffer as they are made.
    pub contiguous_gradients: bool,
    /// Stage 3's own settings.
    #[serde(flatten)]
    pub stage3: Stage3,
}

impl Default for Zero {
    fn default() -> Self {
        Self {
            stage: Stage::Replicated,
            offload_optimizer: Offload::default(),
            offload_param: Offload::default(),
            reduce_bucket_size: 500_000_000,
            allgather_bucket_size: 500_000_000,
            overlap_comm: false,
            contiguous_gradients: true,
            stage3: Stage3::default(),
        }
    }
}

/// Stage 3's own settings; all but the last are numbers of weights.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Stage3 {
    /// How many are updated at a time.
    pub sub_group_size: u64,
    /// How many may be gathered at a time.
    #[serde(rename = "stage3_max_live_parameters")]
    pub max_live_parameters: u64,
    /// Weights that are used again within this many stay gathered.
    #[serde(rename = "stage3_max_reuse_distance")]
    pub max_reuse_distance: u64,
    /// How many are gathered ahead of their use.
    #[serde(rename = "stage3_prefetch_bucket_size")]
    pub prefetch_bucket_size: u64,
    /// Smaller parameters are not divided.
    #[serde(rename = "stage3_param_persistence_threshold")]
    pub param_persistence_threshold: u64,
    /// How many may be left undivided in all.
    #[serde(rename = "stage3_model_persistence_threshold")]
    pub model_persistence_threshold: u64,
    /// Whether saving gathers the whole model in its 16 bit type.
    #[serde(rename = "stage3_gather_16bit_weights_on_model_save")]
    pub gather_16bit_weights_on_model_save: bool,
}

impl Default for Stage3 {
    fn default() -> Self {
        Self {
            sub_group_size: 1_000_000_000,
            max_live_parameters: 1_000_000_000,
            max_reuse_distance: 1_000_000_000,
            prefetch_bucket_size: 50_000_000,
            param_persistence_threshold: 100_000,
            // Python's sys.maxsize.
            model_persistence_threshold: i64::MAX as u64,
            gather_16bit_weights_on_model_save: false,
        }
    }
}

impl Zero {
    /// # Errors
    /// [`Error::Key`] for an offload that its stage does not have, or one to files without a folder.
    pub(super) fn checked(self) -> Result<Self, Error> {
        let offloads = [
            ("offload_optimizer", &self.offload_optimizer, Stage::States, "none, or stage 1, 2 or 3"),
            ("offload_param", &self.offload_param, Stage::Weights, "none, or stage 3"),
        ];
        for (block, offload, least, expected) in offloads {
            let path = |key| format!("zero_optimization.{block}.{key}");
            if offload.device != Device::None && self.stage < least {
                let found = format!("{:?} with stage {}", offload.device, u8::from(self.stage)).to_lowercase();
                return Err(wrong(&path("device"), expected, &found));
            }
            if offload.device == Device::Nvme && offload.nvme_path.is_none() {
                return Err(wrong(&path("nvme_path"), "a folder, because device is nvme", "nothing"));
            }
        }
        Ok(self)
    }
}
