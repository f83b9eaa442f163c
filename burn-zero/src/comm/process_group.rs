//! A group of ranks that are connected by a transport.

use super::{
    CommVolume, Communicator, ComputeLock, Exchange, Message, Operation, Traffic, collective::peers,
    exchange::RunningExchange,
};
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

/// Every group has a tag for messages that describe themselves, so that receives of them can be open while collectives
/// run, and a tag for everything else.
const TAGS_PER_GROUP: u32 = 2;

/// A transport of bytes between processes or threads. Ranks are numbered within the whole world.
pub(super) trait Transport: Send + Sync {
    /// Starts to send and receive messages. `tag` separates the groups; exchanges between two ranks with the same tag
    /// match in the order of their start.
    fn start(&self, tag: u32, messages: Messages, deadline: Duration) -> Box<dyn RunningExchange>;

    /// Returns the lock that ranks of one process share, so that one of them computes at a time.
    fn compute_lock(&self) -> ComputeLock;
}

/// The messages that one rank sends in one exchange, and the ranks from which it expects one.
#[derive(Debug)]
pub(super) struct Messages {
    pub outgoing: Vec<Message>,
    pub incoming: Vec<usize>,
}

/// One rank's handle of a group of ranks.
pub struct ProcessGroup {
    transport: Arc<dyn Transport>,
    /// The ranks of the group, by their numbers in the world.
    members: Vec<usize>,
    rank: usize,
    /// The first of the group's [`TAGS_PER_GROUP`] tags.
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
        let next_tag = Arc::new(AtomicU32::new(TAGS_PER_GROUP));
        Self { transport, members, rank, tag: 0, next_tag, deadline: DEFAULT_DEADLINE, traffic: Traffic::default() }
    }

    /// Sets how long the group waits for a rank that does not answer.
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }
}

impl Communicator for ProcessGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.members.len()
    }

    fn global_rank(&self, rank: usize) -> usize {
        self.members[rank]
    }

    fn start(&mut self, operation: Operation, outgoing: Vec<Message>, incoming: &[usize]) -> Result<Exchange, Error> {
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
        let tag = self.tag + u32::from(operation == Operation::SendObject);
        let running = self.transport.start(tag, messages, self.deadline);
        Ok(Exchange::running(operation, running, incoming, self.compute_lock()))
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
        self.next_tag.store(first_tag + TAGS_PER_GROUP * colors.len() as u32, Ordering::SeqCst);
        let index = colors.iter().position(|&other| other == color as u64).unwrap_or(0);
        let with_color = objects.iter().enumerate().filter(|(_, object)| number(object, 0) == color as u64);
        let mut members: Vec<(u64, usize)> = with_color.map(|(rank, object)| (number(object, 1), rank)).collect();
        members.sort_unstable();
        let rank = members.iter().position(|&(_, rank)| rank == self.rank).unwrap_or(0);
        Ok(Box::new(Self {
            transport: self.transport.clone(),
            members: members.into_iter().map(|(_, rank)| self.members[rank]).collect(),
            rank,
            tag: first_tag + TAGS_PER_GROUP * index as u32,
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
