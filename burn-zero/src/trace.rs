//! A timeline of what one rank computed, communicated and waited for.

use crate::Error;
use serde_json::{Value, json};
use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

/// The kind of work of a span; it determines the thread that the span is drawn on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Lane {
    /// The compute thread: passes of micro-batches, segments, steps.
    Compute,
    /// The compute thread, while it waits for another thread.
    Wait,
    /// The communication thread.
    Communication,
    /// The communication thread, while it moves values between device, host and files.
    Transfer,
    /// The thread that updates weights on the host.
    Optimizer,
}

impl Lane {
    /// Returns the number and the name of the thread.
    fn thread(self, axis: TraceAxis) -> (u8, &'static str) {
        match (self, axis) {
            (Self::Compute | Self::Wait, _) => (0, "compute"),
            (Self::Optimizer, _) => (2, "optimizer on the host"),
            (Self::Communication | Self::Transfer, TraceAxis::Data) => (1, "communication"),
            (Self::Communication | Self::Transfer, TraceAxis::Pipeline) => (3, "communication of the pipeline axis"),
        }
    }
}

/// The axis of the mesh whose communication thread records a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TraceAxis {
    /// The ranks that hold the same part of the model.
    Data,
    /// The ranks of a pipeline.
    Pipeline,
}

/// The kind of a span, without its time.
#[derive(Debug, Clone, Copy)]
struct SpanLabel {
    name: &'static str,
    /// The number of the segment, bucket or micro-batch.
    number: Option<usize>,
    /// The chunk of a pipeline's pass.
    chunk: Option<usize>,
    lane: Lane,
}

#[derive(Debug, Clone, Copy)]
struct TraceEvent {
    label: SpanLabel,
    axis: TraceAxis,
    /// The start and the end in seconds since the start of the trace.
    begin: f64,
    end: f64,
}

/// A timeline into which the compute thread and the background threads record their spans.
#[derive(Debug, Clone)]
pub struct Trace {
    start: Instant,
    /// The Unix time of the start in seconds, by which the timelines of several ranks are aligned.
    unix_start: f64,
    axis: TraceAxis,
    spans: Arc<Mutex<Vec<TraceEvent>>>,
}

impl Default for Trace {
    fn default() -> Self {
        let unix_start = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        Self { start: Instant::now(), unix_start, axis: TraceAxis::Data, spans: Arc::default() }
    }
}

impl Trace {
    /// Returns the same timeline for the communication thread of an axis.
    pub(crate) fn on_axis(&self, axis: TraceAxis) -> Self {
        Self { axis, ..self.clone() }
    }

    /// Runs `work` and records when it ran.
    pub(crate) fn span<R>(&self, name: &'static str, lane: Lane, work: impl FnOnce() -> R) -> R {
        self.record(SpanLabel { name, number: None, chunk: None, lane }, work)
    }

    /// Like [`Trace::span`], for one of several spans of the same name: `number` is that of the segment or bucket.
    pub(crate) fn numbered_span<R>(
        &self,
        name: &'static str,
        number: usize,
        lane: Lane,
        work: impl FnOnce() -> R,
    ) -> R {
        self.record(SpanLabel { name, number: Some(number), chunk: None, lane }, work)
    }

    /// Like [`Trace::span`], for the pass `letter` of a micro-batch through a chunk of this rank.
    pub(crate) fn pass_span<R>(
        &self,
        letter: &'static str,
        micro_batch: usize,
        chunk: usize,
        work: impl FnOnce() -> R,
    ) -> R {
        let label = SpanLabel { name: letter, number: Some(micro_batch), chunk: Some(chunk), lane: Lane::Compute };
        self.record(label, work)
    }

    fn record<R>(&self, label: SpanLabel, work: impl FnOnce() -> R) -> R {
        let begin = self.start.elapsed().as_secs_f64();
        let result = work();
        let end = self.start.elapsed().as_secs_f64();
        let event = TraceEvent { label, axis: self.axis, begin, end };
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).push(event);
        result
    }

    fn spans(&self) -> Vec<TraceEvent> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the fraction of the time in collectives that overlapped computation: the compute thread was in a
    /// pass of a micro-batch or a step and did not wait. `None` if there were no collectives.
    pub fn overlap_fraction(&self) -> Option<f64> {
        self.overlap_fraction_in(Lane::Communication, "")
    }

    /// Returns the fraction of the time in `lane` that overlapped computation: the compute thread was in a span whose
    /// name begins with `name`, and did not wait. `None` if there were no spans in `lane`.
    pub(crate) fn overlap_fraction_in(&self, lane: Lane, name: &str) -> Option<f64> {
        let spans = self.spans();
        let of = |lane, name: &str| -> Vec<(f64, f64)> {
            let own = spans.iter().filter(|span| span.label.lane == lane && span.label.name.starts_with(name));
            own.map(|span| (span.begin, span.end)).collect()
        };
        let (all, busy, waits) =
            (of(lane, ""), merge_overlapping(of(Lane::Compute, name)), merge_overlapping(of(Lane::Wait, "")));
        let total: f64 = all.iter().map(|(begin, end)| end - begin).sum();
        let inside = |spans: &[(f64, f64)], a: &(f64, f64)| -> f64 {
            spans.iter().map(|b| (a.1.min(b.1) - a.0.max(b.0)).max(0.0)).sum()
        };
        let within = |a: &(f64, f64)| -> f64 {
            let common = busy.iter().map(|b| (a.0.max(b.0), a.1.min(b.1))).filter(|(begin, end)| begin < end);
            common.map(|part| part.1 - part.0 - inside(&waits, &part)).sum()
        };
        (total > 0.0).then(|| all.iter().map(within).sum::<f64>() / total)
    }

    /// Returns the events of the timeline in the format of `chrome://tracing` and Perfetto, in microseconds of Unix
    /// time; `rank` becomes the process number.
    pub(crate) fn events(&self, rank: usize) -> Vec<Value> {
        let lanes = [Lane::Compute, Lane::Communication, Lane::Optimizer];
        let mut threads: Vec<_> = lanes.map(|lane| lane.thread(TraceAxis::Data)).to_vec();
        threads.extend(self.spans().iter().map(|span| span.label.lane.thread(span.axis)));
        threads.sort_unstable();
        threads.dedup();
        let threads = threads.into_iter().map(|(tid, name)| {
            json!({ "name": "thread_name", "ph": "M", "pid": rank, "tid": tid, "args": { "name": name } })
        });
        let process =
            json!({ "name": "process_name", "ph": "M", "pid": rank, "args": { "name": format!("rank {rank}") } });
        let event = |TraceEvent { label: SpanLabel { name, number, chunk, lane }, axis, begin, end }: TraceEvent| {
            let name = number.map_or(name.to_owned(), |number| format!("{name} {number}"));
            let (begin, long) = ((self.unix_start + begin) * 1e6, (end - begin) * 1e6);
            let mut event =
                json!({ "name": name, "ph": "X", "pid": rank, "tid": lane.thread(axis).0, "ts": begin, "dur": long });
            if let Some(chunk) = chunk {
                event["args"] = json!({ "chunk": chunk });
            }
            event
        };
        [process].into_iter().chain(threads).chain(self.spans().into_iter().map(event)).collect()
    }

    /// Writes the timeline of one rank to a file.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn write(&self, path: &Path, rank: usize) -> Result<(), Error> {
        write_events(path, &self.events(rank))
    }
}

/// Writes the events of any number of ranks to a file.
pub(crate) fn write_events(path: &Path, events: &[Value]) -> Result<(), Error> {
    let text = json!({ "traceEvents": events }).to_string();
    std::fs::write(path, text).map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// Merges overlapping spans.
fn merge_overlapping(mut spans: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut all: Vec<(f64, f64)> = Vec::new();
    for span in spans {
        match all.last_mut().filter(|last| last.1 >= span.0) {
            Some(last) => last.1 = last.1.max(span.1),
            None => all.push(span),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_waited_for_is_not_hidden() {
        let trace = Trace::default();
        assert_eq!(trace.overlap_fraction(), None);
        let label = |name, lane| SpanLabel { name, number: None, chunk: None, lane };
        let span = |name, lane, begin, end| TraceEvent { label: label(name, lane), axis: TraceAxis::Data, begin, end };
        trace.spans.lock().unwrap().extend([
            span("B", Lane::Compute, 0.0, 9.5),
            span("forward", Lane::Compute, 0.0, 3.0),
            span("all_gather", Lane::Communication, 1.0, 5.0),
            span("reduce_scatter", Lane::Communication, 6.0, 10.0),
            span("wait", Lane::Wait, 4.0, 6.5),
        ]);
        // The collectives take 8 seconds; 1 to 4 and 6.5 to 9.5 overlap computation, 1 to 3 a forward pass.
        assert_eq!(trace.overlap_fraction(), Some(6.0 / 8.0));
        assert_eq!(trace.overlap_fraction_in(Lane::Communication, "forward"), Some(2.0 / 8.0));
        assert_eq!(trace.overlap_fraction_in(Lane::Optimizer, ""), None);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        trace.write(&path, 3).unwrap();
        let read: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let events = read["traceEvents"].as_array().unwrap();
        let spans: Vec<_> = events.iter().filter(|event| event["ph"] == "X").collect();
        assert_eq!((spans.len(), &spans[2]["dur"], &spans[2]["tid"]), (5, &json!(4e6), &json!(1)));
        assert!(events.iter().all(|event| event["pid"] == 3));
    }
}
