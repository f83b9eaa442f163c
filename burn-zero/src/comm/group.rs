//! A group of ranks over a wire.

use super::{Communicator, Count, Operation, Traffic, Turn};
use crate::Error;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

/// How long a silent rank is waited for unless [`Group::with_deadline`] says otherwise: longer than any honest pause (another
/// rank reads data, writes a checkpoint), and an end.
pub const DEADLINE: Duration = Duration::from_secs(600);

/// What carries bytes from process to process, or thread to thread. Ranks are those of the whole world.
pub(super) trait Wire: Send + Sync {
    /// Sends and receives at once. `tag` keeps groups apart; messages between two ranks with one tag stay in order.
    fn exchange(&self, tag: u32, messages: Messages, deadline: Duration) -> Result<Vec<Vec<u8>>, Lost>;

    /// What ranks take turns at.
    fn turn(&self) -> Turn;
}

/// What one rank sends and expects in one exchange.
#[derive(Debug)]
pub(super) struct Messages {
    pub outgoing: Vec<(usize, Vec<u8>)>,
    pub incoming: Vec<usize>,
}

/// The rank that did not answer, and how long it was waited for; `None` if it is known to be gone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lost {
    pub rank: usize,
    pub waited: Option<Duration>,
}

/// A rank's place in a group.
pub struct Group {
    wire: Arc<dyn Wire>,
    /// The group's ranks by their numbers in the world.
    members: Vec<usize>,
    rank: usize,
    tag: u32,
    /// The first tag that no group of this process uses.
    next_tag: Arc<AtomicU32>,
    deadline: Duration,
    traffic: Traffic,
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {:?}", self.rank, self.members)
    }
}

impl Group {
    /// The group of the whole world.
    pub(super) fn world_of(wire: Arc<dyn Wire>, rank: usize, world: usize) -> Self {
        let members = (0..world).collect();
        let next_tag = Arc::new(AtomicU32::new(1));
        Self { wire, members, rank, tag: 0, next_tag, deadline: DEADLINE, traffic: Traffic::default() }
    }

    /// Waits at most this long for a silent rank.
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    fn lost(&self, operation: Operation, lost: Lost) -> Error {
        Error::Lost { operation: operation.name(), rank: lost.rank, waited: lost.waited }
    }
}

impl Communicator for Group {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.members.len()
    }

    fn exchange(
        &mut self,
        operation: Operation,
        outgoing: Vec<(usize, Vec<u8>)>,
        incoming: &[usize],
    ) -> Result<Vec<Vec<u8>>, Error> {
        let global = |rank: usize| {
            let world = self.members.len();
            self.members.get(rank).copied().ok_or(Error::Rank { operation: operation.name(), rank, world })
        };
        let sealed = outgoing.into_iter().map(|(to, mut message)| {
            message.push(operation as u8);
            Ok((global(to)?, message))
        });
        let outgoing = sealed.collect::<Result<_, Error>>()?;
        let incoming = incoming.iter().map(|&from| global(from)).collect::<Result<Vec<_>, _>>()?;
        let messages = Messages { outgoing, incoming: incoming.clone() };
        let mut received =
            self.wire.exchange(self.tag, messages, self.deadline).map_err(|lost| self.lost(operation, lost))?;
        for (message, &rank) in received.iter_mut().zip(&incoming) {
            if message.pop() != Some(operation as u8) {
                return Err(Error::OutOfStep { operation: operation.name(), rank });
            }
        }
        Ok(received)
    }

    fn split(&mut self, color: usize, key: usize) -> Result<Box<dyn Communicator>, Error> {
        let note = [color as u64, key as u64, u64::from(self.next_tag.load(Ordering::SeqCst))];
        let bytes: Vec<u8> = note.iter().flat_map(|number| number.to_le_bytes()).collect();
        let peers: Vec<usize> = (0..self.world()).filter(|&peer| peer != self.rank).collect();
        let outgoing = peers.iter().map(|&to| (to, bytes.clone())).collect();
        let mut notes = self.exchange(Operation::Split, outgoing, &peers)?;
        notes.insert(self.rank, bytes);
        let number = |note: &[u8], i: usize| {
            note.chunks_exact(8).nth(i).map_or(0, |b| u64::from_le_bytes(b.try_into().unwrap_or_default()))
        };
        // Every rank of the group takes the same tags from here on: two groups that share two ranks have different ones.
        let first_tag = notes.iter().map(|note| number(note, 2)).max().unwrap_or(0) as u32;
        let mut colors: Vec<u64> = notes.iter().map(|note| number(note, 0)).collect();
        colors.sort_unstable();
        colors.dedup();
        self.next_tag.store(first_tag + colors.len() as u32, Ordering::SeqCst);
        let index = colors.iter().position(|&other| other == color as u64).unwrap_or(0);
        let with_color = notes.iter().enumerate().filter(|(_, note)| number(note, 0) == color as u64);
        let mut members: Vec<(u64, usize)> = with_color.map(|(rank, note)| (number(note, 1), rank)).collect();
        members.sort_unstable();
        let rank = members.iter().position(|&(_, rank)| rank == self.rank).unwrap_or(0);
        Ok(Box::new(Self {
            wire: self.wire.clone(),
            members: members.into_iter().map(|(_, rank)| self.members[rank]).collect(),
            rank,
            tag: first_tag + index as u32,
            next_tag: self.next_tag.clone(),
            deadline: self.deadline,
            traffic: Traffic::default(),
        }))
    }

    fn traffic(&self) -> Traffic {
        self.traffic
    }

    fn count(&mut self, operation: Operation, sent: Count) {
        self.traffic.add(operation, sent);
    }

    fn turn(&self) -> Turn {
        self.wire.turn()
    }
}
