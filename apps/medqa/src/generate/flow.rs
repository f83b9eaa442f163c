//! The number of requests in flight: one until the first answer, halved where the server says that it is too many, and
//! one more after each 20 answers (additive increase, multiplicative decrease).

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Answers after which one more request may be in flight.
const ANSWERS_PER_INCREASE: u32 = 20;
/// The last requests whose failures are counted, and the failures among them that end a run.
const WINDOW: usize = 50;
const MAX_FAILURES: usize = 5;

/// The flow of requests.
pub(super) struct Flow {
    concurrency: usize,
    limit: usize,
    pub in_flight: usize,
    answers: u32,
    /// No request is sent before this time.
    pause: Option<Instant>,
    /// The last finished requests: the message of those that failed.
    finished: VecDeque<Option<String>>,
}

impl Flow {
    /// Creates a flow of at most `concurrency` requests at a time.
    pub(super) fn new(concurrency: usize) -> Self {
        Self { concurrency, limit: 1, in_flight: 0, answers: 0, pause: None, finished: VecDeque::new() }
    }

    /// Returns whether another request may be sent now.
    pub(super) fn is_open(&self) -> bool {
        self.in_flight < self.limit && self.pause.is_none_or(|pause| Instant::now() >= pause)
    }

    /// Returns the time until which nothing is sent.
    pub(super) fn pause(&self) -> Option<Instant> {
        self.pause
    }

    /// Returns whether a request was answered.
    pub(super) fn has_answered(&self) -> bool {
        self.answers > 0
    }

    /// Counts an answer.
    pub(super) fn answered(&mut self) {
        if self.answers == 0 {
            self.limit = self.concurrency;
        }
        self.answers += 1;
        if self.answers.is_multiple_of(ANSWERS_PER_INCREASE) {
            self.limit = (self.limit + 1).min(self.concurrency);
        }
        self.finish(None);
    }

    /// Halves the requests in flight, and sends nothing for a time.
    pub(super) fn slow_down(&mut self, wait: Duration) {
        self.limit = (self.limit / 2).max(1);
        self.pause = Some(Instant::now() + wait).max(self.pause);
    }

    /// Counts a request that was given up. Returns the commonest message if too many were.
    pub(super) fn gave_up(&mut self, message: String) -> Option<String> {
        self.finish(Some(message));
        let failed: Vec<&String> = self.finished.iter().flatten().collect();
        if failed.len() <= MAX_FAILURES {
            return None;
        }
        let count = |message: &String| failed.iter().filter(|other| **other == message).count();
        let commonest = failed.iter().max_by_key(|message| count(message))?;
        Some(format!("{} of the last {} requests failed; mostly: {commonest}", failed.len(), self.finished.len()))
    }

    fn finish(&mut self, failure: Option<String>) {
        self.finished.push_back(failure);
        if self.finished.len() > WINDOW {
            self.finished.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flow_opens_with_the_first_answer_and_halves_when_told() {
        let mut flow = Flow::new(8);
        let room = |flow: &Flow| flow.limit;
        assert_eq!(room(&flow), 1);
        flow.answered();
        assert_eq!(room(&flow), 8);
        flow.slow_down(Duration::ZERO);
        assert_eq!(room(&flow), 4);
        (0..20).for_each(|_| flow.answered());
        assert_eq!(room(&flow), 5);
        flow.slow_down(Duration::from_secs(60));
        assert!(!flow.is_open());
    }

    #[test]
    fn more_than_a_tenth_of_failures_ends_the_run() {
        let mut flow = Flow::new(8);
        (0..50).for_each(|_| flow.answered());
        for _ in 0..5 {
            assert_eq!(flow.gave_up("a".into()), None);
        }
        let message = flow.gave_up("b".into()).unwrap();
        assert_eq!(message, "6 of the last 50 requests failed; mostly: a");
    }
}
