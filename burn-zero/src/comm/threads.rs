//! Ranks as threads of one process: for tests, and to see a run of several ranks in one debugger.

use super::{
    Group, Turn,
    group::{Lost, Messages, Wire},
};
use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// Deep graphs unwind recursively.
const STACK: usize = 16 << 20;

/// Runs `rank` once for every rank of a world, each in a thread of its own, and returns what they return in the order of
/// ranks. One computes at a time; communication goes on beside. A rank that returns or panics is gone for the others.
///
/// # Panics
/// If a rank panics.
pub fn run<R: Send>(world: usize, rank: impl Fn(Group) -> R + Sync) -> Vec<R> {
    let hub = Arc::new(Hub { state: Mutex::default(), changed: Condvar::new(), turn: Turn::shared() });
    thread::scope(|scope| {
        let spawn = |number| {
            let (rank, member) = (&rank, Member { hub: hub.clone(), rank: number });
            let work = move || {
                let turn = member.hub.turn.clone();
                let group = Group::world_of(Arc::new(member), number, world);
                turn.take(|| rank(group))
            };
            thread::Builder::new().stack_size(STACK).name(format!("rank {number}")).spawn_scoped(scope, work)
        };
        let threads: Vec<_> = (0..world).map(|number| spawn(number).expect("a thread can be started")).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

/// What the ranks share.
struct Hub {
    state: Mutex<State>,
    changed: Condvar,
    turn: Turn,
}

#[derive(Default)]
struct State {
    /// Messages that have not been received, by sender, receiver and tag.
    messages: HashMap<(usize, usize, u32), VecDeque<Vec<u8>>>,
    /// Ranks that have ended.
    gone: Vec<usize>,
}

/// A rank's end of the wire; the last group that holds it takes the rank along.
struct Member {
    hub: Arc<Hub>,
    rank: usize,
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn receive(&self, key: (usize, usize, u32), start: Instant, deadline: Duration) -> Result<Vec<u8>, Lost> {
        let mut state = self.lock();
        loop {
            if let Some(message) = state.messages.get_mut(&key).and_then(VecDeque::pop_front) {
                return Ok(message);
            }
            if state.gone.contains(&key.0) {
                return Err(Lost { rank: key.0, waited: None });
            }
            let Some(left) = deadline.checked_sub(start.elapsed()) else {
                return Err(Lost { rank: key.0, waited: Some(deadline) });
            };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Wire for Member {
    fn exchange(&self, tag: u32, messages: Messages, deadline: Duration) -> Result<Vec<Vec<u8>>, Lost> {
        let mut state = self.hub.lock();
        for (to, message) in messages.outgoing {
            state.messages.entry((self.rank, to, tag)).or_default().push_back(message);
        }
        drop(state);
        self.hub.changed.notify_all();
        let start = Instant::now();
        let receive = |&from: &usize| self.hub.receive((from, self.rank, tag), start, deadline);
        self.hub.turn.outside(|| messages.incoming.iter().map(receive).collect())
    }

    fn turn(&self) -> Turn {
        self.hub.turn.clone()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.hub.lock().gone.push(self.rank);
        self.hub.changed.notify_all();
    }
}
