//! Threads that send requests, one each.

use super::{provider::Provider, recipe::ResponseFormat, request::ModelRequest, retry::RequestFailure};
use anyhow::{Result, anyhow};
use serde_json::Value;
use std::{
    sync::{
        Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    time::{Duration, Instant, SystemTime},
};

/// A request to send.
#[derive(Debug)]
pub(super) struct Job {
    pub request: ModelRequest,
    pub format: ResponseFormat,
    /// Attempts that failed before.
    pub failures: u32,
}

/// A request that has ended.
pub(super) struct JobResult {
    pub job: Job,
    pub result: Result<Value, RequestFailure>,
    pub started: SystemTime,
    pub elapsed: Duration,
}

/// The place where requests are sent: threads, or this thread for a model of this process.
pub(super) struct Workers<'a> {
    provider: &'a dyn Provider,
    jobs: Sender<Job>,
    results: Receiver<JobResult>,
    done: Sender<JobResult>,
}

/// Runs `work` with `threads` threads that send requests.
pub(super) fn with_workers<R>(
    provider: &dyn Provider,
    threads: usize,
    work: impl FnOnce(&Workers) -> Result<R>,
) -> Result<R> {
    let (jobs, queue) = channel::<Job>();
    let (done, results) = channel();
    let queue = Mutex::new(queue);
    let threads = if provider.is_local() { 0 } else { threads };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (queue, done) = (&queue, done.clone());
            let thread = std::thread::Builder::new().stack_size(1 << 20);
            thread.spawn_scoped(scope, move || {
                loop {
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(job) = job else { break };
                    if done.send(perform(provider, job)).is_err() {
                        break;
                    }
                }
            })?;
        }
        // The threads end when the workers are dropped, which closes their queue.
        let workers = Workers { provider, jobs, results, done };
        work(&workers)
    })
}

impl Workers<'_> {
    /// Sends a request. Its result comes from [`Workers::result`].
    pub(super) fn start(&self, job: Job) -> Result<()> {
        if self.provider.is_local() {
            return self.done.send(perform(self.provider, job)).map_err(|_| anyhow!("the results are not read"));
        }
        self.jobs.send(job).map_err(|_| anyhow!("the threads that send requests have ended"))
    }

    /// Waits for the next result, at most until `deadline`.
    pub(super) fn result(&self, deadline: Instant) -> Option<JobResult> {
        self.results.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
    }
}

fn perform(provider: &dyn Provider, job: Job) -> JobResult {
    let (started, clock) = (SystemTime::now(), Instant::now());
    let result = provider.answer(&job.request, job.format);
    JobResult { job, result, started, elapsed: clock.elapsed() }
}
