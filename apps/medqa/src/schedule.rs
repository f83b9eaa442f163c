//! The verb `schedule`: prints and draws a pipeline schedule.

use crate::write;
use anyhow::Result;
use burn_zero::pipeline::{
    Action, ComputationType, Costs, PipelineError, PipelineKind, PipelineSchedule, PipelineShape, SendMode, StageTimes,
};
use clap::Args;
use std::{fmt::Write as _, path::PathBuf};

/// Arguments of `schedule`.
#[derive(Args)]
pub(crate) struct ScheduleArgs {
    /// Number of pipeline ranks; each has one stage or, if interleaved, several
    #[arg(long)]
    pub stages: usize,
    /// Micro-batches per optimizer step
    #[arg(long)]
    pub micro_batches: usize,
    /// Pipeline schedule: gpipe, 1f1b or interleaved1f1b
    #[arg(long, value_parser = parse_kind, default_value = "1f1b")]
    pub kind: PipelineKind,
    /// Stages per rank, for interleaved1f1b
    #[arg(long, default_value_t = 1)]
    pub chunks: usize,
    /// Time of a backward pass, where a forward pass takes 1
    #[arg(long, default_value_t = 2.0)]
    pub backward: f64,
    /// Draw the schedule to this SVG file
    #[arg(long)]
    pub svg: Option<PathBuf>,
    /// Write the schedule to this CSV file, in torchtitan's format
    #[arg(long)]
    pub csv: Option<PathBuf>,
}

fn parse_kind(name: &str) -> Result<PipelineKind, String> {
    let known = ["GPipe", "1F1B", "Interleaved1F1B"].into_iter().find(|known| known.eq_ignore_ascii_case(name));
    known.unwrap_or(name).parse().map_err(|error: PipelineError| error.to_string())
}

/// Runs the verb `schedule`: prints a table of what each rank computes when, the bubble, and the peak number of live
/// activations.
pub(crate) fn schedule(args: &ScheduleArgs) -> Result<()> {
    let shape = PipelineShape::new(args.stages, args.chunks, args.micro_batches)?;
    let schedule = PipelineSchedule::new(args.kind, shape)?;
    let program = schedule.program(SendMode::Blocking);
    program.validate(SendMode::Blocking)?;
    let times = StageTimes { forward: 1.0, backward_input: args.backward / 2.0, backward_weight: args.backward / 2.0 };
    let timeline = program.simulate(&Costs::uniform(shape, times))?;
    if let Some(path) = &args.csv {
        write::write_atomically(path, schedule.to_csv().as_bytes())?;
    }
    if let Some(path) = &args.svg {
        write::write_atomically(path, timeline.to_svg().as_bytes())?;
    }
    print!("{}", table(&schedule));
    println!("\nbubble           {:.1} %", 100.0 * timeline.bubble_fraction());
    println!(
        "time             {} (a forward pass of a stage is 1, a backward pass {})",
        timeline.makespan(),
        args.backward
    );
    let live: Vec<String> = program.peak_live_activations().iter().map(usize::to_string).collect();
    println!("live activations {} at most, by rank", live.join(", "));
    Ok(())
}

/// Formats one line per rank: forward passes as micro-batch numbers, backward passes in brackets, with the chunk after
/// a point if a rank has several.
fn table(schedule: &PipelineSchedule) -> String {
    let chunks = schedule.shape().stages() / schedule.shape().ranks();
    let cell = |work: Action| {
        let name =
            if chunks > 1 { format!("{}.{}", work.micro_batch, work.chunk) } else { work.micro_batch.to_string() };
        if work.computation == ComputationType::Forward { name } else { format!("[{name}]") }
    };
    let rows: Vec<Vec<String>> =
        schedule.rows().iter().map(|row| row.iter().map(|work| work.map(cell).unwrap_or_default()).collect()).collect();
    let width = rows.iter().flatten().map(String::len).max().unwrap_or(0);
    let mut text = String::new();
    for (rank, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row.iter().map(|cell| format!("{cell:>width$}")).collect();
        // Writing to a string does not fail.
        let _ = writeln!(text, "rank {rank} {}", cells.join(" ").trim_end());
    }
    text
}
