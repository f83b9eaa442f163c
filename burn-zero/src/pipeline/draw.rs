//! Drawings of schedules and timelines as SVG: a row per rank, a box per pass with the number of its micro-batch.

use super::{Action, ComputationType, PipelineSchedule, TimedAction, Timeline};

/// The height of a row, in pixels.
const ROW_HEIGHT: f64 = 28.0;
/// The margin left of the first slot, in pixels.
const MARGIN: f64 = 56.0;
/// The distance from the top of a row to the baseline of its text, in pixels.
const BASELINE: f64 = 17.0;
/// The width of the shortest pass, in pixels: enough for a micro-batch number of three digits.
const MIN_WIDTH: f64 = 24.0;

impl PipelineSchedule {
    /// Returns the schedule as SVG; all slots have the same width.
    pub fn to_svg(&self) -> String {
        let spans = |row: &Vec<_>| {
            let actions = row.iter().enumerate().filter_map(|(slot, &action)| Some((slot as f64, action?)));
            actions.map(|(start, action)| TimedAction { action, start, end: start + 1.0 }).collect()
        };
        svg(&self.rows().iter().map(spans).collect::<Vec<_>>())
    }
}

impl Timeline {
    /// Returns the timeline as SVG; the width of a pass is proportional to its time.
    pub fn to_svg(&self) -> String {
        svg(&self.ranks)
    }
}

fn svg(ranks: &[Vec<TimedAction>]) -> String {
    let spans = || ranks.iter().flatten();
    let shortest = spans().map(|span| span.end - span.start).filter(|&time| time > 0.0).fold(f64::INFINITY, f64::min);
    let scale = if shortest.is_finite() { MIN_WIDTH / shortest } else { MIN_WIDTH };
    let width = MARGIN + spans().map(|span| span.end * scale).fold(0.0, f64::max) + 1.0;
    let height = ROW_HEIGHT * ranks.len() as f64 + 1.0;
    let mut picture = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"{width:.0}\" height=\"{height:.0}\" fill=\"white\"/>\n"
    );
    for (rank, row) in ranks.iter().enumerate() {
        let top = ROW_HEIGHT * rank as f64 + 1.0;
        picture += &format!("<text x=\"8\" y=\"{}\">rank {rank}</text>\n", top + BASELINE);
        picture.extend(row.iter().map(|span| action_box(span, scale, top)));
    }
    picture + "</svg>\n"
}

/// Returns the box of an action with the number of its micro-batch.
fn action_box(span: &TimedAction, scale: f64, top: f64) -> String {
    let (left, wide, high) = (MARGIN + span.start * scale, (span.end - span.start) * scale, ROW_HEIGHT - 2.0);
    let (centre, base, fill, number) =
        (left + wide / 2.0, top + BASELINE, colour(span.action), span.action.micro_batch);
    format!(
        "<rect x=\"{left:.1}\" y=\"{top}\" width=\"{wide:.1}\" height=\"{high}\" fill=\"{fill}\" stroke=\"white\"/>\n\
         <text x=\"{centre:.1}\" y=\"{base}\" text-anchor=\"middle\">{number}</text>\n"
    )
}

/// Returns blue for forward and green for backward passes, paler for every further chunk. The colour is hexadecimal
/// because not every viewer supports `hsl()`.
fn colour(action: Action) -> String {
    let full = if action.computation == ComputationType::Forward { [96, 150, 222] } else { [104, 186, 116] };
    let white = (action.chunk * 64).min(192);
    let [red, green, blue] = full.map(|part: usize| part + (255 - part) * white / 256);
    format!("#{red:02x}{green:02x}{blue:02x}")
}

#[cfg(test)]
mod tests {
    use crate::pipeline::{Costs, PipelineKind, PipelineSchedule, PipelineShape, SendMode, StageTimes};

    #[test]
    fn every_pass_is_a_box_with_its_micro_batch() {
        let layout = PipelineShape::new(2, 2, 4).unwrap();
        let schedule = PipelineSchedule::new(PipelineKind::Interleaved1F1B, layout).unwrap();
        let times = StageTimes { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };
        let timeline = schedule.program(SendMode::Blocking).simulate(&Costs::uniform(layout, times)).unwrap();
        for picture in [schedule.to_svg(), timeline.to_svg()] {
            assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
            assert_eq!(picture.matches("<rect x=").count(), 2 * 2 * 2 * 4);
            for micro_batch in 0..4 {
                assert_eq!(picture.matches(&format!(">{micro_batch}</text>")).count(), 2 * 2 * 2);
            }
            for fill in ["#6096de", "#68ba74", "#87b0e6", "#8dcb96"] {
                assert_eq!(picture.matches(fill).count(), 2 * 4, "{fill}");
            }
            assert!(picture.contains(">rank 1</text>"));
        }
        // A backward pass takes twice as long, so it is twice as wide.
        assert_eq!(timeline.to_svg().matches("width=\"48.0\"").count(), 16);
        assert_eq!(timeline.to_svg().matches("width=\"24.0\"").count(), 16);
    }
}
