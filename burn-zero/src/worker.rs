//! Background threads that run jobs while the compute thread goes on.

use crate::{
    CommError, Error,
    compute_lock::ComputeLock,
    trace::{Lane, Trace},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

/// A job; it returns true if it succeeded.
type Job<S> = Box<dyn FnOnce(&mut S) -> bool + Send>;

/// A thread that owns a value and runs jobs on it in the order in which they are submitted. After a failed job it drops
/// the remaining jobs and the value.
pub(crate) struct Worker<S> {
    jobs: Option<Sender<Job<S>>>,
    thread: Option<JoinHandle<()>>,
    compute_lock: ComputeLock,
    trace: Trace,
    /// The number of jobs that have not completed.
    unfinished: Arc<AtomicUsize>,
}

/// The result of a job that may still be running.
#[derive(Debug)]
pub(crate) struct Pending<R> {
    result: Receiver<Result<R, Error>>,
    compute_lock: ComputeLock,
    trace: Trace,
}

impl<R> Pending<R> {
    /// Waits for the job and returns its result.
    ///
    /// # Errors
    /// The error of the job; [`CommError::Aborted`] if an earlier job failed.
    pub(crate) fn wait(self) -> Result<R, Error> {
        let receive = |timeout| match timeout {
            None => Some(self.result.recv().ok()),
            Some(timeout) => match self.result.recv_timeout(timeout) {
                Ok(result) => Some(Some(result)),
                Err(RecvTimeoutError::Disconnected) => Some(None),
                Err(RecvTimeoutError::Timeout) => None,
            },
        };
        let wait = || self.compute_lock.unlocked(|| wait_while_helping(receive));
        self.trace.span("wait", Lane::Wait, wait).unwrap_or(Err(CommError::Aborted.into()))
    }
}

/// Waits for a result. `receive` waits for it for a given time, or without an end, and returns `None` if that time is
/// over. A thread of rayon's pool runs other jobs of the pool in between, because the result may depend on jobs that
/// need all threads of the pool.
pub(crate) fn wait_while_helping<R>(mut receive: impl FnMut(Option<Duration>) -> Option<R>) -> R {
    const POLL_INTERVAL: Duration = Duration::from_micros(50);
    let in_pool = rayon::current_thread_index().is_some();
    let mut timeout = in_pool.then_some(Duration::ZERO);
    loop {
        if let Some(result) = receive(timeout) {
            return result;
        }
        if in_pool {
            let executed = rayon::yield_now() == Some(rayon::Yield::Executed);
            timeout = Some(if executed { Duration::ZERO } else { POLL_INTERVAL });
        }
    }
}

impl<S: Send + 'static> Worker<S> {
    /// Starts the thread. Those who wait for a job release the compute lock; the trace records the jobs.
    ///
    /// # Panics
    /// If the system cannot start a thread.
    pub(crate) fn new(name: String, mut owned: S, compute_lock: ComputeLock, trace: Trace) -> Self {
        let (jobs, waiting) = channel::<Job<S>>();
        let work = move || {
            for job in waiting {
                if !job(&mut owned) {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name(name).spawn(work);
        let thread = Some(thread.expect("a thread can be started"));
        Self { jobs: Some(jobs), thread, compute_lock, trace, unfinished: Arc::default() }
    }

    /// Returns the timeline of the jobs and of the waits for them.
    pub(crate) fn trace(&self) -> &Trace {
        &self.trace
    }

    /// Appends a job to the queue; `name` and `lane` are its name and its lane in the trace.
    pub(crate) fn submit<R: Send + 'static>(
        &self,
        name: &'static str,
        lane: Lane,
        work: impl FnOnce(&mut S) -> Result<R, Error> + Send + 'static,
    ) -> Pending<R> {
        let (reply, result) = channel();
        let (trace, unfinished) = (self.trace.clone(), self.unfinished.clone());
        unfinished.fetch_add(1, Ordering::SeqCst);
        let job: Job<S> = Box::new(move |owned| {
            let result = trace.span(name, lane, || work(owned));
            let succeeded = result.is_ok();
            unfinished.fetch_sub(1, Ordering::SeqCst);
            // Nobody receives the result if the engine has failed in the meantime.
            let _ = reply.send(result);
            succeeded
        });
        if let Some(jobs) = &self.jobs {
            // If the thread has ended, the job is dropped, and waiting for it returns an error.
            let _ = jobs.send(job);
        }
        Pending { result, compute_lock: self.compute_lock.clone(), trace: self.trace.clone() }
    }
}

impl<S> Drop for Worker<S> {
    fn drop(&mut self) {
        self.jobs = None;
        // After a failure the thread is not joined: a job may run until its deadline, and the peers learn of the
        // failure sooner when this rank ends.
        let idle = self.unfinished.load(Ordering::SeqCst) == 0;
        if let Some(thread) = self.thread.take().filter(|_| idle) {
            let _ = self.compute_lock.unlocked(|| thread.join());
        }
    }
}
