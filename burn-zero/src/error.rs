//! The errors of the crate, divided by what a caller can do about them.

mod pipeline;

pub use pipeline::PipelineError;
use std::{path::PathBuf, time::Duration};

/// An error in settings, files, collectives or the numbers of a training run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A collective failed. If a rank is lost, the run has to be started again from its last checkpoint.
    #[error(transparent)]
    Communication(#[from] CommError),
    /// A setting or a configuration file is wrong; it has to be corrected.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A checkpoint does not belong to this model; it has to be another file.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The training diverges; it needs a lower learning rate, other data or another precision.
    #[error(transparent)]
    Numeric(#[from] NumericError),
    /// A pipeline schedule is invalid.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The path of the file.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
}

/// An error in a collective or a peer process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommError {
    /// A collective was called with buffers whose lengths do not match.
    #[error("{operation}: expected {expected} values, found {found}")]
    LengthMismatch {
        /// The name of the collective.
        operation: &'static str,
        /// The length that follows from the other buffer or the number of ranks.
        expected: usize,
        /// The length found.
        found: usize,
    },
    /// A rank does not exist.
    #[error("{operation}: rank {rank} does not exist in a world of {world}")]
    UnknownRank {
        /// The name of the operation.
        operation: &'static str,
        /// The rank that does not exist.
        rank: usize,
        /// The number of ranks.
        world: usize,
    },
    /// A rank has ended or does not answer.
    #[error(
        "{operation}: rank {rank}{} {}; look at the output of rank {} for the cause, then start again from the last \
         checkpoint",
        describe_waits(waits_for),
        waited.map_or("has ended".to_owned(), |time| format!("has not answered for {} s", time.as_secs_f64())),
        waits_for.last().unwrap_or(rank)
    )]
    Lost {
        /// The name of the collective.
        operation: &'static str,
        /// The lost rank, by its number in the whole world.
        rank: usize,
        /// How long this rank has waited for it; `None` if it is known to have ended.
        waited: Option<Duration>,
        /// The rank that the lost rank waits for itself, the one that this one waits for, and so on. A rank counts as
        /// waiting if half of its deadline has passed.
        waits_for: Vec<usize>,
    },
    /// Two ranks call different collectives.
    #[error(
        "{operation}: rank {rank} is in another collective; do all ranks run the same program with the same recipe?"
    )]
    CollectiveMismatch {
        /// The name of the collective of this rank.
        operation: &'static str,
        /// The other rank, by its number in the whole world.
        rank: usize,
    },
    /// A rank has sent something else than this rank expects.
    #[error(
        "rank {to}: message from rank {from}: expected {expected}, found {found}; do all ranks run the same program \
         with the same recipe?"
    )]
    UnexpectedMessage {
        /// The rank that has sent the message, by its number in the whole world.
        from: usize,
        /// The rank that has received it, by its number in the whole world.
        to: usize,
        /// The content that this rank expects.
        expected: String,
        /// The content found.
        found: String,
    },
    /// A collective was aborted because an earlier one failed.
    #[error("aborted, because an earlier collective failed")]
    Aborted,
    /// MPI cannot be initialised.
    #[error(
        "MPI: it cannot be initialised, or was before; install Open MPI (Debian: openmpi-bin, libopenmpi-dev) and \
         start by mpirun"
    )]
    MpiInit,
    /// The thread that makes all MPI calls cannot be started.
    #[error("MPI: {source}; install Open MPI (Debian: openmpi-bin, libopenmpi-dev) and start by mpirun")]
    MpiThread {
        /// The error of the operating system.
        source: std::io::Error,
    },
}

/// Returns the relative clauses about the ranks that a lost rank waits for.
fn describe_waits(waits_for: &[usize]) -> String {
    let clauses: String = waits_for.iter().map(|rank| format!(", which waits for rank {rank}")).collect();
    if clauses.is_empty() { clauses } else { clauses + "," }
}

/// An error in a setting or a configuration file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A configuration file has an error.
    #[error("{}: {source}", path.display())]
    File {
        /// The path of the file.
        path: PathBuf,
        /// The error.
        source: Box<ConfigError>,
    },
    /// A configuration is not well-formed Hjson or YAML, or has a duplicate key.
    #[error("not readable as {format}: {source}")]
    Syntax {
        /// Hjson or YAML.
        format: &'static str,
        /// The error of the parser, with line and column.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A setting or a key of a configuration file has an invalid value.
    #[error("`{key}`: expected {expected}, found {found}")]
    InvalidValue {
        /// The name of the setting, or the path of the key, its parts joined by dots.
        key: String,
        /// The valid values.
        expected: String,
        /// The value found.
        found: String,
    },
    /// A key is unknown.
    #[error("`{key}` is not a key of {block}; did you mean `{nearest}`?")]
    UnknownKey {
        /// The path of the key.
        key: String,
        /// The block that the key is in.
        block: String,
        /// The path of the key of that block with the most similar name.
        nearest: String,
    },
    /// A valid setting is not supported here.
    #[error("`{key}`: {found} is not supported, because {reason}")]
    Unsupported {
        /// The path of the key.
        key: String,
        /// The value found.
        found: String,
        /// The reason, and what to write instead.
        reason: &'static str,
    },
    /// A mesh has another number of ranks than the run.
    #[error(
        "data {data} x pipeline {pipeline} x tensor {tensor} is not the {world} ranks of the run; start as many \
         processes as their product, and give every axis at least 1"
    )]
    MeshShape {
        /// The ranks along the data axis.
        data: usize,
        /// The ranks along the pipeline axis.
        pipeline: usize,
        /// The ranks along the tensor axis.
        tensor: usize,
        /// The ranks of the run.
        world: usize,
    },
    /// No batch size is given; the message is DeepSpeed's.
    #[error("Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided")]
    MissingBatchSize,
    /// A batch size or a number of steps is 0, or is rounded down to 0; the message is DeepSpeed's.
    #[error("{what}: 0 has to be greater than 0")]
    ZeroBatchSize {
        /// DeepSpeed's name of the setting.
        what: &'static str,
    },
    /// The three batch settings contradict each other; the message is DeepSpeed's.
    #[error(
        "Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * \
         world_size {train} != {micro} * {accumulation} * {world}"
    )]
    BatchSizeMismatch {
        /// The samples per optimizer step, over all ranks.
        train: u64,
        /// The samples per forward pass of one rank.
        micro: u64,
        /// The micro-batches per optimizer step.
        accumulation: u64,
        /// The number of ranks.
        world: u64,
    },
}

impl ConfigError {
    /// Creates the error of a setting or key with an invalid value.
    pub(crate) fn invalid_value(
        key: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> ConfigError {
        Self::InvalidValue { key: key.into(), expected: expected.into(), found: found.into() }
    }
}

/// An error in a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A saved state does not match the model.
    #[error("{}: `{key}`: expected {expected}, found {found}", path.display())]
    Mismatch {
        /// The path of the file.
        path: PathBuf,
        /// The name of the tensor or field.
        key: String,
        /// The value that the model requires.
        expected: String,
        /// The value found.
        found: String,
    },
    /// The safetensors format cannot hold the state, or its file cannot be written.
    #[error("{}: {source}", path.display())]
    Safetensors {
        /// The path of the file.
        path: PathBuf,
        /// The error.
        source: safetensors::SafeTensorError,
    },
}

/// An error in the numbers of a training run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NumericError {
    /// A gradient or loss is not finite.
    #[error("step {step}: the gradient norm is {norm}; lower the learning rate, or look for a broken row in the data")]
    NotFinite {
        /// The optimizer step, counted from 0.
        step: usize,
        /// The gradient norm.
        norm: f64,
    },
    /// Gradients overflow even at the smallest loss scale; the first sentence of the message is DeepSpeed's.
    #[error(
        "Current loss scale already at minimum - cannot decrease scale anymore. Step {step} overflowed at a scale of \
         {scale}: lower the learning rate or train in bf16"
    )]
    LossScale {
        /// The step, counted from 0, including skipped steps.
        step: u64,
        /// The loss scale.
        scale: f64,
    },
}
