//! What a rank has put on the wire.

use super::Operation;

/// An amount of what was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Values.
    pub elements: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// How much a rank has sent, by kind of call. A collective over `n` values of every rank counts `n (world − 1) / world`
/// elements, an `all_reduce` twice that.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Sent in `all_reduce` and `reduce_scatter`.
    pub reduced: Count,
    /// Sent in `all_gather` and `broadcast`.
    pub gathered: Count,
    /// Sent from rank to rank.
    pub sent: Count,
    /// Sent as notes: scalars, flags, what `split` needs.
    pub notes: Count,
}

impl Traffic {
    /// Adds one call.
    pub fn add(&mut self, operation: Operation, sent: Count) {
        let kind = match operation {
            Operation::AllReduce | Operation::ReduceScatter => &mut self.reduced,
            Operation::AllGather | Operation::Broadcast => &mut self.gathered,
            Operation::Send => &mut self.sent,
            Operation::Barrier | Operation::Share | Operation::Split => &mut self.notes,
        };
        kind.elements += sent.elements;
        kind.bytes += sent.bytes;
    }
}
