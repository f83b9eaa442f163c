//! Ranks as threads of one process, for tests and for debugging a run of several ranks in one debugger.

use super::{
    ComputeLock, ProcessGroup,
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
    let hub = Arc::new(ThreadWorld {
        mailboxes: Mutex::default(),
        changed: Condvar::new(),
        compute_lock: ComputeLock::shared(),
    });
    thread::scope(|scope| {
        let spawn = |number| {
            let (rank, member) = (&rank, ThreadTransport { world: hub.clone(), rank: number });
            let work = move || {
                let turn = member.world.compute_lock.clone();
                let group = ProcessGroup::world_group(Arc::new(member), number, world);
                turn.locked(|| rank(group))
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
    /// Messages that have not been received yet, by sender, receiver and tag.
    messages: HashMap<(usize, usize, u32), VecDeque<Vec<u8>>>,
    /// Ranks that have ended.
    ended: Vec<usize>,
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

    fn receive(&self, key: (usize, usize, u32), start: Instant, deadline: Duration) -> Result<Vec<u8>, LostPeer> {
        let mut state = self.lock();
        loop {
            if let Some(message) = state.messages.get_mut(&key).and_then(VecDeque::pop_front) {
                return Ok(message);
            }
            if state.ended.contains(&key.0) {
                return Err(LostPeer { rank: key.0, waited: None });
            }
            let Some(left) = deadline.checked_sub(start.elapsed()) else {
                return Err(LostPeer { rank: key.0, waited: Some(deadline) });
            };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Transport for ThreadTransport {
    fn exchange(&self, tag: u32, messages: Messages, deadline: Duration) -> Result<Vec<Vec<u8>>, LostPeer> {
        let mut state = self.world.lock();
        for (to, message) in messages.outgoing {
            state.messages.entry((self.rank, to, tag)).or_default().push_back(message);
        }
        drop(state);
        self.world.changed.notify_all();
        let start = Instant::now();
        let receive = |&from: &usize| self.world.receive((from, self.rank, tag), start, deadline);
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
