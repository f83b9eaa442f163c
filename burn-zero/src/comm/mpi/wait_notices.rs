//! Notices by which a rank that has waited for long tells the others whom it waits for.

use super::{
    super::{Message, exchange::wait_chain},
    request::{ActiveReceive, ActiveSend},
};
use std::{collections::HashMap, os::raw::c_int};

/// The tag of notices; those of groups are above it.
const NOTICE_TAG: c_int = 0;
/// The content of a notice that takes the one before back; the content of others is the number of a rank.
const NOBODY: u32 = u32::MAX;

/// The notices of this rank and of the others.
pub(super) struct WaitNotices {
    rank: usize,
    part_bytes: usize,
    /// The rank that this rank waits for, as the others have been told.
    announced: Option<usize>,
    sends: Vec<ActiveSend>,
    /// The next notice of every other rank.
    receives: Vec<ActiveReceive>,
    /// The ranks that wait for another one, and for whom.
    waits: HashMap<usize, usize>,
}

impl WaitNotices {
    pub(super) fn new(rank: usize, world: usize, part_bytes: usize) -> Self {
        let receives = (0..world).filter(|&peer| peer != rank).map(ActiveReceive::new).collect();
        Self { rank, part_bytes, announced: None, sends: Vec::new(), receives, waits: HashMap::new() }
    }

    /// Exchanges notices: `awaited` is the rank that this rank has been waiting for.
    pub(super) fn update(&mut self, awaited: Option<usize>) {
        self.announce(awaited);
        if awaited.is_some() {
            self.receive();
        }
    }

    /// Receives the last notices, before MPI is finalised.
    pub(super) fn leave(mut self) {
        self.receive();
        // MPI may still read the notices of this rank.
        std::mem::forget(self);
    }

    /// Tells all other ranks whom this rank waits for, if they have not been told.
    fn announce(&mut self, awaited: Option<usize>) {
        self.sends.retain_mut(|send| !send.poll(&mut false));
        if self.announced == awaited {
            return;
        }
        self.announced = awaited;
        let bytes = awaited.map_or(NOBODY, |rank| rank as u32).to_le_bytes().to_vec();
        for to in self.receives.iter().map(|receive| receive.from) {
            let message = Message { to, bytes: bytes.clone() };
            self.sends.push(ActiveSend::post(message, NOTICE_TAG, self.part_bytes));
        }
    }

    /// Receives the notices that have arrived.
    fn receive(&mut self) {
        for receive in &mut self.receives {
            while receive.poll(NOTICE_TAG, self.part_bytes, &mut false) {
                let from = receive.from;
                let content = std::mem::replace(receive, ActiveReceive::new(from)).buffer;
                match content.try_into().map_or(NOBODY, u32::from_le_bytes) {
                    NOBODY => drop(self.waits.remove(&from)),
                    awaited => drop(self.waits.insert(from, awaited as usize)),
                }
            }
        }
    }

    /// Returns the rank that `rank` waits for, the one that this one waits for, and so on, as far as is known.
    pub(super) fn chain(&self, rank: usize) -> Vec<usize> {
        wait_chain(rank, |waiter| if waiter == self.rank { None } else { self.waits.get(&waiter).copied() })
    }
}
