//! Ranks as threads of one process, for tests and for debugging a run of several ranks in one debugger.

use super::{
    ComputeLock, Message, ProcessGroup,
    exchange::{LostPeer, Received, RunningExchange, wait_chain},
    process_group::{Messages, Transport},
};
use std::{
    collections::HashMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// The stack of a rank, in bytes: deep autodiff graphs are dropped recursively.
const STACK_BYTES: usize = 16 << 20;

/// Runs `rank` once for every rank of a world, each in its own thread, and returns the results in rank order. One rank
/// computes at a time, while communication goes on. To the other ranks, a rank that returns or panics is lost.
///
/// # Panics
/// If a rank panics.
pub fn run<R: Send>(world: usize, rank: impl Fn(ProcessGroup) -> R + Sync) -> Vec<R> {
    let shared = Arc::new(ThreadWorld {
        mailboxes: Mutex::default(),
        changed: Condvar::new(),
        compute_lock: ComputeLock::shared(),
    });
    thread::scope(|scope| {
        let spawn = |number| {
            let (rank, transport) = (&rank, ThreadTransport { world: shared.clone(), rank: number });
            let work = move || {
                let compute_lock = transport.world.compute_lock.clone();
                let group = ProcessGroup::world_group(Arc::new(transport), number, world);
                compute_lock.locked(|| rank(group))
            };
            thread::Builder::new().stack_size(STACK_BYTES).name(format!("rank {number}")).spawn_scoped(scope, work)
        };
        let threads: Vec<_> = (0..world).map(|number| spawn(number).expect("a thread can be started")).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

/// The state that all ranks share.
struct ThreadWorld {
    mailboxes: Mutex<Mailboxes>,
    changed: Condvar,
    compute_lock: ComputeLock,
}

#[derive(Default)]
struct Mailboxes {
    /// The messages by sender, receiver and tag.
    queues: HashMap<MessageKey, MessageQueue>,
    /// Ranks that have ended.
    ended: Vec<usize>,
    /// The receives that are waited for, also in vain, and since when.
    waits: HashMap<MessageKey, Instant>,
}

/// Messages with the same sender, receiver and tag, numbered in the order in which they are sent. Receives take numbers
/// in the order of their start, so a receive gets the message that has its number.
#[derive(Default)]
struct MessageQueue {
    /// The messages that have not been received yet, by number.
    messages: HashMap<u64, Vec<u8>>,
    /// The number of messages that have been sent.
    sent: u64,
    /// The number of receives that have been started.
    receives: u64,
}

/// The sender, the receiver and the tag of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct MessageKey {
    from: usize,
    to: usize,
    tag: u32,
}

/// One rank's transport. The rank counts as ended when the last group that holds its transport is dropped.
struct ThreadTransport {
    world: Arc<ThreadWorld>,
    rank: usize,
}

impl ThreadWorld {
    fn lock(&self) -> MutexGuard<'_, Mailboxes> {
        self.mailboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A receive that has been started: the message with this number.
#[derive(Debug, Clone, Copy)]
struct Ticket {
    key: MessageKey,
    number: u64,
}

/// The receives of one exchange; its messages have been sent.
struct ThreadExchange {
    world: Arc<ThreadWorld>,
    tickets: Vec<Ticket>,
    /// The messages of the first tickets.
    received: Vec<Vec<u8>>,
    deadline: Duration,
    /// The time since which the exchange has been waited for.
    waiting_since: Option<Instant>,
}

impl Mailboxes {
    fn send(&mut self, key: MessageKey, message: Vec<u8>) {
        let queue = self.queues.entry(key).or_default();
        queue.messages.insert(queue.sent, message);
        queue.sent += 1;
    }

    fn start_receive(&mut self, key: MessageKey) -> Ticket {
        let queue = self.queues.entry(key).or_default();
        queue.receives += 1;
        Ticket { key, number: queue.receives - 1 }
    }

    fn take(&mut self, Ticket { key, number }: Ticket) -> Option<Vec<u8>> {
        self.queues.get_mut(&key).and_then(|queue| queue.messages.remove(&number))
    }

    /// Returns the rank that `rank` has been waiting for the longest, if that is at least `time`.
    fn awaited_for(&self, rank: usize, time: Duration) -> Option<usize> {
        let waits = self.waits.iter().filter(|(key, since)| key.to == rank && since.elapsed() >= time);
        waits.min_by_key(|&(_, since)| since).map(|(key, _)| key.from)
    }

    fn has_arrived(&self, Ticket { key, number }: Ticket) -> bool {
        self.queues.get(&key).is_some_and(|queue| queue.messages.contains_key(&number))
    }
}

impl RunningExchange for ThreadExchange {
    fn wait_timeout(&mut self, timeout: Option<Duration>) -> Option<Received> {
        let now = Instant::now();
        let waiting_since = *self.waiting_since.get_or_insert(now);
        let world = self.world.clone();
        let mut state = world.lock();
        while let Some(&ticket) = self.tickets.get(self.received.len()) {
            let rank = ticket.key.from;
            if let Some(message) = state.take(ticket) {
                state.waits.remove(&ticket.key);
                self.received.push(message);
                continue;
            }
            if state.ended.contains(&rank) {
                return Some(Err(LostPeer { rank, waited: None, waits_for: Vec::new() }));
            }
            let Some(until_deadline) = self.deadline.checked_sub(waiting_since.elapsed()) else {
                let waits_for = wait_chain(rank, |rank| state.awaited_for(rank, self.deadline / 2));
                return Some(Err(LostPeer { rank, waited: Some(self.deadline), waits_for }));
            };
            state.waits.insert(ticket.key, waiting_since);
            let pause = match timeout {
                Some(timeout) => until_deadline.min(timeout.checked_sub(now.elapsed())?),
                None => until_deadline,
            };
            state = world.changed.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0;
        }
        Some(Ok(std::mem::take(&mut self.received)))
    }

    fn is_done(&self) -> bool {
        let state = self.world.lock();
        let missing = self.tickets[self.received.len()..].iter().find(|&&ticket| !state.has_arrived(ticket));
        missing.is_none_or(|ticket| state.ended.contains(&ticket.key.from))
    }
}

impl Transport for ThreadTransport {
    fn start(&self, tag: u32, messages: Messages, deadline: Duration) -> Box<dyn RunningExchange> {
        let mut state = self.world.lock();
        for Message { to, bytes } in messages.outgoing {
            state.send(MessageKey { from: self.rank, to, tag }, bytes);
        }
        let receive = |from| state.start_receive(MessageKey { from, to: self.rank, tag });
        let tickets = messages.incoming.into_iter().map(receive).collect();
        drop(state);
        self.world.changed.notify_all();
        let (world, received) = (self.world.clone(), Vec::new());
        Box::new(ThreadExchange { world, tickets, received, deadline, waiting_since: None })
    }

    fn compute_lock(&self) -> ComputeLock {
        self.world.compute_lock.clone()
    }
}

impl Drop for ThreadTransport {
    fn drop(&mut self) {
        self.world.lock().ended.push(self.rank);
        self.world.changed.notify_all();
    }
}
