//! Communication between ranks, over flat host buffers.
//!
//! ```text
//!  Collectives   all_reduce, reduce_scatter, all_gather, …    buffers before and after; traffic; sums
//!  Communicator  start exchanges of messages, split            Solo, ProcessGroup
//!  Transport     bytes from rank to rank, with a deadline     threads, MPI
//! ```
//!
//! Every collective is built on one exchange of messages, so that all transports sum in the same order and count the
//! same traffic: shards go straight to the rank that owns them, which adds them up in f32 in rank order. The result
//! depends neither on timing nor on the transport. The cost is that a rank has `world_size - 1` messages in flight,
//! where a ring has one.
//!
//! An exchange is started and waited for in two steps, so that a receive can be open while other collectives run. No
//! start blocks, and exchanges with one peer match in the order of their start.

mod async_communicator;
mod collective;
mod element;
mod exchange;
#[cfg(feature = "mpi")]
pub mod mpi;
mod process_group;
mod solo;
pub mod threads;
mod traffic;

pub use crate::{compute_lock::ComputeLock, trace::Trace};
pub(crate) use crate::{trace::Lane, worker::Pending};
pub(crate) use async_communicator::AsyncCommunicator;
pub use collective::Collectives;
pub use element::Element;
pub use exchange::Exchange;
pub use process_group::ProcessGroup;
pub use solo::Solo;
pub use traffic::{CommVolume, Traffic};

use crate::Error;

/// The purpose of an exchange. Every message carries it, so that ranks that call different collectives notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Every rank gets the sum.
    AllReduce,
    /// Every rank gets its shard of the sum.
    ReduceScatter,
    /// Every rank gets the shards of all ranks.
    AllGather,
    /// Every rank gets the root's values.
    Broadcast,
    /// One rank sends to another.
    Send,
    /// One rank sends to another a message that describes itself.
    SendObject,
    /// Every rank waits for all others.
    Barrier,
    /// Every rank gets a byte string from each rank: scalars, flags and other small control data.
    AllGatherObject,
    /// A group is split into smaller groups.
    Split,
}

impl Operation {
    /// Returns the name of the collective.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllGather => "all_gather",
            Self::Broadcast => "broadcast",
            Self::Send => "send",
            Self::SendObject => "send_object",
            Self::Barrier => "barrier",
            Self::AllGatherObject => "all_gather_object",
            Self::Split => "split",
        }
    }
}

/// The bytes that one rank sends to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The rank that receives the message.
    pub to: usize,
    /// The content.
    pub bytes: Vec<u8>,
}

/// A group of ranks that call the same collectives in the same order. The collectives themselves are the methods of
/// [`Collectives`], which every communicator has.
pub trait Communicator: Send {
    /// Returns this rank's number in the group, below [`Communicator::world_size`].
    fn rank(&self) -> usize;

    /// Returns the number of ranks in the group.
    fn world_size(&self) -> usize;

    /// Returns the number in the whole world of the rank that has number `rank` in the group, by which errors name it.
    fn global_rank(&self, rank: usize) -> usize {
        rank
    }

    /// Starts to send each message of `outgoing` to its rank and to receive one message from each rank of `incoming`.
    /// It does not block. Several exchanges may be running at a time. Those with one peer match in the order of their
    /// start, in whatever order they are waited for; those of [`Operation::SendObject`] have an order of their own, so
    /// that a receive can be open while collectives run.
    ///
    /// # Errors
    /// [`CommError::UnknownRank`](crate::CommError::UnknownRank) for a rank that does not exist. The other errors are
    /// those of [`Exchange::wait`].
    fn start(&mut self, operation: Operation, outgoing: Vec<Message>, incoming: &[usize]) -> Result<Exchange, Error>;

    /// Sends each message of `outgoing` to its rank and returns one message from each rank of `incoming`, in that
    /// order.
    ///
    /// # Errors
    /// As [`Communicator::start`] and [`Exchange::wait`].
    fn exchange(
        &mut self,
        operation: Operation,
        outgoing: Vec<Message>,
        incoming: &[usize],
    ) -> Result<Vec<Vec<u8>>, Error> {
        self.start(operation, outgoing, incoming)?.wait()
    }

    /// Splits the group, as `MPI_Comm_split` does: returns the group of the ranks that passed the same `color`, ordered
    /// by `key`, then by rank.
    ///
    /// # Errors
    /// As [`Communicator::exchange`].
    fn split(&mut self, color: usize, key: usize) -> Result<Box<dyn Communicator>, Error>;

    /// Returns how much this rank has sent in this group so far.
    fn traffic(&self) -> Traffic;

    /// Adds `sent` to the traffic of this rank.
    fn record_sent(&mut self, operation: Operation, sent: CommVolume);

    /// Returns the lock that ranks of one process share, so that one of them computes at a time.
    fn compute_lock(&self) -> ComputeLock {
        ComputeLock::default()
    }
}

#[cfg(test)]
mod tests;
