//! What can go wrong with settings and peers.

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
    /// A gradient or loss is not a number.
    #[error("step {step}: the gradient norm is {norm}; lower the learning rate, or look for a broken row in the data")]
    NotFinite {
        /// The optimizer step, counted from 0.
        step: usize,
        /// The norm found.
        norm: f64,
    },
}
