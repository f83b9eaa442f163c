//! A communicator on its own thread, so that communication overlaps computation.

use super::{Communicator, ComputeLock, Lane, Trace, Traffic};
use crate::{
    Error,
    worker::{Pending, Worker},
};
use std::sync::{Arc, Mutex, PoisonError};

/// A thread that owns a communicator and runs collectives in the order in which they are submitted. Ranks only have to
/// submit them in the same order, whatever each computes meanwhile.
pub(crate) struct AsyncCommunicator {
    worker: Worker<Box<dyn Communicator>>,
    rank: usize,
    /// The number of each rank in the whole world.
    global_ranks: Vec<usize>,
    compute_lock: ComputeLock,
    traffic: Arc<Mutex<Traffic>>,
}

impl std::fmt::Debug for AsyncCommunicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "communicator of rank {} of {}", self.rank, self.world_size())
    }
}

impl AsyncCommunicator {
    /// Starts the thread.
    ///
    /// # Panics
    /// If the system cannot start a thread.
    pub(crate) fn new(communicator: Box<dyn Communicator>) -> Self {
        Self::with_trace(communicator, Trace::default())
    }

    /// Starts the thread, which records its spans in the trace of another communicator of this rank.
    ///
    /// # Panics
    /// If the system cannot start a thread.
    pub(crate) fn with_trace(communicator: Box<dyn Communicator>, trace: Trace) -> Self {
        let (rank, compute_lock) = (communicator.rank(), communicator.compute_lock());
        let global_ranks = (0..communicator.world_size()).map(|rank| communicator.global_rank(rank)).collect();
        let traffic = Arc::new(Mutex::new(communicator.traffic()));
        let name = format!("communication of rank {rank}");
        let worker = Worker::new(name, communicator, compute_lock.clone(), trace);
        Self { worker, rank, global_ranks, compute_lock, traffic }
    }

    /// Returns this rank's number.
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// Returns the number of ranks.
    pub(crate) fn world_size(&self) -> usize {
        self.global_ranks.len()
    }

    /// Returns the number in the whole world of the rank that has number `rank` in the group.
    pub(crate) fn global_rank(&self, rank: usize) -> usize {
        self.global_ranks[rank]
    }

    /// Returns the lock that ranks of one process share, so that one of them computes at a time.
    pub(crate) fn compute_lock(&self) -> &ComputeLock {
        &self.compute_lock
    }

    /// Returns how much this rank has sent in the collectives that are complete.
    pub(crate) fn traffic(&self) -> Traffic {
        *self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the timeline of the collectives and of the waits for them.
    pub(crate) fn trace(&self) -> &Trace {
        self.worker.trace()
    }

    /// Appends a collective to the queue; `name` is its name in the trace.
    pub(crate) fn submit<R: Send + 'static>(
        &self,
        name: &'static str,
        work: impl FnOnce(&mut dyn Communicator) -> Result<R, Error> + Send + 'static,
    ) -> Pending<R> {
        let traffic = self.traffic.clone();
        // A single rank sends nothing: what remains of a collective is the transfer to the host and back.
        let lane = if self.world_size() > 1 { Lane::Communication } else { Lane::Transfer };
        self.worker.submit(name, lane, move |communicator| {
            let result = work(communicator.as_mut());
            *traffic.lock().unwrap_or_else(PoisonError::into_inner) = communicator.traffic();
            result
        })
    }
}
