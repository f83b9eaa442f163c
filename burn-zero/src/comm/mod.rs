//! Communication between ranks, over flat host buffers.

mod solo;

pub use solo::Solo;

use crate::Error;

/// How many bytes a rank has put on the wire, by kind of call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes sent in reductions (`all_reduce`, `reduce_scatter`).
    pub reduced: u64,
    /// Bytes sent in `all_gather` and `broadcast`.
    pub gathered: u64,
    /// Bytes sent from rank to rank.
    pub sent: u64,
}

/// A group of ranks, each a process, that call the same collectives in the same order.
///
/// Buffers are flat f32 values on the host. Sums are taken in the order of ranks, so that they do not depend on timing.
pub trait Communicator: Send {
    /// This rank's number in the group, below [`Communicator::world`].
    fn rank(&self) -> usize;

    /// The number of ranks in the group.
    fn world(&self) -> usize;

    /// Before: every rank holds `n` values. After: every rank holds their element-wise sum.
    ///
    /// # Errors
    /// If ranks disagree on `n` or one is lost.
    fn all_reduce(&mut self, buffer: &mut [f32]) -> Result<(), Error>;

    /// Before: every rank holds `world · n` values. After: rank `i` holds in `shard` the sum of everyone's `i`-th `n` values.
    ///
    /// # Errors
    /// If the lengths do not fit or a rank is lost.
    fn reduce_scatter(&mut self, buffer: &[f32], shard: &mut [f32]) -> Result<(), Error>;

    /// Before: every rank holds `n` values in `shard`. After: every rank holds all `world · n` values in the order of ranks.
    ///
    /// # Errors
    /// If the lengths do not fit or a rank is lost.
    fn all_gather(&mut self, shard: &[f32], buffer: &mut [f32]) -> Result<(), Error>;

    /// Before: `root` holds `n` values. After: every rank holds them.
    ///
    /// # Errors
    /// If `root` does not exist or a rank is lost.
    fn broadcast(&mut self, buffer: &mut [f32], root: usize) -> Result<(), Error>;

    /// Sends `buffer` to rank `to`, which must receive it.
    ///
    /// # Errors
    /// If `to` does not exist, is this rank, or is lost.
    fn send(&mut self, buffer: &[f32], to: usize) -> Result<(), Error>;

    /// Receives what rank `from` sends.
    ///
    /// # Errors
    /// If `from` does not exist, is this rank, or is lost.
    fn recv(&mut self, buffer: &mut [f32], from: usize) -> Result<(), Error>;

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// If a rank is lost.
    fn barrier(&mut self) -> Result<(), Error>;

    /// A group of the ranks that pass the same `color`, ordered by `key`, then by rank.
    ///
    /// # Errors
    /// If a rank is lost.
    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Communicator>, Error>;

    /// The bytes this rank has sent so far.
    fn traffic(&self) -> Traffic;
}
