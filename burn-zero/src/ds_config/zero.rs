//! The `zero_optimization` block: what is sharded among the ranks and what is offloaded.

use crate::{ConfigError, MemoryTier, OffloadDevice, Sharding, ZeroStage};
use std::path::PathBuf;

/// The `offload_optimizer` or the `offload_param` block.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct OffloadConfig {
    /// The device.
    pub device: OffloadDevice,
    /// The folder of the files, for [`OffloadDevice::Nvme`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvme_path: Option<PathBuf>,
}

impl From<&OffloadConfig> for MemoryTier {
    fn from(offload: &OffloadConfig) -> Self {
        offload.device.tier(offload.nvme_path.as_deref())
    }
}

/// The `zero_optimization` block.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct ZeroConfig {
    /// The ZeRO stage.
    pub stage: ZeroStage,
    /// The offload of optimizer states and the optimizer step; stages 1 to 3.
    pub offload_optimizer: OffloadConfig,
    /// The offload of the weights; stage 3.
    pub offload_param: OffloadConfig,
    /// The number of gradients in a bucket, which is reduced at once.
    pub reduce_bucket_size: u64,
    /// The number of weights that are gathered at once.
    pub allgather_bucket_size: u64,
    /// True if gradients are reduced while the backward pass goes on; DeepSpeed's default is true for stage 3 only.
    pub overlap_comm: bool,
    /// True if gradients are copied into a contiguous buffer as they are produced.
    pub contiguous_gradients: bool,
    /// The settings of stage 3.
    #[serde(flatten)]
    pub(super) stage3: ZeroStage3Config,
}

impl Default for ZeroConfig {
    fn default() -> Self {
        Self {
            stage: ZeroStage::Disabled,
            offload_optimizer: OffloadConfig::default(),
            offload_param: OffloadConfig::default(),
            reduce_bucket_size: 500_000_000,
            allgather_bucket_size: 500_000_000,
            overlap_comm: false,
            contiguous_gradients: true,
            stage3: ZeroStage3Config::default(),
        }
    }
}

impl From<&ZeroConfig> for Sharding {
    fn from(zero: &ZeroConfig) -> Self {
        let bucket_size = usize::try_from(zero.reduce_bucket_size).unwrap_or(usize::MAX);
        Self { stage: zero.stage, bucket_size }
    }
}

/// The settings of stage 3; all but the last are numbers of weights.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub(super) struct ZeroStage3Config {
    /// The number of weights that are updated at a time.
    pub(super) sub_group_size: u64,
    /// The largest number of gathered weights.
    #[serde(rename = "stage3_max_live_parameters")]
    pub(super) max_live_parameters: u64,
    /// The reuse distance, in weights, below which gathered weights are not released.
    #[serde(rename = "stage3_max_reuse_distance")]
    pub(super) max_reuse_distance: u64,
    /// The number of weights that are gathered before their use.
    #[serde(rename = "stage3_prefetch_bucket_size")]
    pub(super) prefetch_bucket_size: u64,
    /// The size below which a parameter is not sharded.
    #[serde(rename = "stage3_param_persistence_threshold")]
    pub(super) param_persistence_threshold: u64,
    /// The largest total number of weights that are not sharded.
    #[serde(rename = "stage3_model_persistence_threshold")]
    pub(super) model_persistence_threshold: u64,
    /// True if saving gathers the whole model in its 16-bit data type.
    #[serde(rename = "stage3_gather_16bit_weights_on_model_save")]
    pub(super) gather_16bit_weights_on_model_save: bool,
}

impl Default for ZeroStage3Config {
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

impl ZeroConfig {
    /// Returns the settings if they are valid.
    ///
    /// # Errors
    /// [`ConfigError::InvalidValue`] for an offload that the stage does not support, or an offload to files without a
    /// folder.
    pub(super) fn validated(self) -> Result<Self, ConfigError> {
        let offloads = [
            ("offload_optimizer", &self.offload_optimizer, ZeroStage::OptimizerStates, "none, or stage 1, 2 or 3"),
            ("offload_param", &self.offload_param, ZeroStage::Weights, "none, or stage 3"),
        ];
        for (block, offload, least, expected) in offloads {
            let path = |key| format!("zero_optimization.{block}.{key}");
            if offload.device != OffloadDevice::None && self.stage < least {
                let found = format!("{:?} with stage {}", offload.device, u8::from(self.stage)).to_lowercase();
                return Err(ConfigError::invalid_value(path("device"), expected, &found));
            }
            if offload.device == OffloadDevice::Nvme && offload.nvme_path.is_none() {
                return Err(ConfigError::invalid_value(
                    path("nvme_path"),
                    "a folder, because device is nvme",
                    "nothing",
                ));
            }
        }
        Ok(self)
    }
}
