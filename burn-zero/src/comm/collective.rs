//! The collectives, over any communicator.

use super::{
    Communicator, Count, Element, Operation,
    element::{add_message, add_values},
};
use crate::Error;
use std::ops::Range;

/// The collectives of a group. Every rank must call the same ones in the same order. `T` is f32, f16 or bf16.
///
/// # Errors
/// All of them give [`Error::Length`] if buffers do not fit each other or the peers', [`Error::Rank`] for a rank that does not
/// exist, [`Error::Lost`] if a rank is gone or silent past the deadline, and [`Error::OutOfStep`] if one is in another
/// collective.
pub trait Collectives: Communicator {
    /// Before: every rank holds `n` values. After: every rank holds their element-wise sum, taken in the order of ranks.
    fn all_reduce<T: Element>(&mut self, buffer: &mut [T]) -> Result<(), Error> {
        let (operation, n, world, rank) = (Operation::AllReduce, buffer.len(), self.world(), self.rank());
        let part = |rank: usize| rank * n / world..(rank + 1) * n / world;
        let mine = part(rank);
        let mut sum = vec![0.0; mine.len()];
        scatter_sum(self, operation, (buffer, &mut sum, false), part)?;
        buffer[mine.clone()].iter_mut().zip(sum).for_each(|(value, sum)| *value = T::from_f32(sum));
        for portion in portions(n.div_ceil(world), T::SIZE) {
            let own = message(&buffer[within(&mine, &portion)]);
            for (peer, message) in share_parts(self, operation, (&own, T::SIZE))? {
                let values = &mut buffer[within(&part(peer), &portion)];
                same_length(operation, values.len() * T::SIZE, message.len(), T::SIZE)?;
                T::read(&message, values);
            }
        }
        Ok(())
    }

    /// Before: every rank holds `world · n` values. After: rank `i` holds in `shard` the sum of everyone's `i`-th `n` values,
    /// taken in the order of ranks.
    fn reduce_scatter<T: Element>(&mut self, buffer: &[T], shard: &mut [T]) -> Result<(), Error> {
        let (n, operation) = (shard.len(), Operation::ReduceScatter);
        same_length(operation, n * self.world(), buffer.len(), 1)?;
        let mut sum = vec![0.0; n];
        scatter_sum(self, operation, (buffer, &mut sum, false), |rank| rank * n..(rank + 1) * n)?;
        shard.iter_mut().zip(sum).for_each(|(value, sum)| *value = T::from_f32(sum));
        Ok(())
    }

    /// As [`Collectives::reduce_scatter`], but `shard` keeps what it holds and the ranks' values are added to it one by one.
    fn reduce_scatter_onto<T: Element>(&mut self, buffer: &[T], shard: &mut [f32]) -> Result<(), Error> {
        let n = shard.len();
        same_length(Operation::ReduceScatter, n * self.world(), buffer.len(), 1)?;
        scatter_sum(self, Operation::ReduceScatter, (buffer, shard, true), |rank| rank * n..(rank + 1) * n)
    }

    /// Before: every rank holds `n` values in `shard`. After: every rank holds all `world · n` values in the order of ranks.
    fn all_gather<T: Element>(&mut self, shard: &[T], buffer: &mut [T]) -> Result<(), Error> {
        same_length(Operation::AllGather, shard.len() * self.world(), buffer.len(), 1)?;
        T::read(&self.all_gather_bytes(&message(shard), T::SIZE)?, buffer);
        Ok(())
    }

    /// [`Collectives::all_gather`] of values of `size` bytes that no one looks at.
    fn all_gather_bytes(&mut self, shard: &[u8], size: usize) -> Result<Vec<u8>, Error> {
        let (operation, n, rank) = (Operation::AllGather, shard.len(), self.rank());
        let mut all = vec![0; n * self.world()];
        all[rank * n..(rank + 1) * n].copy_from_slice(shard);
        for portion in portions(n, 1) {
            for (peer, message) in share_parts(self, operation, (&shard[portion.clone()], size))? {
                same_length(operation, portion.len(), message.len(), size)?;
                all[peer * n..][portion.clone()].copy_from_slice(&message);
            }
        }
        Ok(all)
    }

    /// Before: `root` holds `n` values. After: every rank holds them.
    fn broadcast<T: Element>(&mut self, buffer: &mut [T], root: usize) -> Result<(), Error> {
        let operation = Operation::Broadcast;
        exists(self, operation, root)?;
        if self.rank() == root {
            share_parts_with(self, operation, (&message(buffer), T::SIZE), &[])?;
            return Ok(());
        }
        let message = self.exchange(operation, Vec::new(), &[root])?.remove(0);
        same_length(operation, buffer.len() * T::SIZE, message.len(), T::SIZE)?;
        T::read(&message, buffer);
        Ok(())
    }

    /// Sends `buffer` to rank `to`, which must receive it.
    fn send<T: Element>(&mut self, buffer: &[T], to: usize) -> Result<(), Error> {
        peer(self, to)?;
        let message = message(buffer);
        let sent = Count { elements: buffer.len() as u64, bytes: message.len() as u64 };
        self.exchange(Operation::Send, vec![(to, message)], &[])?;
        self.count(Operation::Send, sent);
        Ok(())
    }

    /// Receives what rank `from` sends.
    fn recv<T: Element>(&mut self, buffer: &mut [T], from: usize) -> Result<(), Error> {
        peer(self, from)?;
        let message = self.exchange(Operation::Send, Vec::new(), &[from])?.remove(0);
        same_length(Operation::Send, buffer.len() * T::SIZE, message.len(), T::SIZE)?;
        T::read(&message, buffer);
        Ok(())
    }

    /// Returns when every rank has called it.
    fn barrier(&mut self) -> Result<(), Error> {
        notes(self, Operation::Barrier, &[]).map(|_| ())
    }

    /// Before: every rank holds a note of any length. After: every rank holds all of them in the order of ranks. For scalars
    /// and flags: what is sent counts apart from the buffers.
    fn share(&mut self, note: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        notes(self, Operation::Share, note)
    }
}

impl<C: Communicator + ?Sized> Collectives for C {}

/// The bytes of values, with room for one more: the operation goes last.
fn message<T: Element>(values: &[T]) -> Vec<u8> {
    let mut message = Vec::with_capacity(values.len() * T::SIZE + 1);
    T::write(values, &mut message);
    message
}

fn copy(bytes: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(bytes.len() + 1);
    message.extend_from_slice(bytes);
    message
}

fn peers<C: Communicator + ?Sized>(group: &C) -> Vec<usize> {
    (0..group.world()).filter(|&peer| peer != group.rank()).collect()
}

fn same_length(operation: Operation, expected: usize, found: usize, unit: usize) -> Result<(), Error> {
    if expected == found {
        return Ok(());
    }
    Err(Error::Length { operation: operation.name(), expected: expected / unit, found: found / unit })
}

fn exists<C: Communicator + ?Sized>(group: &C, operation: Operation, rank: usize) -> Result<(), Error> {
    if rank < group.world() {
        return Ok(());
    }
    Err(Error::Rank { operation: operation.name(), rank, world: group.world() })
}

fn peer<C: Communicator + ?Sized>(group: &C, rank: usize) -> Result<(), Error> {
    if rank == group.rank() {
        return Err(Error::Rank { operation: "send to itself", rank, world: group.world() });
    }
    exists(group, Operation::Send, rank)
}

/// Bytes of a message at most: what collectives hold besides their buffers is one for each peer, out and in.
const MESSAGE: usize = 1 << 20;

/// `n` values of a size, a message at a time; one that is empty if there are none.
fn portions(n: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    let most = MESSAGE / size;
    (0..n.div_ceil(most).max(1)).map(move |i| i * most..n.min((i + 1) * most))
}

/// A portion of a part, counted from the part's start.
fn within(part: &Range<usize>, portion: &Range<usize>) -> Range<usize> {
    let place = |at: usize| part.end.min(part.start + at);
    place(portion.start)..place(portion.end)
}

/// Sends everyone its part of `buffer` and sums the parts that are this rank's, in the order of ranks: onto what `sum` holds
/// if `onto`, else from rank 0's values on.
fn scatter_sum<C: Communicator + ?Sized, T: Element>(
    group: &mut C,
    operation: Operation,
    (buffer, sum, onto): (&[T], &mut [f32], bool),
    part: impl Fn(usize) -> Range<usize>,
) -> Result<(), Error> {
    let (rank, world, peers) = (group.rank(), group.world(), peers(group));
    if !onto {
        // Adding to -0 keeps the sign of a zero: the sum starts as rank 0's values.
        sum.fill(-0.0);
    }
    for portion in portions(buffer.len().div_ceil(world), T::SIZE) {
        let values = |rank: usize| &buffer[within(&part(rank), &portion)];
        let outgoing: Vec<_> = peers.iter().map(|&to| (to, message(values(to)))).collect();
        let sent = count(&outgoing, T::SIZE);
        let mut messages = group.exchange(operation, outgoing, &peers)?.into_iter();
        group.count(operation, sent);
        let place = within(&(0..sum.len()), &portion);
        let sum = &mut sum[place];
        for from in 0..world {
            if from == rank {
                add_values(sum, values(rank));
            } else {
                let message = messages.next().unwrap_or_default();
                same_length(operation, sum.len() * T::SIZE, message.len(), T::SIZE)?;
                add_message::<T>(sum, &message);
            }
        }
    }
    Ok(())
}

fn count(outgoing: &[(usize, Vec<u8>)], size: usize) -> Count {
    let bytes: u64 = outgoing.iter().map(|(_, message)| message.len() as u64).sum();
    Count { elements: bytes / size as u64, bytes }
}

/// Sends values of a size to everyone and returns everyone's message, by rank.
fn share_parts<C: Communicator + ?Sized>(
    group: &mut C,
    operation: Operation,
    values: (&[u8], usize),
) -> Result<impl Iterator<Item = (usize, Vec<u8>)> + use<C>, Error> {
    let peers = peers(group);
    let messages = share_parts_with(group, operation, values, &peers)?;
    Ok(peers.into_iter().zip(messages))
}

/// Sends values of a size to everyone and returns the messages of `incoming`.
fn share_parts_with<C: Communicator + ?Sized>(
    group: &mut C,
    operation: Operation,
    (values, size): (&[u8], usize),
    incoming: &[usize],
) -> Result<Vec<Vec<u8>>, Error> {
    let outgoing: Vec<_> = peers(group).into_iter().map(|to| (to, copy(values))).collect();
    let sent = count(&outgoing, size);
    let messages = group.exchange(operation, outgoing, incoming)?;
    group.count(operation, sent);
    Ok(messages)
}

fn notes<C: Communicator + ?Sized>(group: &mut C, operation: Operation, note: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
    let peers = peers(group);
    let outgoing: Vec<_> = peers.iter().map(|&to| (to, note.to_vec())).collect();
    let bytes = (note.len() * outgoing.len()) as u64;
    let mut messages = group.exchange(operation, outgoing, &peers)?;
    // Notes have no element type: they count in f32.
    group.count(operation, Count { elements: bytes / 4, bytes });
    messages.insert(group.rank(), note.to_vec());
    Ok(messages)
}
