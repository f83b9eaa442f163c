//! A picture of a schedule or timeline as SVG: a row per rank, a box per pass with its micro-batch in it.

use super::{Pass, Schedule, Span, Timeline, Work};

/// Pixels per rank, and left of the first slot.
const ROW: f64 = 28.0;
const MARGIN: f64 = 56.0;
/// How far below the top of a row its text stands.
const BASE: f64 = 17.0;
/// The width of the shortest pass, wide enough for a micro-batch of three digits.
const SHORTEST: f64 = 24.0;

impl Schedule {
    /// The schedule as SVG, each slot of the same width.
    pub fn to_svg(&self) -> String {
        let spans = |row: &Vec<_>| {
            let works = row.iter().enumerate().filter_map(|(slot, &work)| Some((slot as f64, work?)));
            works.map(|(start, work)| Span { work, start, end: start + 1.0 }).collect()
        };
        svg(&self.rows().iter().map(spans).collect::<Vec<_>>())
    }
}

impl Timeline {
    /// The timeline as SVG, each pass as wide as it takes long.
    pub fn to_svg(&self) -> String {
        svg(&self.ranks)
    }
}

fn svg(ranks: &[Vec<Span>]) -> String {
    let spans = || ranks.iter().flatten();
    let shortest = spans().map(|span| span.end - span.start).filter(|&time| time > 0.0).fold(f64::INFINITY, f64::min);
    let scale = if shortest.is_finite() { SHORTEST / shortest } else { SHORTEST };
    let width = MARGIN + spans().map(|span| span.end * scale).fold(0.0, f64::max) + 1.0;
    let height = ROW * ranks.len() as f64 + 1.0;
    let mut picture = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"{width:.0}\" height=\"{height:.0}\" fill=\"white\"/>\n"
    );
    for (rank, row) in ranks.iter().enumerate() {
        let top = ROW * rank as f64 + 1.0;
        picture += &format!("<text x=\"8\" y=\"{}\">rank {rank}</text>\n", top + BASE);
        picture.extend(row.iter().map(|span| shape(span, scale, top)));
    }
    picture + "</svg>\n"
}

/// A box with its number.
fn shape(span: &Span, scale: f64, top: f64) -> String {
    let (left, wide, high) = (MARGIN + span.start * scale, (span.end - span.start) * scale, ROW - 2.0);
    let (centre, base, fill, number) = (left + wide / 2.0, top + BASE, colour(span.work), span.work.micro_batch);
    format!(
        "<rect x=\"{left:.1}\" y=\"{top}\" width=\"{wide:.1}\" height=\"{high}\" fill=\"{fill}\" stroke=\"white\"/>\n\
         <text x=\"{centre:.1}\" y=\"{base}\" text-anchor=\"middle\">{number}</text>\n"
    )
}

/// Blue for forward, green for backward, paler for every further chunk. Hexadecimal, because not every viewer knows `hsl()`.
fn colour(work: Work) -> String {
    let full = if work.pass == Pass::Forward { [96, 150, 222] } else { [104, 186, 116] };
    let white = (work.chunk * 64).min(192);
    let [red, green, blue] = full.map(|part: usize| part + (255 - part) * white / 256);
    format!("#{red:02x}{green:02x}{blue:02x}")
}

#[cfg(test)]
mod tests {
    use crate::pipeline::{Costs, Kind, Layout, Schedule, Transport};

    #[test]
    fn every_pass_is_a_box_with_its_micro_batch() {
        let layout = Layout::new(2, 2, 4).unwrap();
        let schedule = Schedule::new(Kind::Interleaved1F1B, layout).unwrap();
        let timeline = schedule.program(Transport::Blocking).simulate(&Costs::uniform(layout, 1.0, 2.0)).unwrap();
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
