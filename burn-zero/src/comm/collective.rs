//! The collectives, for any communicator.

use super::{
    CommVolume, Communicator, Element, Message, Operation,
    element::{add_message, add_values},
};
use crate::{CommError, Error};
use std::ops::Range;

/// The collectives of a group. Every rank must call the same collectives in the same order. `T` is f32, f16 or bf16.
///
/// # Errors
/// Every collective returns [`CommError::LengthMismatch`] if buffers do not fit each other or those of the peers,
/// [`CommError::UnknownRank`] for a rank that does not exist, [`CommError::Lost`] if a rank has ended or does not
/// answer before the deadline, and [`CommError::CollectiveMismatch`] if a rank is in another collective.
pub trait Collectives: Communicator {
    /// Replaces the values of every rank by their element-wise sum over all ranks, added in rank order.
    fn all_reduce<T: Element>(&mut self, buffer: &mut [T]) -> Result<(), Error> {
        let (operation, n, world, rank) = (Operation::AllReduce, buffer.len(), self.world_size(), self.rank());
        let part = |rank: usize| rank * n / world..(rank + 1) * n / world;
        let local = part(rank);
        let mut sum = vec![0.0; local.len()];
        reduce_scatter_parts(self, operation, ReduceBuffers { input: buffer, sum: &mut sum, accumulate: false }, part)?;
        buffer[local.clone()].iter_mut().zip(sum).for_each(|(value, sum)| *value = T::from_f32(sum));
        for message_range in message_ranges(n.div_ceil(world), T::SIZE) {
            let own = encode(&buffer[subrange(&local, &message_range)]);
            for (peer, message) in all_gather_part(self, operation, RawValues { bytes: &own, value_size: T::SIZE })? {
                let values = &mut buffer[subrange(&part(peer), &message_range)];
                check_length(operation, values.len() * T::SIZE, message.len(), T::SIZE)?;
                T::read(&message, values);
            }
        }
        Ok(())
    }

    /// Sums the `world_size · n` values of every rank element-wise, in rank order, and writes the `i`-th `n` sums to
    /// the `shard` of rank `i`.
    fn reduce_scatter<T: Element>(&mut self, buffer: &[T], shard: &mut [T]) -> Result<(), Error> {
        let (n, operation) = (shard.len(), Operation::ReduceScatter);
        check_length(operation, n * self.world_size(), buffer.len(), 1)?;
        let mut sum = vec![0.0; n];
        let buffers = ReduceBuffers { input: buffer, sum: &mut sum, accumulate: false };
        reduce_scatter_parts(self, operation, buffers, |rank| rank * n..(rank + 1) * n)?;
        shard.iter_mut().zip(sum).for_each(|(value, sum)| *value = T::from_f32(sum));
        Ok(())
    }

    /// Like [`Collectives::reduce_scatter`], but adds the values to what `shard` already holds, one rank after the
    /// other.
    fn reduce_scatter_accumulate<T: Element>(&mut self, buffer: &[T], shard: &mut [f32]) -> Result<(), Error> {
        let n = shard.len();
        check_length(Operation::ReduceScatter, n * self.world_size(), buffer.len(), 1)?;
        let buffers = ReduceBuffers { input: buffer, sum: shard, accumulate: true };
        reduce_scatter_parts(self, Operation::ReduceScatter, buffers, |rank| rank * n..(rank + 1) * n)
    }

    /// Concatenates the `n` values in the `shard` of every rank, in rank order, and writes all `world_size · n` values
    /// to the `buffer` of every rank.
    fn all_gather<T: Element>(&mut self, shard: &[T], buffer: &mut [T]) -> Result<(), Error> {
        check_length(Operation::AllGather, shard.len() * self.world_size(), buffer.len(), 1)?;
        T::read(&self.all_gather_bytes(&encode(shard), T::SIZE)?, buffer);
        Ok(())
    }

    /// Gathers raw bytes, as [`Collectives::all_gather`] does for values. `size` is the bytes of one value, in which
    /// the traffic counters and errors count.
    fn all_gather_bytes(&mut self, shard: &[u8], size: usize) -> Result<Vec<u8>, Error> {
        let (operation, n, rank) = (Operation::AllGather, shard.len(), self.rank());
        let mut all = vec![0; n * self.world_size()];
        all[rank * n..(rank + 1) * n].copy_from_slice(shard);
        for message_range in message_ranges(n, 1) {
            let values = RawValues { bytes: &shard[message_range.clone()], value_size: size };
            for (peer, message) in all_gather_part(self, operation, values)? {
                check_length(operation, message_range.len(), message.len(), size)?;
                all[peer * n..][message_range.clone()].copy_from_slice(&message);
            }
        }
        Ok(all)
    }

    /// Copies the values of rank `root` to every rank.
    fn broadcast<T: Element>(&mut self, buffer: &mut [T], root: usize) -> Result<(), Error> {
        let operation = Operation::Broadcast;
        check_rank(self, operation, root)?;
        if self.rank() == root {
            send_to_peers(self, operation, RawValues { bytes: &encode(buffer), value_size: T::SIZE }, &[])?;
            return Ok(());
        }
        let message = self.exchange(operation, Vec::new(), &[root])?.remove(0);
        check_length(operation, buffer.len() * T::SIZE, message.len(), T::SIZE)?;
        T::read(&message, buffer);
        Ok(())
    }

    /// Sends `buffer` to rank `to`, which must call [`Collectives::recv`].
    fn send<T: Element>(&mut self, buffer: &[T], to: usize) -> Result<(), Error> {
        check_peer(self, to)?;
        let bytes = encode(buffer);
        let sent = CommVolume { elements: buffer.len() as u64, bytes: bytes.len() as u64 };
        self.exchange(Operation::Send, vec![Message { to, bytes }], &[])?;
        self.record_sent(Operation::Send, sent);
        Ok(())
    }

    /// Receives into `buffer` the values that rank `from` sends.
    fn recv<T: Element>(&mut self, buffer: &mut [T], from: usize) -> Result<(), Error> {
        check_peer(self, from)?;
        let message = self.exchange(Operation::Send, Vec::new(), &[from])?.remove(0);
        check_length(Operation::Send, buffer.len() * T::SIZE, message.len(), T::SIZE)?;
        T::read(&message, buffer);
        Ok(())
    }

    /// Blocks until every rank has called it.
    fn barrier(&mut self) -> Result<(), Error> {
        exchange_objects(self, Operation::Barrier, &[]).map(|_| ())
    }

    /// Gathers a byte string of any length from every rank and returns all of them in rank order. Meant for scalars
    /// and flags: the traffic counters list it as control data.
    fn all_gather_object(&mut self, object: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        exchange_objects(self, Operation::AllGatherObject, object)
    }
}

impl<C: Communicator + ?Sized> Collectives for C {}

/// Returns the bytes of the values, with capacity for one more: the operation is appended last.
fn encode<T: Element>(values: &[T]) -> Vec<u8> {
    let mut message = Vec::with_capacity(values.len() * T::SIZE + 1);
    T::write(values, &mut message);
    message
}

fn copy_to_message(bytes: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(bytes.len() + 1);
    message.extend_from_slice(bytes);
    message
}

pub(super) fn peers<C: Communicator + ?Sized>(group: &C) -> Vec<usize> {
    (0..group.world_size()).filter(|&peer| peer != group.rank()).collect()
}

fn check_length(operation: Operation, expected: usize, found: usize, unit: usize) -> Result<(), Error> {
    if expected == found {
        return Ok(());
    }
    Err(CommError::LengthMismatch { operation: operation.name(), expected: expected / unit, found: found / unit }
        .into())
}

fn check_rank<C: Communicator + ?Sized>(group: &C, operation: Operation, rank: usize) -> Result<(), Error> {
    if rank < group.world_size() {
        return Ok(());
    }
    Err(CommError::UnknownRank { operation: operation.name(), rank, world: group.world_size() }.into())
}

fn check_peer<C: Communicator + ?Sized>(group: &C, rank: usize) -> Result<(), Error> {
    if rank == group.rank() {
        return Err(CommError::UnknownRank { operation: "send to itself", rank, world: group.world_size() }.into());
    }
    check_rank(group, Operation::Send, rank)
}

/// The largest message in bytes. Besides their buffers, collectives hold one message per peer in each direction.
const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// Splits `n` values of `size` bytes into the ranges that fit one message; a single empty range if `n` is 0.
fn message_ranges(n: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    let max_values = MAX_MESSAGE_BYTES / size;
    (0..n.div_ceil(max_values).max(1)).map(move |i| i * max_values..n.min((i + 1) * max_values))
}

/// Returns `range`, whose positions count from the start of `part`, within `part`; it is cut off at the end of `part`.
fn subrange(part: &Range<usize>, range: &Range<usize>) -> Range<usize> {
    let position = |offset: usize| part.end.min(part.start + offset);
    position(range.start)..position(range.end)
}

/// The buffers of a reduce-scatter.
struct ReduceBuffers<'a, T> {
    /// The values of this rank, the parts of all ranks.
    input: &'a [T],
    /// The sums of this rank's part.
    sum: &'a mut [f32],
    /// True if the values are added to those in `sum`; otherwise the sum starts with the values of rank 0.
    accumulate: bool,
}

/// Values as raw bytes.
struct RawValues<'a> {
    bytes: &'a [u8],
    /// The bytes of one value, in which the traffic is counted.
    value_size: usize,
}

/// Sends every rank its part of the input and sums all ranks' versions of this rank's part in rank order.
fn reduce_scatter_parts<C: Communicator + ?Sized, T: Element>(
    group: &mut C,
    operation: Operation,
    buffers: ReduceBuffers<'_, T>,
    part: impl Fn(usize) -> Range<usize>,
) -> Result<(), Error> {
    let ReduceBuffers { input, sum, accumulate } = buffers;
    let (rank, world, peers) = (group.rank(), group.world_size(), peers(group));
    if !accumulate {
        // Adding to -0 keeps the sign of a zero, so the sum starts with exactly the values of rank 0.
        sum.fill(-0.0);
    }
    for message_range in message_ranges(input.len().div_ceil(world), T::SIZE) {
        let values = |rank: usize| &input[subrange(&part(rank), &message_range)];
        let outgoing: Vec<_> = peers.iter().map(|&to| Message { to, bytes: encode(values(to)) }).collect();
        let sent = sent_volume(&outgoing, T::SIZE);
        let mut messages = group.exchange(operation, outgoing, &peers)?.into_iter();
        group.record_sent(operation, sent);
        let local_range = subrange(&(0..sum.len()), &message_range);
        let sum = &mut sum[local_range];
        for from in 0..world {
            if from == rank {
                add_values(sum, values(rank));
            } else {
                let message = messages.next().unwrap_or_default();
                check_length(operation, sum.len() * T::SIZE, message.len(), T::SIZE)?;
                add_message::<T>(sum, &message);
            }
        }
    }
    Ok(())
}

fn sent_volume(outgoing: &[Message], size: usize) -> CommVolume {
    let bytes: u64 = outgoing.iter().map(|message| message.bytes.len() as u64).sum();
    CommVolume { elements: bytes / size as u64, bytes }
}

/// Sends values to all peers and returns the message of each peer, with its rank.
fn all_gather_part<C: Communicator + ?Sized>(
    group: &mut C,
    operation: Operation,
    values: RawValues<'_>,
) -> Result<impl Iterator<Item = (usize, Vec<u8>)> + use<C>, Error> {
    let peers = peers(group);
    let messages = send_to_peers(group, operation, values, &peers)?;
    Ok(peers.into_iter().zip(messages))
}

/// Sends values to all peers and returns the messages from the ranks `incoming`.
fn send_to_peers<C: Communicator + ?Sized>(
    group: &mut C,
    operation: Operation,
    values: RawValues<'_>,
    incoming: &[usize],
) -> Result<Vec<Vec<u8>>, Error> {
    let message = |to| Message { to, bytes: copy_to_message(values.bytes) };
    let outgoing: Vec<_> = peers(group).into_iter().map(message).collect();
    let sent = sent_volume(&outgoing, values.value_size);
    let messages = group.exchange(operation, outgoing, incoming)?;
    group.record_sent(operation, sent);
    Ok(messages)
}

fn exchange_objects<C: Communicator + ?Sized>(
    group: &mut C,
    operation: Operation,
    object: &[u8],
) -> Result<Vec<Vec<u8>>, Error> {
    let peers = peers(group);
    let outgoing: Vec<_> = peers.iter().map(|&to| Message { to, bytes: object.to_vec() }).collect();
    let bytes = (object.len() * outgoing.len()) as u64;
    let mut messages = group.exchange(operation, outgoing, &peers)?;
    // Control data has no element type: it is counted in units of four bytes.
    group.record_sent(operation, CommVolume { elements: bytes / 4, bytes });
    messages.insert(group.rank(), object.to_vec());
    Ok(messages)
}
