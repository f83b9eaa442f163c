//! Work that goes on beside the thread that computes.

use crate::{
    Error,
    comm::{Lane, Trace, Turn},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, RecvError, RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

/// Says whether it went well.
type Job<S> = Box<dyn FnOnce(&mut S) -> bool + Send>;

/// A thread that owns something and works through jobs in the order in which they were submitted. After an error it gives up
/// what is left, and what it owns.
pub(crate) struct Worker<S> {
    jobs: Option<Sender<Job<S>>>,
    thread: Option<JoinHandle<()>>,
    turn: Turn,
    trace: Trace,
    /// Jobs that are not complete.
    open: Arc<AtomicUsize>,
}

/// What a job will return.
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
    /// What the job says; [`Error::Abandoned`] if an earlier one failed.
    pub fn wait(self) -> Result<R, Error> {
        let wait = || self.turn.outside(|| receive(&self.result));
        self.trace.span("wait", Lane::Wait, wait).unwrap_or(Err(Error::Abandoned))
    }
}

/// What comes. A thread of rayon's pool helps the others meanwhile: what it waits for may be divided among all of them.
fn receive<R>(result: &Receiver<R>) -> Result<R, RecvError> {
    const LOOK: Duration = Duration::from_micros(50);
    if rayon::current_thread_index().is_none() {
        return result.recv();
    }
    let mut patience = Duration::ZERO;
    loop {
        match result.recv_timeout(patience) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Disconnected) => return Err(RecvError),
            Err(RecvTimeoutError::Timeout) => {
                let helped = rayon::yield_now() == Some(rayon::Yield::Executed);
                patience = if helped { Duration::ZERO } else { LOOK };
            }
        }
    }
}

impl<S: Send + 'static> Worker<S> {
    /// Starts the thread; `turn` is what its waiters give way by, `trace` where its jobs are noted.
    ///
    /// # Panics
    /// If the system has no thread left.
    pub fn new(name: String, mut owned: S, (turn, trace): (Turn, Trace)) -> Self {
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
        Self { jobs: Some(jobs), thread, turn, trace, open: Arc::default() }
    }

    /// When jobs ran and were waited for.
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// Puts a job at the end; `name` and `lane` are its place in the trace.
    pub fn submit<R: Send + 'static>(
        &self,
        (name, lane): (&'static str, Lane),
        work: impl FnOnce(&mut S) -> Result<R, Error> + Send + 'static,
    ) -> Pending<R> {
        let (reply, result) = channel();
        let (trace, open) = (self.trace.clone(), self.open.clone());
        open.fetch_add(1, Ordering::SeqCst);
        let job: Job<S> = Box::new(move |owned| {
            let done = trace.span(name, lane, || work(owned));
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

impl<S> Drop for Worker<S> {
    fn drop(&mut self) {
        self.jobs = None;
        // After a failure jobs are left open: their end may be a deadline away, and peers learn more from this rank's own end.
        let idle = self.open.load(Ordering::SeqCst) == 0;
        if let Some(thread) = self.thread.take().filter(|_| idle) {
            let _ = self.turn.outside(|| thread.join());
        }
    }
}
