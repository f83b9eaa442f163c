//! A communicator at work beside the thread that computes.

use super::{Communicator, Lane, Trace, Traffic, Turn};
use crate::{
    Error,
    worker::{Pending, Worker},
};
use std::sync::{Arc, Mutex, PoisonError};

/// A thread that owns a communicator and works through collectives in the order in which they were submitted. Ranks that
/// submit in the same order agree, whatever each computes meanwhile.
pub struct Queue {
    worker: Worker<Box<dyn Communicator>>,
    rank: usize,
    world: usize,
    turn: Turn,
    traffic: Arc<Mutex<Traffic>>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "queue of rank {} of {}", self.rank, self.world)
    }
}

impl Queue {
    /// Starts the thread.
    ///
    /// # Panics
    /// If the system has no thread left.
    pub fn new(communicator: Box<dyn Communicator>) -> Self {
        let (rank, world, turn) = (communicator.rank(), communicator.world(), communicator.turn());
        let traffic = Arc::new(Mutex::new(communicator.traffic()));
        let name = format!("communication of rank {rank}");
        let worker = Worker::new(name, communicator, (turn.clone(), Trace::default()));
        Self { worker, rank, world, turn, traffic }
    }

    /// This rank's number.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    pub fn world(&self) -> usize {
        self.world
    }

    /// What ranks take turns at, if they share a process.
    pub fn turn(&self) -> &Turn {
        &self.turn
    }

    /// What this rank has sent in the collectives that are complete.
    pub fn traffic(&self) -> Traffic {
        *self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When collectives ran and were waited for.
    pub fn trace(&self) -> &Trace {
        self.worker.trace()
    }

    /// Puts a collective at the end of the queue; `name` is its name in the trace.
    pub fn submit<R: Send + 'static>(
        &self,
        name: &'static str,
        work: impl FnOnce(&mut dyn Communicator) -> Result<R, Error> + Send + 'static,
    ) -> Pending<R> {
        let traffic = self.traffic.clone();
        // Alone nothing is sent: what is left of a collective is the way to the host and back.
        let lane = if self.world > 1 { Lane::Communication } else { Lane::Transfer };
        self.worker.submit((name, lane), move |communicator| {
            let done = work(communicator.as_mut());
            *traffic.lock().unwrap_or_else(PoisonError::into_inner) = communicator.traffic();
            done
        })
    }
}
