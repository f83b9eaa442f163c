//! Communication between ranks, over flat host buffers.
//!
//! ```text
//!  Collectives   all_reduce, reduce_scatter, all_gather, …    what a rank holds before and after; counts; sums
//!  Communicator  exchange messages with peers, split          Solo, Group
//!  wire          bytes from rank to rank, with a deadline     threads, MPI
//! ```
//!
//! Everything is built on one exchange of messages, so that every wire sums in the same order and counts alike: pieces go
//! straight to the rank that owns them, which adds them up in f32 in the order of ranks. The result depends neither on
//! timing nor on the wire. The cost is that a rank has `world - 1` messages under way instead of a ring's one.

mod collective;
mod element;
mod group;
#[cfg(feature = "mpi")]
pub mod mpi;
mod queue;
mod solo;
pub mod threads;
mod trace;
mod traffic;
mod turn;

pub use crate::worker::Pending;
pub use collective::Collectives;
pub use element::Element;
pub use group::Group;
pub use queue::Queue;
pub use solo::Solo;
pub(crate) use trace::write_events;
pub use trace::{Lane, Trace};
pub use traffic::{Count, Traffic};
pub use turn::Turn;

use crate::Error;

/// What an exchange is for. It goes with every message: ranks that call different collectives find out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Everyone gets the sum.
    AllReduce,
    /// Everyone gets a part of the sum.
    ReduceScatter,
    /// Everyone gets everyone's part.
    AllGather,
    /// Everyone gets the root's values.
    Broadcast,
    /// One rank sends to another.
    Send,
    /// Everyone waits for everyone.
    Barrier,
    /// Everyone gets everyone's note: scalars, flags and other small things beside the buffers.
    Share,
    /// A group falls into smaller ones.
    Split,
}

impl Operation {
    /// The name of the collective.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllGather => "all_gather",
            Self::Broadcast => "broadcast",
            Self::Send => "send",
            Self::Barrier => "barrier",
            Self::Share => "share",
            Self::Split => "split",
        }
    }
}

/// A group of ranks that call the same collectives in the same order. The collectives are [`Collectives`]' methods, which
/// every communicator has.
pub trait Communicator: Send {
    /// This rank's number in the group, below [`Communicator::world`].
    fn rank(&self) -> usize;

    /// The number of ranks in the group.
    fn world(&self) -> usize;

    /// Sends each message of `outgoing` to its rank and returns one message from each rank of `incoming`, in that order.
    ///
    /// # Errors
    /// [`Error::Lost`] if a rank is gone or silent for as long as the deadline, [`Error::OutOfStep`] if one is in another
    /// collective.
    fn exchange(
        &mut self,
        operation: Operation,
        outgoing: Vec<(usize, Vec<u8>)>,
        incoming: &[usize],
    ) -> Result<Vec<Vec<u8>>, Error>;

    /// Before: every rank holds a color and a key. After: every rank is in a group of the ranks with its color, ordered by
    /// `key`, then by rank.
    ///
    /// # Errors
    /// As [`Communicator::exchange`].
    fn split(&mut self, color: usize, key: usize) -> Result<Box<dyn Communicator>, Error>;

    /// What this rank has sent so far in this group.
    fn traffic(&self) -> Traffic;

    /// Adds to what this rank has sent.
    fn count(&mut self, operation: Operation, sent: Count);

    /// What ranks take turns at, if they share a process.
    fn turn(&self) -> Turn {
        Turn::default()
    }
}

#[cfg(test)]
mod tests;
