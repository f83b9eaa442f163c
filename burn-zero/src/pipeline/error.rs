//! What can be wrong with a schedule, a partition or their settings.

/// Everything that this module refuses. Ranks, positions, lines and columns are counted from 0, except in a CSV file, where
/// lines and columns are counted from 1 as editors do.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ScheduleError {
    /// A setting with an impossible value.
    #[error("`{field}`: expected {expected}, found {found}")]
    Setting {
        /// The setting's name.
        field: &'static str,
        /// What would do.
        expected: String,
        /// The value.
        found: String,
    },
    /// Something is missing, comes twice, comes too early or does not belong to this rank.
    #[error("rank {rank}, position {position}: expected {expected}, found {found}")]
    Order {
        /// The rank whose list is wrong.
        rank: usize,
        /// The position in that rank's list; its length if the list ends too early.
        position: usize,
        /// What should stand there, or before.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A rank keeps the activations of more micro-batches than it may.
    #[error("rank {rank}, position {position}: expected at most {expected} live activations, found {found}")]
    Live {
        /// The rank.
        rank: usize,
        /// The position of the forward pass that is one too many.
        position: usize,
        /// The limit.
        expected: usize,
        /// The number of activations then alive.
        found: usize,
    },
    /// No rank can go on: each waits for another one.
    #[error("deadlock: rank {rank}, position {position}: expected {expected}, found {found}")]
    Deadlock {
        /// The first rank that waits.
        rank: usize,
        /// The position in its list at which it waits.
        position: usize,
        /// What its peer would have to do.
        expected: String,
        /// What it waits at, and what its peer does instead.
        found: String,
    },
    /// A cell of a CSV file that is not an action this module knows.
    #[error("CSV line {line}, column {column}: expected {expected}, found `{found}`")]
    Csv {
        /// The line, counted from 1: rank + 1.
        line: usize,
        /// The column, counted from 1: slot + 1.
        column: usize,
        /// What would do.
        expected: String,
        /// The cell.
        found: String,
    },
}
