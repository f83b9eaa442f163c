//! `schedule --measure`: the time of each segment of a model, and the stages that the times give.

use crate::{estimate, fetch, footprint::model_shape, recipe::MethodKind};
use anyhow::{Context, Result};
use burn_zero::pipeline::{PartitionMethod, TraceFile};
use std::{fmt::Write as _, fs};

/// Runs two training steps, and formats a line per segment and the partition into `stages` stages: by the measured
/// times, and by counted operations.
///
/// # Errors
/// If the model cannot be loaded, or has fewer segments than there are stages.
pub(super) fn partition_text(model: &str, method: MethodKind, tokens: u64, stages: usize) -> Result<String> {
    let shape = model_shape(fetch::open_checkpoint(model)?.config());
    let row = tokens.min(estimate::MAX_ROW_TOKENS);
    let by = |weights: &[u64]| PartitionMethod::Weighted(weights.to_vec()).split(weights, stages);
    // This also tells a number of stages that the model does not have segments for, before anything is measured.
    let by_flops = by(&shape.segment_flops(row, row))?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("trace.json");
    estimate::trace_two_steps(model, method, tokens, &path)?;
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let times = TraceFile::parse(&text)?.segment_times();
    let by_time = by(&times)?;
    let sizes = |parts: &[std::ops::Range<usize>]| parts.iter().map(|part| part.len()).collect::<Vec<_>>();
    let milliseconds = |nanoseconds: u64| nanoseconds as f64 / 1e6;
    let mut lines = String::from("\nsegment                  ms  stage\n");
    for (segment, time) in times.iter().enumerate() {
        let stage = by_time.iter().position(|part| part.contains(&segment)).unwrap_or(0);
        let name = segment_name(segment, times.len());
        // Writing to a string does not fail.
        let _ = writeln!(lines, "{name:<20}{:>7.2}{stage:>7}", milliseconds(*time));
    }
    let heaviest = by_time.iter().map(|part| times[part.clone()].iter().sum::<u64>()).max().unwrap_or(0);
    let mean = times.iter().sum::<u64>() / stages as u64;
    let _ = writeln!(
        lines,
        "partition        {:?} segments by time: the heaviest stage takes {:.2} ms, the mean {:.2} ms",
        sizes(&by_time),
        milliseconds(heaviest),
        milliseconds(mean)
    );
    let _ = writeln!(lines, "                 {:?} segments by counted operations", sizes(&by_flops));
    Ok(lines)
}

/// Returns the name of a segment: the embedding, two blocks per layer, the head.
fn segment_name(segment: usize, segments: usize) -> String {
    match segment {
        0 => "embedding".to_owned(),
        _ if segment + 1 == segments => "head".to_owned(),
        _ if segment % 2 == 1 => format!("layer {} attention", segment / 2),
        _ => format!("layer {} MLP", segment / 2 - 1),
    }
}
