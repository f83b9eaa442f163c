//! The keys of `[parallel]` for a pipeline: its ranks, its schedule and how the model is cut.

use std::str::FromStr;

use burn_zero::pipeline::PipelineKind;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

/// The pipeline of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PipelineOptions {
    /// The number of ranks of a pipeline; 1 for none.
    pub pipeline: usize,
    /// The number of pipelines that share the rows of a step, as data-parallel ranks do; all ranks divided by
    /// `pipeline` if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<usize>,
    /// The schedule, by its name in PyTorch and torchtitan.
    #[serde(with = "schedule_name")]
    pub schedule: PipelineKind,
    /// The number of stages per rank; what the schedule needs if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunks: Option<usize>,
    /// The rule that cuts the model into stages.
    pub partition: Partition,
}

impl Default for PipelineOptions {
    fn default() -> Self {
        let partition = Partition::default();
        Self { pipeline: 1, data: None, schedule: PipelineKind::OneFOneB, chunks: None, partition }
    }
}

impl PipelineOptions {
    /// Returns the number of stages per rank.
    pub fn chunks(&self) -> usize {
        self.chunks.or(self.schedule.fixed_chunks()).unwrap_or(2)
    }
}

/// The rule that cuts the model's segments into stages.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Partition {
    /// The slowest stage is as fast as possible, by the products of each segment.
    #[default]
    Time,
    /// The stages have equal numbers of segments.
    Uniform,
    /// The stages have these numbers of segments.
    Explicit(Vec<usize>),
}

impl Partition {
    const TIME: &str = "time";
    const UNIFORM: &str = "uniform";
}

impl Serialize for Partition {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Time => serializer.serialize_str(Self::TIME),
            Self::Uniform => serializer.serialize_str(Self::UNIFORM),
            Self::Explicit(sizes) => sizes.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Partition {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = toml::Value::deserialize(deserializer)?;
        let found = match &value {
            toml::Value::String(name) => match name.as_str() {
                Self::TIME => return Ok(Self::Time),
                Self::UNIFORM => return Ok(Self::Uniform),
                name => format!("{name:?}"),
            },
            toml::Value::Array(_) => match value.clone().try_into() {
                Ok(sizes) => return Ok(Self::Explicit(sizes)),
                Err(_) => value.to_string(),
            },
            other => other.to_string(),
        };
        let expected = "expected \"time\", \"uniform\" or a list with the number of segments of each stage";
        Err(D::Error::custom(format!("{expected}, found {found}")))
    }
}

/// A schedule as its name.
mod schedule_name {
    use super::*;

    pub(super) fn serialize<S: Serializer>(kind: &PipelineKind, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(kind)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PipelineKind, D::Error> {
        PipelineKind::from_str(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}
