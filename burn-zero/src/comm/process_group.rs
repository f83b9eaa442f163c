//! A group of ranks that are connected by a transport.

use super::{CommVolume, Communicator, ComputeLock, Message, Operation, Traffic, collective::peers};
use crate::{CommError, Error};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

/// The time after which a rank that does not answer counts as lost, unless [`ProcessGroup::with_deadline`] sets
/// another. It is longer than any ordinary pause, such as another rank that reads data or writes a checkpoint.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(600);

/// A transport of bytes between processes or threads. Ranks are numbered within the whole world.
pub(super) trait Transport: Send + Sync {
    /// Sends and receives messages at the same time. `tag` separates the groups; messages between two ranks with the
    /// same tag arrive in the order in which they were sent.
    fn exchange(&self, tag: u32, messages: Messages, deadline: Duration) -> Result<Vec<Vec<u8>>, LostPeer>;

    /// Returns the lock that ranks of one process share, so that one of them computes at a time.
    fn compute_lock(&self) -> ComputeLock;
}

/// The messages that one rank sends in one exchange, and the ranks from which it expects one.
#[derive(Debug)]
pub(super) struct Messages {
    pub outgoing: Vec<Message>,
    pub incoming: Vec<usize>,
}

/// A rank that did not answer, and how long the caller has waited for it; `None` if the rank is known to have ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct LostPeer {
    pub rank: usize,
    pub waited: Option<Duration>,
}

/// One rank's handle of a group of ranks.
pub struct ProcessGroup {
    transport: Arc<dyn Transport>,
    /// The ranks of the group, by their numbers in the world.
    members: Vec<usize>,
    rank: usize,
    tag: u32,
    /// The first tag that no group of this process uses yet.
    next_tag: Arc<AtomicU32>,
    deadline: Duration,
    traffic: Traffic,
}

impl std::fmt::Debug for ProcessGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {:?}", self.rank, self.members)
    }
}

impl ProcessGroup {
    /// Returns the group of all ranks of the world.
    pub(super) fn world_group(transport: Arc<dyn Transport>, rank: usize, world: usize) -> Self {
        let members = (0..world).collect();
        let next_tag = Arc::new(AtomicU32::new(1));
        Self { transport, members, rank, tag: 0, next_tag, deadline: DEFAULT_DEADLINE, traffic: Traffic::default() }
    }

    /// Sets how long the group waits for a rank that does not answer.
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    fn lost_error(&self, operation: Operation, lost: LostPeer) -> CommError {
        CommError::Lost { operation: operation.name(), rank: lost.rank, waited: lost.waited }
    }
}

impl Communicator for ProcessGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.members.len()
    }

    fn exchange(
        &mut self,
        operation: Operation,
        outgoing: Vec<Message>,
        incoming: &[usize],
    ) -> Result<Vec<Vec<u8>>, Error> {
        let global = |rank: usize| {
            let world = self.members.len();
            self.members.get(rank).copied().ok_or(CommError::UnknownRank { operation: operation.name(), rank, world })
        };
        let tagged = outgoing.into_iter().map(|Message { to, mut bytes }| {
            bytes.push(operation as u8);
            Ok(Message { to: global(to)?, bytes })
        });
        let outgoing = tagged.collect::<Result<_, Error>>()?;
        let incoming = incoming.iter().map(|&from| global(from)).collect::<Result<Vec<_>, _>>()?;
        let messages = Messages { outgoing, incoming: incoming.clone() };
        let mut received = self
            .transport
            .exchange(self.tag, messages, self.deadline)
            .map_err(|lost| self.lost_error(operation, lost))?;
        for (message, &rank) in received.iter_mut().zip(&incoming) {
            if message.pop() != Some(operation as u8) {
                return Err(CommError::CollectiveMismatch { operation: operation.name(), rank }.into());
            }
        }
        Ok(received)
    }

    fn split(&mut self, color: usize, key: usize) -> Result<Box<dyn Communicator>, Error> {
        let own = [color as u64, key as u64, u64::from(self.next_tag.load(Ordering::SeqCst))];
        let bytes: Vec<u8> = own.iter().flat_map(|number| number.to_le_bytes()).collect();
        let peers = peers(self);
        let outgoing = peers.iter().map(|&to| Message { to, bytes: bytes.clone() }).collect();
        let mut objects = self.exchange(Operation::Split, outgoing, &peers)?;
        objects.insert(self.rank, bytes);
        let number = |object: &[u8], i: usize| {
            object.chunks_exact(8).nth(i).map_or(0, |b| u64::from_le_bytes(b.try_into().unwrap_or_default()))
        };
        // All ranks of the group agree on the next free tag, so that two groups with two ranks in common have different
        // tags.
        let first_tag = objects.iter().map(|object| number(object, 2)).max().unwrap_or(0) as u32;
        let mut colors: Vec<u64> = objects.iter().map(|object| number(object, 0)).collect();
        colors.sort_unstable();
        colors.dedup();
        self.next_tag.store(first_tag + colors.len() as u32, Ordering::SeqCst);
        let index = colors.iter().position(|&other| other == color as u64).unwrap_or(0);
        let with_color = objects.iter().enumerate().filter(|(_, object)| number(object, 0) == color as u64);
        let mut members: Vec<(u64, usize)> = with_color.map(|(rank, object)| (number(object, 1), rank)).collect();
        members.sort_unstable();
        let rank = members.iter().position(|&(_, rank)| rank == self.rank).unwrap_or(0);
        Ok(Box::new(Self {
            transport: self.transport.clone(),
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

    fn record_sent(&mut self, operation: Operation, sent: CommVolume) {
        self.traffic.add(operation, sent);
    }

    fn compute_lock(&self) -> ComputeLock {
        self.transport.compute_lock()
    }
}
