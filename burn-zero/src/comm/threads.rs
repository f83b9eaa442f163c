//! Ranks as threads of one process, for tests and for debugging a run of several ranks in one debugger.

use super::{
    ComputeLock, Message, ProcessGroup,
    process_group::{LostPeer, Messages, Transport},
};
use std::{
    collections::{HashMap, VecDeque},
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
    /// Messages that have not been received yet, oldest first.
    messages: HashMap<MessageKey, VecDeque<Vec<u8>>>,
    /// Ranks that have ended.
    ended: Vec<usize>,
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

    fn receive(&self, key: MessageKey, start: Instant, deadline: Duration) -> Result<Vec<u8>, LostPeer> {
        let mut state = self.lock();
        loop {
            if let Some(message) = state.messages.get_mut(&key).and_then(VecDeque::pop_front) {
                return Ok(message);
            }
            if state.ended.contains(&key.from) {
                return Err(LostPeer { rank: key.from, waited: None });
            }
            let Some(left) = deadline.checked_sub(start.elapsed()) else {
                return Err(LostPeer { rank: key.from, waited: Some(deadline) });
            };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Transport for ThreadTransport {
    fn exchange(&self, tag: u32, messages: Messages, deadline: Duration) -> Result<Vec<Vec<u8>>, LostPeer> {
        let mut state = self.world.lock();
        for Message { to, bytes } in messages.outgoing {
            let key = MessageKey { from: self.rank, to, tag };
            state.messages.entry(key).or_default().push_back(bytes);
        }
        drop(state);
        self.world.changed.notify_all();
        let start = Instant::now();
        let receive = |&from: &usize| {
            let key = MessageKey { from, to: self.rank, tag };
            self.world.receive(key, start, deadline)
        };
        self.world.compute_lock.unlocked(|| messages.incoming.iter().map(receive).collect())
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
