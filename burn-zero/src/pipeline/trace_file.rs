//! Reads the passes of a pipeline and the times of segments from a trace file that [`crate::Engine::write_trace`] wrote.

use super::{
    Action, ComputationType, PipelineError, PipelineSchedule, PipelineShape, StageTimes, TimedAction, Timeline,
};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// The spans of a trace file in the format of `chrome://tracing`. The pass of a micro-batch is a span whose name is
/// torch's letter of the pass and the micro-batch, such as `F 3`, with the chunk as its argument `chunk`; a segment has
/// spans `forward 7` and `backward 7`.
#[derive(Debug, Clone)]
pub struct TraceFile {
    spans: Vec<Span>,
}

#[derive(Debug, Clone, Deserialize)]
struct TraceEvents {
    #[serde(rename = "traceEvents")]
    events: Vec<Span>,
}

#[derive(Debug, Clone, Deserialize)]
struct Span {
    name: String,
    #[serde(rename = "pid")]
    rank: usize,
    /// The start in microseconds; events that are not spans have none.
    #[serde(rename = "ts", default)]
    start: f64,
    #[serde(rename = "dur")]
    duration: Option<f64>,
    #[serde(default)]
    args: SpanArguments,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct SpanArguments {
    chunk: Option<usize>,
}

impl Span {
    /// Returns the pass that the span is of.
    fn action(&self) -> Option<Action> {
        let (letter, micro_batch) = self.name.split_once(' ')?;
        let mut letters = letter.chars();
        let computation = ComputationType::from_letter(letters.next()?).filter(|_| letters.next().is_none())?;
        Some(Action { computation, chunk: self.args.chunk.unwrap_or(0), micro_batch: micro_batch.parse().ok()? })
    }
}

impl TraceFile {
    /// Parses the text of a trace file.
    ///
    /// # Errors
    /// If the text is not JSON with the spans in `traceEvents`.
    pub fn parse(text: &str) -> Result<Self, PipelineError> {
        let TraceEvents { mut events } = serde_json::from_str(text)
            .map_err(|error| refused("JSON with spans in `traceEvents`".to_owned(), error.to_string()))?;
        events.retain(|event| event.duration.is_some());
        events.sort_by(|a, b| a.start.total_cmp(&b.start));
        Ok(Self { spans: events })
    }

    /// Returns the measured timeline of the last step, in seconds from its first pass. `schedule` is the schedule that
    /// ran. If the file has several replicas of the pipeline, the first is taken: rank `d` of stage `r` among `n`
    /// replicas is process `r · n + d`.
    ///
    /// # Errors
    /// If the number of processes with passes is not a multiple of the ranks of `schedule`, or the last passes of a rank
    /// are not those of `schedule`.
    pub fn timeline(&self, schedule: &PipelineSchedule) -> Result<Timeline, PipelineError> {
        let shape = schedule.shape();
        let processes: BTreeSet<usize> =
            self.spans.iter().filter(|span| span.action().is_some()).map(|span| span.rank).collect();
        if processes.is_empty() || !processes.len().is_multiple_of(shape.ranks()) {
            let expected = format!("passes such as `F 0` of {} ranks, or of a multiple of them", shape.ranks());
            return Err(refused(expected, format!("passes of {} ranks", processes.len())));
        }
        let first_replicas = processes.iter().step_by(processes.len() / shape.ranks());
        let ranks = first_replicas.zip(schedule.rows()).enumerate().map(|(rank, (&process, row))| {
            self.last_passes(process, &row.iter().flatten().copied().collect::<Vec<_>>(), rank)
        });
        let mut ranks = ranks.collect::<Result<Vec<_>, _>>()?;
        let start = ranks.iter().flatten().map(|span| span.start).fold(f64::INFINITY, f64::min);
        for span in ranks.iter_mut().flatten() {
            // Unix times in microseconds lose digits as floating-point numbers, so the start is taken off first.
            (span.start, span.end) = ((span.start - start) * 1e-6, (span.end - start) * 1e-6);
        }
        Ok(Timeline { ranks })
    }

    /// Returns the last passes of a process, as many as `order` has, in microseconds.
    fn last_passes(&self, process: usize, order: &[Action], rank: usize) -> Result<Vec<TimedAction>, PipelineError> {
        let own = self.spans.iter().filter(|span| span.rank == process);
        let timed = |span: &Span| {
            let end = span.start + span.duration.unwrap_or(0.0);
            Some(TimedAction { action: span.action()?, start: span.start, end })
        };
        let mut passes: Vec<_> = own.filter_map(timed).collect();
        let missing = |passes: &[TimedAction]| {
            let found: BTreeSet<_> = passes.iter().map(|span| span.action).collect();
            order.iter().copied().find(|action| !found.contains(action))
        };
        let nowhere = missing(&passes);
        passes.drain(..passes.len().saturating_sub(order.len()));
        let Some(missing) = nowhere.or_else(|| missing(&passes)) else { return Ok(passes) };
        let foreign = passes.iter().map(|span| span.action).find(|action| !order.contains(action));
        let found = foreign.map_or_else(|| format!("{} passes without it", passes.len()), |action| action.to_string());
        Err(refused(format!("{missing} in the last step of rank {rank}"), found))
    }

    /// Returns the nanoseconds that each segment took in its last forward and backward pass on the first rank of the
    /// file: the weights of [`super::PartitionMethod::Weighted`].
    pub fn segment_times(&self) -> Vec<u64> {
        let first = self.spans.iter().map(|span| span.rank).min();
        let mut last: BTreeMap<(usize, &str), f64> = BTreeMap::new();
        for span in self.spans.iter().filter(|span| Some(span.rank) == first) {
            let Some((direction @ ("forward" | "backward"), number)) = span.name.split_once(' ') else { continue };
            if let Ok(segment) = number.parse() {
                last.insert((segment, direction), span.duration.unwrap_or(0.0));
            }
        }
        let segments = last.keys().next_back().map_or(0, |(segment, _)| segment + 1);
        let time = |segment| ["forward", "backward"].iter().filter_map(|&way| last.get(&(segment, way))).sum::<f64>();
        (0..segments).map(|segment| (time(segment) * 1e3) as u64).collect()
    }
}

impl Timeline {
    /// Returns the mean times of each stage, with which [`super::Program::simulate`] shows the same step without
    /// waiting for messages. The time of a full backward pass counts as that of its input half.
    pub fn mean_times(&self, shape: PipelineShape) -> Vec<StageTimes> {
        let mean = |rank: usize, chunk: usize, wanted: &[ComputationType]| {
            let own = |span: &&TimedAction| span.action.chunk == chunk && wanted.contains(&span.action.computation);
            let times = || self.ranks.get(rank).into_iter().flatten().filter(own).map(|span| span.end - span.start);
            times().sum::<f64>() / times().count().max(1) as f64
        };
        let stage = |stage| {
            let mean = |wanted: &[_]| mean(shape.stage_rank(stage), shape.stage_chunk(stage), wanted);
            StageTimes {
                forward: mean(&[ComputationType::Forward]),
                backward_input: mean(&[ComputationType::Backward, ComputationType::BackwardInput]),
                backward_weight: mean(&[ComputationType::BackwardWeight]),
            }
        };
        (0..shape.stages()).map(stage).collect()
    }
}

fn refused(expected: String, found: String) -> PipelineError {
    PipelineError::Setting { field: "trace", expected, found }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::{Costs, PipelineKind, Placement, SendMode};
    use serde_json::{Value, json};

    fn zbv() -> (PipelineSchedule, Timeline) {
        let shape = PipelineShape::new(2, 2, 4).unwrap().with_placement(Placement::V);
        let schedule = PipelineSchedule::new(PipelineKind::ZBV, shape).unwrap();
        let stages = (1..=4).map(|stage| {
            let time = f64::from(stage);
            StageTimes { forward: time, backward_input: 2.0 * time, backward_weight: 0.5 * time }
        });
        let costs = Costs { stages: stages.collect(), message: 0.25, send_mode: SendMode::Buffered };
        let timeline = schedule.program(SendMode::Buffered).simulate(&costs).unwrap();
        (schedule, timeline)
    }

    /// Returns the events of a timeline on `replicas` replicas, shifted by `at` seconds.
    fn events(timeline: &Timeline, replicas: usize, at: f64) -> Vec<Value> {
        let of = |(process, replica): (usize, usize), span: &TimedAction| {
            let name = format!("{} {}", span.action.computation.letter(), span.action.micro_batch);
            let (start, long) = ((at + span.start + 0.125 * replica as f64) * 1e6, (span.end - span.start) * 1e6);
            json!({ "name": name, "ph": "X", "pid": process * replicas + replica, "tid": 0, "ts": start, "dur": long,
                    "args": { "chunk": span.action.chunk } })
        };
        let places = (0..timeline.ranks.len()).flat_map(|rank| (0..replicas).map(move |replica| (rank, replica)));
        let name = json!({ "name": "process_name", "ph": "M", "pid": 0, "args": { "name": "rank 0" } });
        let spans = places.flat_map(|place| timeline.ranks[place.0].iter().map(move |span| of(place, span)));
        [name].into_iter().chain(spans).collect()
    }

    fn file(events: &[Value]) -> TraceFile {
        TraceFile::parse(&json!({ "traceEvents": events }).to_string()).unwrap()
    }

    #[test]
    fn the_last_step_of_the_first_replica_is_read() {
        let (schedule, timeline) = zbv();
        let mut events = [events(&timeline, 2, 1_000.0), events(&timeline, 2, 2_000.0)].concat();
        events.push(json!({ "name": "Forward 1", "ph": "X", "pid": 0, "ts": 0.0, "dur": 1.0 }));
        let read = file(&events).timeline(&schedule).unwrap();
        assert_eq!(read, timeline);
        let times = read.mean_times(schedule.shape());
        assert_eq!(times[2], StageTimes { forward: 3.0, backward_input: 6.0, backward_weight: 1.5 });
    }

    #[test]
    fn a_trace_of_another_pipeline_is_refused() {
        let (schedule, timeline) = zbv();
        let message = |events: &[Value]| file(events).timeline(&schedule).unwrap_err().to_string();
        let ranks = "`trace`: expected passes such as `F 0` of 2 ranks, or of a multiple of them, found passes of";
        assert_eq!(message(&[]), format!("{ranks} 0 ranks"));
        let mut events = events(&timeline, 1, 0.0);
        events.retain(|event| event["name"] != "W 2" || event["pid"] != 1);
        assert_eq!(
            message(&events),
            "`trace`: expected BackwardWeight(chunk 1, micro-batch 2) in the last step of rank 1, found 22 passes \
             without it"
        );
        events.retain(|event| event["pid"] == 0);
        assert_eq!(message(&events), format!("{ranks} 1 ranks"));
        let text = TraceFile::parse("{}").unwrap_err().to_string();
        assert!(text.contains("expected JSON with spans in `traceEvents`, found missing field"), "{text}");
    }

    #[test]
    fn a_segment_takes_the_time_of_its_last_two_passes() {
        let span = |name: &str, start: f64, duration: f64| json!({ "name": name, "ph": "X", "pid": 3, "ts": start, "dur": duration });
        let spans = [
            span("forward 0", 0.0, 9.0),
            span("forward 0", 10.0, 1.5),
            span("forward 1", 11.5, 2.0),
            span("backward 1", 14.0, 4.0),
            span("backward", 18.0, 7.0),
        ];
        assert_eq!(file(&spans).segment_times(), [1500, 6000]);
    }
}
