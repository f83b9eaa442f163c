//! Pipeline schedules to look at.

use crate::{cli::ScheduleArgs, write};
use anyhow::Result;
use burn_zero::pipeline::{Costs, Layout, Pass, Schedule, Transport, Work};
use std::fmt::Write as _;

/// The verb `schedule`: a table of who computes what when, the idle share, and the most live activations.
pub fn schedule(args: &ScheduleArgs) -> Result<()> {
    let layout = Layout::new(args.stages, args.chunks, args.micro_batches)?;
    let schedule = Schedule::new(args.kind, layout)?;
    let program = schedule.program(Transport::Blocking);
    program.validate(Transport::Blocking)?;
    let timeline = program.simulate(&Costs::uniform(layout, 1.0, args.backward))?;
    if let Some(path) = &args.csv {
        write::whole(path, schedule.to_csv().as_bytes())?;
    }
    if let Some(path) = &args.svg {
        write::whole(path, timeline.to_svg().as_bytes())?;
    }
    print!("{}", table(&schedule));
    println!("\nbubble           {:.1} %", 100.0 * timeline.bubble_fraction());
    println!(
        "time             {} (a forward pass of a stage is 1, a backward pass {})",
        timeline.makespan(),
        args.backward
    );
    let live: Vec<String> = program.peak_live().iter().map(usize::to_string).collect();
    println!("live activations {} at most, by rank", live.join(", "));
    Ok(())
}

/// A line per rank: forward passes as numbers, backward passes in brackets, with the chunk behind a point if there are several.
fn table(schedule: &Schedule) -> String {
    let chunks = schedule.layout().stages() / schedule.layout().ranks();
    let cell = |work: Work| {
        let name =
            if chunks > 1 { format!("{}.{}", work.micro_batch, work.chunk) } else { work.micro_batch.to_string() };
        if work.pass == Pass::Forward { name } else { format!("[{name}]") }
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
