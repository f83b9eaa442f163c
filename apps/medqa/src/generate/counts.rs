//! The counts of a generation.

use serde::Serialize;
use std::collections::BTreeMap;

/// Counts for the report.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct GenerationCounts {
    pub rows: u64,
    /// Rows and answers that were removed, by reason.
    pub removed: BTreeMap<String, u64>,
    /// Answers that a repair of their JSON has saved, by repair.
    pub repaired: BTreeMap<&'static str, u64>,
    /// Answers that were asked for once more, by reason.
    pub asked_again: BTreeMap<&'static str, u64>,
    /// Requests that were given up.
    pub failed: u64,
    /// Attempts after a failed one.
    pub retries: u64,
    /// Requests whose tokens are estimated.
    pub unknown_usage: u64,
}
