//! What can go wrong with settings and peers.

use std::path::PathBuf;

/// Everything that the engine refuses or that a peer process can do to it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting with an impossible value.
    #[error("`{field}`: expected {expected}, found {found}")]
    Setting {
        /// The setting's name.
        field: &'static str,
        /// What would do.
        expected: &'static str,
        /// The value.
        found: String,
    },
    /// A collective was called with buffers that do not belong together.
    #[error("{operation}: expected {expected} values, found {found}")]
    Length {
        /// The collective.
        operation: &'static str,
        /// The length that the other buffer or the world asks for.
        expected: usize,
        /// The length found.
        found: usize,
    },
    /// A rank that does not exist.
    #[error("{operation}: rank {rank} does not exist in a world of {world}")]
    Rank {
        /// The operation.
        operation: &'static str,
        /// The rank asked for.
        rank: usize,
        /// The number of ranks.
        world: usize,
    },
    /// A rank that has ended, or is silent.
    #[error(
        "{operation}: rank {rank} {}; look at its output for the cause, then start again from the last checkpoint",
        waited.map_or("has ended".to_owned(), |time| format!("has not answered for {} s", time.as_secs_f64()))
    )]
    Lost {
        /// The collective.
        operation: &'static str,
        /// The rank, by its number in the whole world.
        rank: usize,
        /// How long it was waited for; none if it is known to have ended.
        waited: Option<std::time::Duration>,
    },
    /// Ranks that call different collectives.
    #[error(
        "{operation}: rank {rank} is in another collective; do all ranks run the same program with the same recipe?"
    )]
    OutOfStep {
        /// The collective of this rank.
        operation: &'static str,
        /// The other rank, by its number in the whole world.
        rank: usize,
    },
    /// A collective that was given up because an earlier one failed.
    #[error("given up, because an earlier collective failed")]
    Abandoned,
    /// MPI cannot be used.
    #[error("MPI: {problem}; install Open MPI (Debian: openmpi-bin, libopenmpi-dev) and start by mpirun")]
    Mpi {
        /// What is wrong.
        problem: String,
    },
    /// A gradient or loss is not a number.
    #[error("step {step}: the gradient norm is {norm}; lower the learning rate, or look for a broken row in the data")]
    NotFinite {
        /// The optimizer step, counted from 0.
        step: usize,
        /// The norm found.
        norm: f64,
    },
    /// A configuration file that cannot be read, or what is wrong inside it.
    #[error("{file}: {source}")]
    File {
        /// The file.
        file: String,
        /// What is wrong.
        source: Box<Error>,
    },
    /// The system refuses to hand out a file.
    #[error("cannot be read: {0}")]
    Io(#[from] std::io::Error),
    /// A configuration that is not well-formed JSON or YAML, or names a key twice.
    #[error("not readable as {format}: {message}")]
    Syntax {
        /// JSON or YAML.
        format: &'static str,
        /// The reader's message, with line and column.
        message: String,
    },
    /// A key of a configuration file with a value that does not fit.
    #[error("`{key}`: expected {expected}, found {found}")]
    Key {
        /// The key's path, its parts joined by dots.
        key: String,
        /// What would do.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A key that nobody knows.
    #[error("`{key}` is not a key of {block}; did you mean `{nearest}`?")]
    UnknownKey {
        /// The key's path.
        key: String,
        /// Whose key it would be.
        block: String,
        /// The path of the known key of that block that is spelled most like it.
        nearest: String,
    },
    /// A setting that is known and cannot be had here.
    #[error("`{key}`: {found} is not supported, because {reason}")]
    Refused {
        /// The key's path.
        key: String,
        /// The value.
        found: String,
        /// Why, and what to write instead.
        reason: &'static str,
    },
    /// No batch size at all; DeepSpeed's words.
    #[error("Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided")]
    NoBatch,
    /// A batch size or a number of steps that is 0, or that a division rounds to 0; DeepSpeed's words.
    #[error("{what}: 0 has to be greater than 0")]
    ZeroBatch {
        /// DeepSpeed's name of the number.
        what: &'static str,
    },
    /// Three batch settings that do not multiply; DeepSpeed's words.
    #[error(
        "Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * \
         world_size {train} != {micro} * {accumulation} * {world}"
    )]
    Batch {
        /// Samples per optimizer step, of all ranks together.
        train: u64,
        /// Samples per forward pass of one rank.
        micro: u64,
        /// Micro-batches per optimizer step.
        accumulation: u64,
        /// The number of ranks.
        world: u64,
    },
    /// Gradients that overflow even at the smallest loss scale; the first sentence is DeepSpeed's.
    #[error(
        "Current loss scale already at minimum - cannot decrease scale anymore. Step {step} overflowed at a scale of \
         {scale}: lower the learning rate or train in bf16"
    )]
    LossScale {
        /// The step, counted from 0, skipped steps included.
        step: u64,
        /// The scale.
        scale: f64,
    },
    /// A schedule of a pipeline that cannot be made or run.
    #[error(transparent)]
    Schedule(#[from] crate::pipeline::ScheduleError),
    /// A file that cannot be read or written.
    #[error("{}: {source}", path.display())]
    Path {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A saved state that does not belong to the model.
    #[error("{}: `{key}`: expected {expected}, found {found}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// The tensor or field.
        key: String,
        /// What the model asks for.
        expected: String,
        /// What stands there.
        found: String,
    },
}
