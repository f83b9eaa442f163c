//! Counters of how much a rank has sent.

use super::Operation;

/// A communication volume.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CommVolume {
    /// The number of values.
    pub elements: u64,
    /// The number of bytes.
    pub bytes: u64,
}

/// The volume that a rank has sent, by kind of collective. A collective over `n` values per rank counts
/// `n (world_size − 1) / world_size` elements, an `all_reduce` twice that.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// The volume of `all_reduce` and `reduce_scatter`.
    pub reduced: CommVolume,
    /// The volume of `all_gather` and `broadcast`.
    pub gathered: CommVolume,
    /// The volume of `send` and of the values in messages that describe themselves.
    pub sent: CommVolume,
    /// The volume of control data: `all_gather_object`, `barrier`, `split` and the headers of messages that describe
    /// themselves.
    pub control: CommVolume,
}

impl std::ops::Add for CommVolume {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { elements: self.elements + other.elements, bytes: self.bytes + other.bytes }
    }
}

impl std::ops::Add for Traffic {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            reduced: self.reduced + other.reduced,
            gathered: self.gathered + other.gathered,
            sent: self.sent + other.sent,
            control: self.control + other.control,
        }
    }
}

impl Traffic {
    /// Adds the volume of one call.
    pub fn add(&mut self, operation: Operation, sent: CommVolume) {
        let kind = match operation {
            Operation::AllReduce | Operation::ReduceScatter => &mut self.reduced,
            Operation::AllGather | Operation::Broadcast => &mut self.gathered,
            Operation::Send => &mut self.sent,
            Operation::SendObject | Operation::Barrier | Operation::AllGatherObject | Operation::Split => {
                &mut self.control
            }
        };
        kind.elements += sent.elements;
        kind.bytes += sent.bytes;
    }
}
