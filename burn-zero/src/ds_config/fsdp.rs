//! The names of PyTorch's FSDP for what ZeRO calls stages.

use super::{Stage, check::wrong};
use crate::Error;

const HYBRID: &str = "it divides within a machine and copies between machines, and the ranks here are one group; \
                      write FULL_SHARD";

/// The stage that an FSDP sharding strategy is, by its name or by its number in Accelerate's files (1 to 5).
///
/// # Errors
/// [`Error::Refused`] for the hybrid strategies, [`Error::Key`] for a name that is none.
pub fn fsdp_stage(strategy: &str) -> Result<Stage, Error> {
    const KEY: &str = "fsdp_sharding_strategy";
    match strategy.to_ascii_uppercase().as_str() {
        "FULL_SHARD" | "1" => Ok(Stage::Weights),
        "SHARD_GRAD_OP" | "2" => Ok(Stage::Gradients),
        "NO_SHARD" | "3" => Ok(Stage::Replicated),
        "HYBRID_SHARD" | "HYBRID_SHARD_ZERO2" | "_HYBRID_SHARD_ZERO2" | "4" | "5" => {
            Err(Error::Refused { key: KEY.to_owned(), found: strategy.to_owned(), reason: HYBRID })
        }
        _ => Err(wrong(KEY, "FULL_SHARD, SHARD_GRAD_OP or NO_SHARD", strategy)),
    }
}
