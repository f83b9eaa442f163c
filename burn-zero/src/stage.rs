//! The ZeRO stages.

use crate::ConfigError;

/// A ZeRO stage as in DeepSpeed, 0 to 3. Each stage shards among the ranks what the stages before it shard, and more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(into = "u8", try_from = "u8")]
pub enum ZeroStage {
    /// Stage 0: nothing is sharded, every rank holds all states.
    #[default]
    Disabled,
    /// Stage 1: optimizer states are sharded.
    OptimizerStates,
    /// Stage 2: gradients are sharded too.
    Gradients,
    /// Stage 3: weights are sharded too.
    Weights,
}

impl From<ZeroStage> for u8 {
    fn from(stage: ZeroStage) -> u8 {
        stage as u8
    }
}

impl TryFrom<u8> for ZeroStage {
    type Error = ConfigError;

    fn try_from(number: u8) -> Result<Self, ConfigError> {
        let stages = [Self::Disabled, Self::OptimizerStates, Self::Gradients, Self::Weights];
        let stage = stages.get(usize::from(number)).copied();
        stage.ok_or_else(|| ConfigError::invalid_value("stage", "a whole number from 0 to 3", number.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_numbered_from_0_to_3() {
        for number in 0..4 {
            assert_eq!(u8::from(ZeroStage::try_from(number).unwrap()), number);
        }
        assert!(ZeroStage::try_from(4).is_err());
    }
}
