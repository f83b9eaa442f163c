//! The error of schedules, partitions and their settings.

/// An error in a pipeline schedule or a partition. Ranks and positions are counted from 0, lines and columns of a CSV file from 1, as editors
/// do.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// A setting has an invalid value.
    #[error("`{field}`: expected {expected}, found {found}")]
    Setting {
        /// The name of the setting.
        field: &'static str,
        /// The valid values.
        expected: String,
        /// The value found.
        found: String,
    },
    /// An instruction or action is missing, duplicate, too early or on the wrong rank.
    #[error("rank {rank}, position {position}: expected {expected}, found {found}")]
    Order {
        /// The rank whose list is wrong.
        rank: usize,
        /// The position in the list of that rank; the length of the list if it ends too early.
        position: usize,
        /// The entry that should be at this position, or before it.
        expected: String,
        /// The entry at this position.
        found: String,
    },
    /// Deadlock: every rank that has not finished waits for another one.
    #[error("deadlock: rank {rank}, position {position}: expected {expected}, found {found}")]
    Deadlock {
        /// The lowest rank that waits.
        rank: usize,
        /// The position of the instruction at which it waits.
        position: usize,
        /// The instruction that its peer would have to be at.
        expected: String,
        /// The instruction at which it waits, and the one its peer is at.
        found: String,
    },
    /// A cell of a CSV file is not a valid action.
    #[error("CSV line {line}, column {column}: expected {expected}, found `{found}`")]
    Csv {
        /// The line, counted from 1: rank + 1.
        line: usize,
        /// The column, counted from 1: slot + 1.
        column: usize,
        /// The valid values.
        expected: String,
        /// The text of the cell.
        found: String,
    },
}
