//! When what ran: a timeline of one rank.

use crate::Error;
use serde_json::json;
use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

/// The thread of a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lane {
    /// The thread that computes: micro-batches and steps.
    Compute,
    /// The same thread, where it waits for a collective.
    Wait,
    /// The thread that communicates.
    Communication,
}

#[derive(Debug, Clone, Copy)]
struct Span {
    name: &'static str,
    lane: Lane,
    /// Seconds since the trace began.
    begin: f64,
    end: f64,
}

/// A timeline that is written to by the thread that computes and the one that communicates.
#[derive(Debug, Clone)]
pub struct Trace {
    start: Instant,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Default for Trace {
    fn default() -> Self {
        Self { start: Instant::now(), spans: Arc::default() }
    }
}

impl Trace {
    /// Runs `work` and notes when it ran.
    pub(crate) fn span<R>(&self, name: &'static str, lane: Lane, work: impl FnOnce() -> R) -> R {
        let begin = self.start.elapsed().as_secs_f64();
        let result = work();
        let end = self.start.elapsed().as_secs_f64();
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).push(Span { name, lane, begin, end });
        result
    }

    fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The share of the time in collectives during which the other thread did not wait; none without collectives.
    pub fn hidden_share(&self) -> Option<f64> {
        let spans = self.spans();
        let of = |lane| spans.iter().filter(move |span| span.lane == lane);
        let total: f64 = of(Lane::Communication).map(|span| span.end - span.begin).sum();
        let common = |a: &Span, b: &Span| (a.end.min(b.end) - a.begin.max(b.begin)).max(0.0);
        let waited: f64 = of(Lane::Communication).flat_map(|a| of(Lane::Wait).map(move |b| common(a, b))).sum();
        (total > 0.0).then(|| 1.0 - waited / total)
    }

    /// Writes the timeline as `chrome://tracing` and Perfetto read it; `rank` is the process's number there.
    ///
    /// # Errors
    /// [`Error::Path`] if the file cannot be written.
    pub fn write(&self, path: &Path, rank: usize) -> Result<(), Error> {
        let event = |span: Span| {
            let lane = match span.lane {
                Lane::Compute | Lane::Wait => "compute",
                Lane::Communication => "communication",
            };
            let (begin, long) = (span.begin * 1e6, (span.end - span.begin) * 1e6);
            json!({ "name": span.name, "ph": "X", "pid": rank, "tid": lane, "ts": begin, "dur": long })
        };
        let events: Vec<_> = self.spans().into_iter().map(event).collect();
        let text = json!({ "traceEvents": events }).to_string();
        std::fs::write(path, text).map_err(|source| Error::Path { path: path.to_owned(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_waited_for_is_not_hidden() {
        let trace = Trace::default();
        assert_eq!(trace.hidden_share(), None);
        let span = |lane, begin, end| Span { name: "", lane, begin, end };
        trace.spans.lock().unwrap().extend([
            span(Lane::Compute, 0.0, 10.0),
            span(Lane::Communication, 1.0, 5.0),
            span(Lane::Communication, 6.0, 10.0),
            span(Lane::Wait, 4.0, 6.5),
        ]);
        assert_eq!(trace.hidden_share(), Some(1.0 - 1.5 / 8.0));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        trace.write(&path, 3).unwrap();
        let read: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(read["traceEvents"][1]["dur"], 4e6);
        assert_eq!(read["traceEvents"][3]["pid"], 3);
    }
}
