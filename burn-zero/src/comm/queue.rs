//! A communicator at work beside the thread that computes.

use super::{Communicator, Lane, Trace, Traffic, Turn};
use crate::Error;
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
};

/// Says whether it went well.
type Job = Box<dyn FnOnce(&mut dyn Communicator) -> bool + Send>;

/// A thread that owns a communicator and works through collectives in the order in which they were submitted. Ranks that
/// submit in the same order agree, whatever each computes meanwhile.
pub struct Queue {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    rank: usize,
    world: usize,
    turn: Turn,
    traffic: Arc<Mutex<Traffic>>,
    trace: Trace,
    /// Collectives that are not complete.
    open: Arc<AtomicUsize>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "queue of rank {} of {}", self.rank, self.world)
    }
}

/// What a collective will return.
#[derive(Debug)]
pub struct Pending<R> {
    result: Receiver<Result<R, Error>>,
    turn: Turn,
    trace: Trace,
}

impl<R> Pending<R> {
    /// Waits for it.
    ///
    /// # Errors
    /// What the collective says; [`Error::Abandoned`] if an earlier one failed.
    pub fn wait(self) -> Result<R, Error> {
        let wait = || self.turn.outside(|| self.result.recv());
        self.trace.span("wait", Lane::Wait, wait).unwrap_or(Err(Error::Abandoned))
    }
}

impl Queue {
    /// Starts the thread.
    ///
    /// # Panics
    /// If the system has no thread left.
    pub fn new(mut communicator: Box<dyn Communicator>) -> Self {
        let (rank, world, turn) = (communicator.rank(), communicator.world(), communicator.turn());
        let traffic = Arc::new(Mutex::new(communicator.traffic()));
        let (jobs, waiting) = channel::<Job>();
        let work = move || {
            // After an error the ranks are no longer in step: what is left is given up, and so is this rank's place.
            for job in waiting {
                if !job(communicator.as_mut()) {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name(format!("communication of rank {rank}")).spawn(work);
        let thread = Some(thread.expect("a thread can be started"));
        Self { jobs: Some(jobs), thread, rank, world, turn, traffic, trace: Trace::default(), open: Arc::default() }
    }

    /// This rank's number.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    pub fn world(&self) -> usize {
        self.world
    }

    /// What this rank has sent in the collectives that are complete.
    pub fn traffic(&self) -> Traffic {
        *self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When collectives ran and were waited for.
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// Puts a collective at the end of the queue; `name` is its name in the trace.
    pub fn submit<R: Send + 'static>(
        &self,
        name: &'static str,
        work: impl FnOnce(&mut dyn Communicator) -> Result<R, Error> + Send + 'static,
    ) -> Pending<R> {
        let (reply, result) = channel();
        let (traffic, trace, open) = (self.traffic.clone(), self.trace.clone(), self.open.clone());
        open.fetch_add(1, Ordering::SeqCst);
        let job: Job = Box::new(move |communicator| {
            let done = trace.span(name, Lane::Communication, || work(communicator));
            *traffic.lock().unwrap_or_else(PoisonError::into_inner) = communicator.traffic();
            let well = done.is_ok();
            open.fetch_sub(1, Ordering::SeqCst);
            // No one waits if the engine has failed meanwhile.
            let _ = reply.send(done);
            well
        });
        if let Some(jobs) = &self.jobs {
            // A thread that has ended drops the job, and waiting for it says so.
            let _ = jobs.send(job);
        }
        Pending { result, turn: self.turn.clone(), trace: self.trace.clone() }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.jobs = None;
        // A rank that has failed leaves collectives open: their end may be a deadline away, and its peers learn more from its
        // own end.
        let idle = self.open.load(Ordering::SeqCst) == 0;
        if let Some(thread) = self.thread.take().filter(|_| idle) {
            let _ = self.turn.outside(|| thread.join());
        }
    }
}
