//! The ZeRO stages that PyTorch's FSDP sharding strategies correspond to.

use crate::{ConfigError, ZeroStage};

const HYBRID: &str = "it shards within a machine and replicates between machines, and here all ranks are one group; \
                      write FULL_SHARD";

/// Returns the ZeRO stage of an FSDP sharding strategy, given by its name or by its number in Accelerate's files (1 to
/// 5).
///
/// # Errors
/// [`ConfigError::Unsupported`] for the hybrid strategies, [`ConfigError::InvalidValue`] for an unknown name.
pub fn fsdp_stage(strategy: &str) -> Result<ZeroStage, ConfigError> {
    const KEY: &str = "fsdp_sharding_strategy";
    match strategy.to_ascii_uppercase().as_str() {
        "FULL_SHARD" | "1" => Ok(ZeroStage::Weights),
        "SHARD_GRAD_OP" | "2" => Ok(ZeroStage::Gradients),
        "NO_SHARD" | "3" => Ok(ZeroStage::Disabled),
        "HYBRID_SHARD" | "HYBRID_SHARD_ZERO2" | "_HYBRID_SHARD_ZERO2" | "4" | "5" => {
            Err(ConfigError::Unsupported { key: KEY.to_owned(), found: strategy.to_owned(), reason: HYBRID })
        }
        _ => Err(ConfigError::invalid_value(KEY, "FULL_SHARD, SHARD_GRAD_OP or NO_SHARD", strategy)),
    }
}
