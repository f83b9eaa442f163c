//! The engine: sends the requests of a method within the budget, journals the answers, and hands the finished items to
//! the output.
//!
//! ```text
//! items ─► journal? ─ yes ─► next step, or rows ─► output, in the order of the items
//!             │ no
//!             └─► budget reserved ─► workers ─► answer: journal, budget settled ─► next step
//!                                          └──► failure: again later, given up, or the run stops
//! ```
//!
//! Everything that decides about rows is a function of the journal, so the file does not depend on the order in which
//! answers arrive.

use super::{
    answer::{ModelAnswer, TokenUsage},
    budget::Budget,
    draft::ItemResult,
    flow::Flow,
    items::{Advance, ItemState},
    journal::{Journal, JournalEntry, RequestEnd},
    method::Method,
    output::RowsOutput,
    provider::Provider,
    recipe::{GenerateRecipe, ResponseFormat},
    request::ModelRequest,
    retry::{Consequence, LONGEST_WAIT, RequestFailure, backoff},
    workers::{Job, JobResult, Workers, with_workers},
};
use anyhow::Result;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant, UNIX_EPOCH},
};

/// Items that may be under way for each request in flight.
const ITEMS_PER_REQUEST: u64 = 4;
/// Attempts to reach a server that has never answered.
const FIRST_ATTEMPTS: u32 = 3;

/// The reason why a run ends before its work is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum StopReason {
    /// The next request would exceed this limit of the budget.
    Budget(&'static str),
    /// Requests fail, for this reason.
    Failure(String),
}

/// A generation under way.
pub(super) struct Engine<'a> {
    pub method: &'a dyn Method,
    pub recipe: &'a GenerateRecipe,
    pub journal: Journal,
    pub budget: Budget,
    pub output: RowsOutput,
    pub format: ResponseFormat,
    pub queue: ItemQueue,
    pub stop: Option<StopReason>,
}

/// The items under way, and their requests that can be sent.
#[derive(Default)]
pub(super) struct ItemQueue {
    items: BTreeMap<u64, ItemState>,
    ready: BTreeMap<u64, Job>,
    /// Requests that are sent again, and when.
    delayed: Vec<(Instant, Job)>,
    /// The first item that has not begun.
    next: u64,
}

impl ItemQueue {
    /// Takes the first request that is due.
    fn take(&mut self) -> Option<Job> {
        let now = Instant::now();
        let due = self.delayed.iter().enumerate().filter(|(_, (due, _))| *due <= now);
        match due.min_by_key(|(_, (due, _))| *due).map(|(index, _)| index) {
            Some(index) => Some(self.delayed.swap_remove(index).1),
            None => self.ready.pop_first().map(|(_, job)| job),
        }
    }
}

impl Engine<'_> {
    /// Sends requests until the rows are there, the items or the budget are used up, or requests fail.
    ///
    /// # Errors
    /// If a file cannot be written. Failed requests are a reason to stop, not an error.
    pub(super) fn run(&mut self, provider: &dyn Provider, concurrency: usize) -> Result<()> {
        let concurrency = if provider.is_local() { 1 } else { concurrency };
        let mut flow = Flow::new(concurrency);
        let done = with_workers(provider, concurrency, |workers| {
            loop {
                self.start_requests(workers, provider, &mut flow, concurrency)?;
                let waiting = self.stop.is_none() && !self.output.is_complete() && !self.queue.delayed.is_empty();
                if flow.in_flight == 0 && !waiting {
                    return Ok(());
                }
                if let Some(result) = workers.result(self.wake(&flow)) {
                    flow.in_flight -= 1;
                    self.settle(result, provider, &mut flow)?;
                }
                self.output.show_progress(&self.budget.describe());
            }
        });
        self.journal.sync()?;
        done
    }

    /// Works off what the journal knows, up to the item `end`, and returns the requests that are missing.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub(super) fn replay(&mut self, end: u64) -> Result<Vec<ModelRequest>> {
        let mut open = Vec::new();
        let end = self.method.num_items().map_or(end, |items| items.min(end));
        for item in 0..end {
            if self.output.is_complete() {
                break;
            }
            match ItemState::default().advance(item, self.method, self.recipe, &self.journal) {
                Advance::Finished(result) => self.output.push(item, result)?,
                Advance::Wants(request) => {
                    self.output.push(item, ItemResult::default())?;
                    open.push(request);
                }
            }
        }
        Ok(open)
    }

    /// The time at which there is something to do even if no result comes.
    fn wake(&self, flow: &Flow) -> Instant {
        let due = self.queue.delayed.iter().map(|(due, _)| *due).min();
        let latest = Instant::now() + Duration::from_secs(1);
        let pause = flow.pause().filter(|pause| *pause > Instant::now());
        [due.max(pause), pause].into_iter().flatten().fold(latest, Instant::min)
    }

    fn start_requests(
        &mut self,
        workers: &Workers,
        provider: &dyn Provider,
        flow: &mut Flow,
        concurrency: usize,
    ) -> Result<()> {
        while self.stop.is_none() && !self.output.is_complete() && flow.is_open() {
            let Some(job) = self.next_job(concurrency as u64 * ITEMS_PER_REQUEST)? else { break };
            let reserved = reservation(&job.request, provider);
            if let Some(limit) = self.budget.refuses(&job.request.key, reserved) {
                // Requests in flight may cost less than was reserved for them.
                if flow.in_flight == 0 {
                    self.stop = Some(StopReason::Budget(limit));
                }
                self.queue.ready.insert(job.request.place.item, job);
                break;
            }
            let (i, key) = (job.request.place.item, job.request.key.clone());
            self.record(JournalEntry::Sent { i, key, reserved })?;
            flow.in_flight += 1;
            workers.start(Job { format: self.format, ..job })?;
        }
        Ok(())
    }

    /// Returns the next request, of an item under way or of a new one.
    fn next_job(&mut self, window: u64) -> Result<Option<Job>> {
        loop {
            if let Some(job) = self.queue.take() {
                return Ok(Some(job));
            }
            let item = self.queue.next;
            let ended = self.method.num_items().is_some_and(|items| item >= items);
            if ended || self.output.is_complete() || item >= self.output.next_item() + window {
                return Ok(None);
            }
            if let Some(reason) = self.output.is_barren().filter(|_| self.method.num_items().is_none()) {
                self.stop = Some(StopReason::Failure(reason));
                return Ok(None);
            }
            self.queue.next += 1;
            self.queue.items.insert(item, ItemState::default());
            self.advance(item)?;
        }
    }

    /// Takes an item further, to its next request or into the output.
    fn advance(&mut self, item: u64) -> Result<()> {
        let Some(state) = self.queue.items.get_mut(&item) else { return Ok(()) };
        match state.advance(item, self.method, self.recipe, &self.journal) {
            Advance::Wants(request) => {
                self.queue.ready.insert(item, Job { request, format: self.format, failures: 0 });
                Ok(())
            }
            Advance::Finished(result) => {
                self.queue.items.remove(&item);
                self.output.push(item, result)
            }
        }
    }

    /// Counts and journals an entry.
    pub(super) fn record(&mut self, entry: JournalEntry) -> Result<()> {
        self.budget.record(&entry);
        self.journal.append(entry)
    }

    /// Journals the end of a request and does what follows from it.
    fn settle(&mut self, result: JobResult, provider: &dyn Provider, flow: &mut Flow) -> Result<()> {
        let JobResult { job, result, started, elapsed } = result;
        let mut end = RequestEnd {
            i: job.request.place.item,
            key: job.request.key.clone(),
            attempt: job.failures,
            status: Some(200),
            body: None,
            error: None,
            usage: TokenUsage::default(),
            started: started.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64),
            ms: elapsed.as_millis() as u64,
        };
        match result {
            Ok(body) => {
                end.usage = self.usage(&body, &job.request, provider);
                end.body = Some(body);
                self.record(JournalEntry::End(Box::new(end)))?;
                flow.answered();
                self.advance(job.request.place.item)
            }
            Err(failure) => {
                if failure.may_be_billed {
                    end.usage = reservation(&job.request, provider);
                    self.output.counts.unknown_usage += 1;
                }
                (end.status, end.error) = (failure.status, Some(failure.message.clone()));
                self.record(JournalEntry::End(Box::new(end)))?;
                self.fail(job, failure, flow)
            }
        }
    }

    /// Returns the tokens that an answer has taken; where the server does not say so, they are estimated and counted.
    fn usage(&mut self, body: &Value, request: &ModelRequest, provider: &dyn Provider) -> TokenUsage {
        TokenUsage::of(body).unwrap_or_else(|| {
            self.output.counts.unknown_usage += 1;
            let text = ModelAnswer::read(body, "").map(|answer| answer.text).unwrap_or_default();
            let (prompt_tokens, completion_tokens) = (provider.prompt_tokens(request), provider.answer_tokens(&text));
            TokenUsage { prompt_tokens, completion_tokens, cached_tokens: 0 }
        })
    }

    fn fail(&mut self, job: Job, failure: RequestFailure, flow: &mut Flow) -> Result<()> {
        let item = job.request.place.item;
        if failure.format_refused && job.request.has_schema() && job.format != ResponseFormat::None {
            self.fall_back(job.format)?;
            self.queue.ready.insert(item, job);
            return Ok(());
        }
        let failures = job.failures + 1;
        let unreachable = failure.status.is_none() && !failure.may_be_billed && !flow.has_answered();
        let wait = failure.wait.unwrap_or_else(|| backoff(failures, &job.request.key));
        match failure.consequence {
            Consequence::Stop => {
                let wait = failure.wait.filter(|wait| *wait > LONGEST_WAIT);
                let wait = wait.map(|wait| format!("; it asks to wait {} s, so go on later", wait.as_secs()));
                self.stop = Some(StopReason::Failure(failure.describe() + &wait.unwrap_or_default()));
            }
            Consequence::Retry | Consequence::RetrySlower if unreachable && failures >= FIRST_ATTEMPTS => {
                self.stop = Some(StopReason::Failure(failure.describe()));
            }
            Consequence::Retry | Consequence::RetrySlower if failures < self.recipe.api.max_attempts => {
                if failure.consequence == Consequence::RetrySlower {
                    flow.slow_down(wait);
                }
                self.output.counts.retries += 1;
                self.queue.delayed.push((Instant::now() + wait, Job { failures, ..job }));
            }
            _ => {
                self.queue.items.remove(&item);
                let message = failure.describe();
                self.output.counts.failed += 1;
                self.output.push(item, ItemResult::rejected("request failed", message.clone()))?;
                if let Some(message) = flow.gave_up(message) {
                    self.stop = Some(StopReason::Failure(message));
                }
            }
        }
        Ok(())
    }

    /// Asks for less structure from here on, and says so once.
    fn fall_back(&mut self, refused: ResponseFormat) -> Result<()> {
        let lower = match refused {
            ResponseFormat::JsonSchema => ResponseFormat::JsonObject,
            ResponseFormat::JsonObject | ResponseFormat::None => ResponseFormat::None,
        };
        if self.format == refused {
            self.format = lower;
            eprintln!("note: the server refuses response_format {refused:?}; {lower:?} is used from here on");
            self.record(JournalEntry::Format { response_format: lower })?;
        }
        Ok(())
    }
}

/// Returns the most tokens that a request may take.
fn reservation(request: &ModelRequest, provider: &dyn Provider) -> TokenUsage {
    TokenUsage {
        prompt_tokens: provider.prompt_tokens(request),
        completion_tokens: request.max_tokens(),
        cached_tokens: 0,
    }
}
