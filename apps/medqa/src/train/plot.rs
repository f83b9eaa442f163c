//! The loss curves of a run, plotted as a PNG file.

use super::{
    event::{Reporter, RunEnd, RunEvent},
    record::MetricsRecord,
};
use anyhow::{Context, Result, bail};
use plotters::{
    coord::{Shift, types::RangedCoordf64, types::RangedCoordi64},
    prelude::*,
};
use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
    sync::Once,
};

/// The width of the plot, in pixels.
const WIDTH: u32 = 1200;
/// The height of the plot, in pixels.
const HEIGHT: u32 = 700;
/// The factor by which the plot is drawn larger and then averaged, because plotters does not antialias thick lines.
const SCALE: u32 = 3;

const RAW: RGBColor = RGBColor(152, 187, 224);
const SMOOTH: RGBColor = RGBColor(31, 119, 180);
const VALID: RGBColor = RGBColor(214, 75, 20);
const INK: RGBColor = RGBColor(51, 51, 51);
const GRID: RGBColor = RGBColor(226, 226, 226);

/// The points of a curve: steps and losses.
type Points = Vec<(i64, f64)>;
type Canvas<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, BitMapBackend<'b>, Cartesian2d<RangedCoordi64, RangedCoordf64>>;

/// Reporter that plots the training loss, raw and smoothed, and the validation loss at the end of a run. Values that are
/// not finite are left out.
pub(super) struct LossPlot {
    png: PathBuf,
    train: Points,
    valid: Points,
}

impl LossPlot {
    /// Creates the reporter of the plot `png`.
    pub(super) fn new(png: PathBuf) -> Self {
        Self { png, train: Points::new(), valid: Points::new() }
    }

    fn add(&mut self, record: &MetricsRecord) {
        let (points, loss) = match record {
            MetricsRecord::Step(record) => (&mut self.train, record.loss),
            MetricsRecord::Eval(record) => (&mut self.valid, record.valid_loss),
            MetricsRecord::Note(_) => return,
        };
        if loss.is_finite() {
            points.push((record.step() as i64, loss));
        }
    }

    fn write(&self) -> Result<()> {
        if self.train.is_empty() && self.valid.is_empty() {
            bail!("expected a finite training or validation loss, found none; there is nothing to draw");
        }
        let mut pixels = vec![0; (WIDTH * SCALE * HEIGHT * SCALE * 3) as usize];
        let canvas = BitMapBackend::with_buffer(&mut pixels, (WIDTH * SCALE, HEIGHT * SCALE)).into_drawing_area();
        draw(&canvas, &self.train, &self.valid)?;
        drop(canvas);
        save(&downsample(&pixels), &self.png)
    }
}

impl Reporter for LossPlot {
    fn report(&mut self, event: &RunEvent) -> Result<()> {
        match event {
            RunEvent::Started(start) => start.earlier.iter().for_each(|record| self.add(record)),
            RunEvent::Record(record) => self.add(record),
            RunEvent::Finished(RunEnd::Complete) => {
                if let Err(error) = self.write() {
                    eprintln!("warning: the plot of the losses cannot be written: {error:#}");
                }
            }
            RunEvent::TraceWritten(_) | RunEvent::Finished(RunEnd::Interrupted) => {}
        }
        Ok(())
    }
}

/// Returns an exponential moving average, whose weight for past values grows with the number of points: 0 for no point,
/// 0.42 for 20 and 0.89 for 100, as in LLaMA-Factory's `extras/ploting.py`.
fn smooth(points: &[(i64, f64)]) -> Points {
    let weight = 1.8 * (1.0 / (1.0 + (-0.05 * points.len() as f64).exp()) - 0.5);
    let mut last = points.first().map_or(0.0, |&(_, loss)| loss);
    let smooth = points.iter().map(|&(step, loss)| {
        last = weight * last + (1.0 - weight) * loss;
        (step, last)
    });
    smooth.collect()
}

fn draw(canvas: &Canvas, train: &[(i64, f64)], valid: &[(i64, f64)]) -> Result<()> {
    static FONT: Once = Once::new();
    // This fails only if the bytes are not a font; drawing the first text then reports it.
    FONT.call_once(|| drop(plotters::style::register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())));
    canvas.fill(&WHITE)?;
    let (steps, losses) = axis_ranges(train.iter().chain(valid));
    let decimals = if losses.end - losses.start < 0.4 { 3 } else { 2 };
    let mut chart = ChartBuilder::on(canvas)
        .margin(px(20))
        .margin_right(px(36))
        .caption("Loss over training steps", text(22))
        .x_label_area_size(px(56))
        .y_label_area_size(px(80))
        .build_cartesian_2d(steps, losses)?;
    let mesh = chart
        .configure_mesh()
        .x_desc("Step")
        .y_desc("Loss")
        .x_labels(11)
        .y_labels(9)
        .axis_desc_style(text(18))
        .label_style(text(15))
        .axis_style(line(INK, 1))
        .bold_line_style(line(GRID, 1))
        .light_line_style(TRANSPARENT)
        .set_all_tick_mark_size(px(4))
        .y_label_formatter(&|loss| format!("{loss:.decimals$}"))
        .draw();
    mesh?;
    draw_train(&mut chart, train)?;
    draw_valid(&mut chart, valid)?;
    let mut legend = chart.configure_series_labels();
    legend.position(SeriesLabelPosition::UpperRight).margin(px(14)).legend_area_size(px(34)).label_font(text(16));
    legend.background_style(WHITE.mix(0.9)).border_style(ShapeStyle { filled: false, ..line(GRID, 1) }).draw()?;
    canvas.present()?;
    Ok(())
}

fn draw_train(chart: &mut Chart, train: &[(i64, f64)]) -> Result<()> {
    if train.is_empty() {
        return Ok(());
    }
    let raw = ShapeStyle { stroke_width: px(3) as u32 / 2, ..line(RAW, 1) };
    for (points, name, style) in
        [(train, "training loss", raw), (&smooth(train), "training loss, smoothed", line(SMOOTH, 3))]
    {
        // Not one path, because plotters mitres its corners, which turns a noisy loss into long spikes.
        let series = chart.draw_series(points.windows(2).map(|ends| PathElement::new(ends, style)))?;
        series.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + px(26), y)], style));
        let corner = style.stroke_width / 2;
        chart.draw_series(points.iter().map(|&point| Circle::new(point, corner, style)))?;
    }
    // A line through a single point is not visible.
    if let [point] = train {
        chart.draw_series([Circle::new(*point, px(4), SMOOTH.filled())])?;
    }
    Ok(())
}

fn draw_valid(chart: &mut Chart, valid: &[(i64, f64)]) -> Result<()> {
    if valid.is_empty() {
        return Ok(());
    }
    chart.draw_series(valid.windows(2).map(|ends| PathElement::new(ends, line(VALID, 1))))?;
    let dots = chart.draw_series(valid.iter().map(|&point| Circle::new(point, px(5), VALID.filled())))?;
    dots.label("validation loss").legend(|(x, y)| Circle::new((x + px(13), y), px(5), VALID.filled()));
    Ok(())
}

/// Returns the ranges of the axes: the points and a margin, never empty.
fn axis_ranges<'a>(points: impl Iterator<Item = &'a (i64, f64)>) -> (Range<i64>, Range<f64>) {
    let (mut steps, mut losses) = ((i64::MAX, i64::MIN), (f64::INFINITY, f64::NEG_INFINITY));
    for &(step, loss) in points {
        steps = (steps.0.min(step), steps.1.max(step));
        losses = (losses.0.min(loss), losses.1.max(loss));
    }
    // The first step is 1, and an axis from 0 has rounder labels.
    let first = if steps.0 <= 1 + steps.1 / 50 { 0 } else { steps.0 };
    let after = (steps.1 - first) / 100;
    let around = ((losses.1 - losses.0) * 0.06).max(losses.1.abs() * 0.01).max(1e-3);
    (first..(steps.1 + after).max(first + 2), losses.0 - around..losses.1 + around)
}

/// Converts a length to pixels of the larger canvas.
fn px(length: u32) -> i32 {
    (length * SCALE) as i32
}

fn text(size: u32) -> TextStyle<'static> {
    ("sans-serif", size * SCALE).into_font().color(&INK)
}

fn line(color: RGBColor, width: u32) -> ShapeStyle {
    ShapeStyle { color: color.to_rgba(), filled: true, stroke_width: width * SCALE }
}

/// Averages squares of pixels down to the size of the plot.
fn downsample(pixels: &[u8]) -> Vec<u8> {
    let (scale, width) = (SCALE as usize, WIDTH as usize);
    let mut small = Vec::with_capacity(pixels.len() / scale / scale);
    for row in 0..HEIGHT as usize {
        for byte in 0..width * 3 {
            let (column, color) = (byte / 3, byte % 3);
            let at = |y, x| pixels[((row * scale + y) * width * scale + column * scale + x) * 3 + color] as usize;
            let sum: usize = (0..scale).flat_map(|y| (0..scale).map(move |x| (y, x))).map(|(y, x)| at(y, x)).sum();
            small.push((sum / scale / scale) as u8);
        }
    }
    small
}

/// Writes the plot to a temporary file, then renames it. Plotters takes the format from the extension.
fn save(pixels: &[u8], png: &Path) -> Result<()> {
    let partial = png.with_extension("part.png");
    let context = || format!("{}: cannot be written", png.display());
    let written = || -> Result<()> {
        let mut picture = BitMapBackend::new(&partial, (WIDTH, HEIGHT));
        picture.blit_bitmap((0, 0), (WIDTH, HEIGHT), pixels)?;
        picture.present()?;
        Ok(fs::rename(&partial, png)?)
    };
    written().inspect_err(|_| drop(fs::remove_file(&partial))).with_context(context)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{
        event::RunStart,
        record::{EvalRecord, StepRecord},
    };

    fn step(step: usize, loss: f64) -> MetricsRecord {
        MetricsRecord::Step(StepRecord { step, loss, ..StepRecord::default() })
    }

    fn eval(step: usize, valid_loss: f64) -> MetricsRecord {
        MetricsRecord::Eval(EvalRecord { step, valid_loss, elapsed_seconds: 0.0 })
    }

    /// Plots records and returns the width and height in the header of the PNG file.
    fn drawn(records: &[MetricsRecord]) -> Result<(u32, u32)> {
        let directory = tempfile::tempdir().unwrap();
        let png = directory.path().join("training_loss.png");
        let mut plot = LossPlot::new(png.clone());
        records.iter().for_each(|record| plot.add(record));
        plot.write()?;
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left beside the picture");
        let bytes = fs::read(&png).unwrap();
        assert_eq!(bytes[..8], *b"\x89PNG\r\n\x1a\n");
        let side = |at| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
        Ok((side(16), side(20)))
    }

    #[test]
    fn runs_of_every_shape_are_drawn() {
        for records in [
            &[step(1, 2.5)][..],
            &[eval(0, 0.0)],
            &[step(1, 2.5), eval(1, 2.5)],
            &[step(1, 2.5), step(2, f64::NAN), step(3, 2.5)],
            &[step(5000, 1e30), step(5001, -3.0)],
        ] {
            assert_eq!(drawn(records).unwrap(), (WIDTH, HEIGHT), "{records:?}");
        }
    }

    #[test]
    fn a_run_without_a_finite_loss_is_not_drawn() {
        for records in [&[][..], &[step(1, f64::NAN), eval(1, f64::INFINITY)]] {
            let error = drawn(records).unwrap_err().to_string();
            assert_eq!(error, "expected a finite training or validation loss, found none; there is nothing to draw");
        }
    }

    #[test]
    fn records_from_before_a_resume_are_drawn_too() {
        let directory = tempfile::tempdir().unwrap();
        let png = directory.path().join("training_loss.png");
        let mut plot = LossPlot::new(png.clone());
        let start = RunStart { total_steps: 2, eval_every: 2, earlier: &[step(1, 2.5)] };
        plot.report(&RunEvent::Started(start)).unwrap();
        plot.report(&RunEvent::Record(&step(2, 2.0))).unwrap();
        assert_eq!(plot.train, [(1, 2.5), (2, 2.0)]);
        plot.report(&RunEvent::Finished(RunEnd::Interrupted)).unwrap();
        assert!(!png.exists());
        plot.report(&RunEvent::Finished(RunEnd::Complete)).unwrap();
        assert!(png.exists());
    }

    #[test]
    fn smoothing_keeps_a_constant_and_calms_the_rest() {
        let points = |loss: fn(i64) -> f64| (1..=100).map(|step| (step, loss(step))).collect::<Points>();
        let constant = points(|_| 2.0);
        assert!(smooth(&constant).iter().zip(&constant).all(|(a, b)| a.0 == b.0 && (a.1 - b.1).abs() < 1e-12));
        let width = |points: &[(i64, f64)]| axis_ranges(points.iter()).1;
        let noise = points(|step| if step % 2 == 0 { 1.0 } else { 3.0 });
        let (before, after) = (width(&noise), width(&smooth(&noise)[50..]));
        assert!(after.end - after.start < 0.1 * (before.end - before.start));
        assert!(smooth(&[]).is_empty());
        assert_eq!(smooth(&[(1, 0.5)]), [(1, 0.5)]);
    }
}
