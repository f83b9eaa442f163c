//! Drawings of schedules and timelines as SVG: a row per rank, a box per pass with the number of its micro-batch, and a
//! grey box where the rank is idle.

use super::{Action, ComputationType, PipelineSchedule, TimedAction, Timeline};

/// The height of a row, in pixels.
const ROW_HEIGHT: f64 = 28.0;
/// The margin left of the first slot, in pixels.
const MARGIN: f64 = 56.0;
/// The distance from the top of a row to the baseline of its text, in pixels.
const BASELINE: f64 = 17.0;
/// The width of the shortest pass, in pixels: enough for a micro-batch number of three digits.
const MIN_WIDTH: f64 = 24.0;
/// The width of the longest drawing, in pixels. Passes are narrower where more would be needed.
const MAX_WIDTH: f64 = 30_000.0;
/// The width of a box that has room for a number, in pixels.
const NUMBER_WIDTH: f64 = 10.0;
/// The colour of idle time.
const IDLE: &str = "#e4e4e4";

impl PipelineSchedule {
    /// Returns the schedule as SVG; all slots have the same width.
    pub fn to_svg(&self) -> String {
        let spans = |row: &Vec<_>| {
            let actions = row.iter().enumerate().filter_map(|(slot, &action)| Some((slot as f64, action?)));
            actions.map(|(start, action)| TimedAction { action, start, end: start + 1.0 }).collect()
        };
        Timeline { ranks: self.rows().iter().map(spans).collect() }.to_svg()
    }
}

impl Timeline {
    /// Returns the timeline as SVG; the width of a pass is proportional to its time.
    pub fn to_svg(&self) -> String {
        svg(&[(None, self)])
    }

    /// Returns the timeline and below it `other`, each under its title, on one scale of time. Titles are plain text.
    pub fn to_svg_above(&self, title: &str, other: (&str, &Self)) -> String {
        svg(&[(Some(title), self), (Some(other.0), other.1)])
    }
}

fn svg(timelines: &[(Option<&str>, &Timeline)]) -> String {
    let spans = || timelines.iter().flat_map(|(_, timeline)| timeline.ranks.iter().flatten());
    let shortest = spans().map(|span| span.end - span.start).filter(|&time| time > 0.0).fold(f64::INFINITY, f64::min);
    let longest = timelines.iter().map(|(_, timeline)| timeline.makespan()).fold(0.0, f64::max);
    let scale = if shortest.is_finite() { (MIN_WIDTH / shortest).min(MAX_WIDTH / longest) } else { MIN_WIDTH };
    let mut rows = String::new();
    let mut top = 1.0;
    for (title, timeline) in timelines {
        if let Some(title) = title {
            rows += &text(8.0, top + BASELINE, title);
            top += ROW_HEIGHT;
        }
        for (rank, row) in timeline.ranks.iter().enumerate() {
            rows += &text(8.0, top + BASELINE, &format!("rank {rank}"));
            rows.extend(idle_spans(row, timeline.makespan()).map(|[from, to]| rectangle([from, to], scale, top, IDLE)));
            rows.extend(row.iter().map(|span| action_box(span, scale, top)));
            top += ROW_HEIGHT;
        }
    }
    let width = MARGIN + longest * scale + 1.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{top:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"{width:.0}\" height=\"{top:.0}\" fill=\"white\"/>\n\
         {rows}</svg>\n"
    )
}

/// Returns the start and the end of every time up to `makespan` in which a rank runs no pass.
fn idle_spans(row: &[TimedAction], makespan: f64) -> impl Iterator<Item = [f64; 2]> {
    let starts = std::iter::once(0.0).chain(row.iter().map(|span| span.end));
    let ends = row.iter().map(|span| span.start).chain([makespan]);
    starts.zip(ends).filter(|(start, end)| start < end).map(|(start, end)| [start, end])
}

/// Returns the box of an action with the number of its micro-batch, if there is room for it.
fn action_box(span: &TimedAction, scale: f64, top: f64) -> String {
    let own = rectangle([span.start, span.end], scale, top, &colour(span.action));
    if (span.end - span.start) * scale < NUMBER_WIDTH {
        return own;
    }
    let centre = MARGIN + (span.start + span.end) / 2.0 * scale;
    let (base, number) = (top + BASELINE, span.action.micro_batch);
    own + &format!("<text x=\"{centre:.1}\" y=\"{base}\" text-anchor=\"middle\">{number}</text>\n")
}

fn rectangle([start, end]: [f64; 2], scale: f64, top: f64, fill: &str) -> String {
    let (left, width, height) = (MARGIN + start * scale, (end - start) * scale, ROW_HEIGHT - 2.0);
    format!(
        "<rect x=\"{left:.1}\" y=\"{top}\" width=\"{width:.1}\" height=\"{height}\" fill=\"{fill}\" stroke=\"white\"/>\n"
    )
}

fn text(left: f64, base: f64, content: &str) -> String {
    format!("<text x=\"{left}\" y=\"{base}\">{content}</text>\n")
}

/// Returns blue for forward and green for backward passes, teal and amber for their input and weight halves, paler for
/// every further chunk. The colour is hexadecimal because not every viewer supports `hsl()`.
fn colour(action: Action) -> String {
    let full = match action.computation {
        ComputationType::Forward => [96, 150, 222],
        ComputationType::Backward => [104, 186, 116],
        ComputationType::BackwardInput => [64, 176, 176],
        ComputationType::BackwardWeight => [226, 170, 70],
    };
    let white = (action.chunk * 64).min(192);
    let [red, green, blue] = full.map(|part: usize| part + (255 - part) * white / 256);
    format!("#{red:02x}{green:02x}{blue:02x}")
}

#[cfg(test)]
mod tests {
    use super::IDLE;
    use crate::pipeline::{
        Costs, PipelineKind, PipelineSchedule, PipelineShape, Placement, SendMode, StageTimes, Timeline,
    };

    fn drawn(kind: PipelineKind, shape: PipelineShape) -> (PipelineSchedule, Timeline) {
        let schedule = PipelineSchedule::new(kind, shape).unwrap();
        let times = StageTimes { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };
        let costs = Costs { send_mode: SendMode::Buffered, ..Costs::uniform(shape, times) };
        let timeline = schedule.program(SendMode::Buffered).simulate(&costs).unwrap();
        (schedule, timeline)
    }

    #[test]
    fn every_pass_is_a_box_with_its_micro_batch() {
        let (schedule, timeline) = drawn(PipelineKind::Interleaved1F1B, PipelineShape::new(2, 2, 4).unwrap());
        for picture in [schedule.to_svg(), timeline.to_svg()] {
            assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
            let idle = picture.matches(IDLE).count();
            assert_eq!(picture.matches("<rect x=").count() - idle, 2 * 2 * 2 * 4);
            for micro_batch in 0..4 {
                assert_eq!(picture.matches(&format!(">{micro_batch}</text>")).count(), 2 * 2 * 2);
            }
            for fill in ["#6096de", "#68ba74", "#87b0e6", "#8dcb96"] {
                assert_eq!(picture.matches(fill).count(), 2 * 4, "{fill}");
            }
            assert!(picture.contains(">rank 1</text>"));
        }
        // A backward pass takes twice as long, so it is twice as wide.
        let boxes = |width| timeline.to_svg().lines().filter(|l| l.contains(width) && !l.contains(IDLE)).count();
        assert_eq!((boxes("width=\"48.0\""), boxes("width=\"24.0\"")), (16, 16));
    }

    /// The areas of passes and idle time fill every row up to the makespan.
    #[test]
    fn idle_time_and_both_halves_of_a_backward_pass_are_visible() {
        let shape = PipelineShape::new(3, 2, 6).unwrap().with_placement(Placement::V);
        let (_, timeline) = drawn(PipelineKind::ZBV, shape);
        let picture = timeline.to_svg();
        let width =
            |line: &str| line.split("width=\"").nth(1).and_then(|rest| rest.split('"').next()?.parse::<f64>().ok());
        let sum = |idle| {
            let boxes = picture.lines().filter(|line| line.starts_with("<rect x=") && line.contains(IDLE) == idle);
            boxes.filter_map(width).sum::<f64>() / 24.0
        };
        assert_eq!((sum(false), sum(true)), (3.0 * 36.0, 3.0 * timeline.makespan() - 3.0 * 36.0));
        for fill in ["#40b0b0", "#e2aa46"] {
            assert_eq!(picture.matches(fill).count(), 3 * 6, "{fill}");
        }
        let both = timeline.to_svg_above("measured", ("simulated", &timeline));
        assert_eq!(both.matches("<rect x=").count(), 2 * picture.matches("<rect x=").count());
        assert!(both.find(">measured<").unwrap() < both.find(">simulated<").unwrap());
    }
}
