//! Histograms as SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use std::sync::Once;

const SIZE: (u32, u32) = (640, 260);
const BINS: usize = 40;
const BAR: RGBColor = RGBColor(31, 119, 180);
static FONT: Once = Once::new();

/// Draws the histogram of lengths up to their 99th percentile; longer ones stand in the last bar.
///
/// # Errors
/// If the plot cannot be drawn.
pub(super) fn svg(lengths: &[usize], unit: &str) -> Result<String> {
    // This fails only if the bytes are not a font; drawing the first text then reports it.
    FONT.call_once(|| drop(plotters::style::register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())));
    let mut sorted = lengths.to_vec();
    sorted.sort_unstable();
    let end = sorted.get((sorted.len() * 99).div_ceil(100).max(1) - 1).copied().unwrap_or(1).max(1);
    let width = (end as f64 / BINS as f64).max(1.0);
    let mut counts = [0_u32; BINS];
    sorted.iter().for_each(|&length| counts[((length as f64 / width) as usize).min(BINS - 1)] += 1);
    let highest = counts.iter().copied().max().unwrap_or(1).max(1);
    let mut text = String::new();
    draw(&mut text, &counts, width, (highest, unit)).map_err(|error| anyhow!("{error}"))?;
    Ok(text)
}

fn draw(
    into: &mut String,
    counts: &[u32],
    width: f64,
    (highest, unit): (u32, &str),
) -> Result<(), Box<dyn std::error::Error>> {
    let canvas = SVGBackend::with_string(into, SIZE).into_drawing_area();
    let mut chart = ChartBuilder::on(&canvas)
        .margin(10)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..width * BINS as f64, 0_u32..highest + highest / 10 + 1)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_desc(unit)
        .y_desc("rows")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .draw()?;
    let bars = counts.iter().enumerate().map(|(bin, &count)| {
        let start = bin as f64 * width;
        Rectangle::new([(start, 0), (start + width * 0.9, count)], BAR.filled())
    });
    chart.draw_series(bars)?;
    canvas.present()?;
    Ok(())
}
