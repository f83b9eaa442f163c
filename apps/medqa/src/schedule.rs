//! The verb `schedule`: prints and draws a pipeline schedule, beside a measured one, and divides a model into stages.

use crate::{estimate, recipe::MethodKind, write};
use anyhow::{Context, Result, bail};
use burn_zero::pipeline::{
    Action, ComputationType, Costs, PipelineKind, PipelineSchedule, PipelineShape, Program, SendMode, StageTimes,
    Timeline, TraceFile,
};
use clap::Args;
use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

mod measure;

/// Arguments of `schedule`.
#[derive(Args)]
pub(crate) struct ScheduleArgs {
    /// Number of pipeline ranks; each has one stage, or with --chunks several
    #[arg(long)]
    pub stages: usize,
    /// Micro-batches per optimizer step
    #[arg(long)]
    pub micro_batches: usize,
    /// Pipeline schedule: GPipe, 1F1B, Interleaved1F1B, LoopedBFS, ZB-H1 (InterleavedZeroBubble) or ZBV (ZBVZeroBubble)
    #[arg(long, default_value = "1F1B")]
    pub kind: PipelineKind,
    /// Stages per rank, for Interleaved1F1B and LoopedBFS; ZBV has 2, the others 1
    #[arg(long)]
    pub chunks: Option<usize>,
    #[command(flatten)]
    pub times: PassTimes,
    #[command(flatten)]
    pub files: ScheduleFiles,
    #[command(flatten)]
    pub measure: MeasuredModel,
}

/// The times of the simulated passes.
#[derive(Args)]
pub(crate) struct PassTimes {
    /// Time of a backward pass, where a forward pass takes 1
    #[arg(long, default_value_t = 2.0, conflicts_with = "trace")]
    pub backward: f64,
    /// Part of --backward that computes the gradients of weights, which ZB-H1 and ZBV put off [default: half]
    #[arg(long, conflicts_with = "trace")]
    pub backward_weight: Option<f64>,
}

/// The files that are read and written.
#[derive(Args)]
pub(crate) struct ScheduleFiles {
    /// Draw the schedule to this SVG file
    #[arg(long)]
    pub svg: Option<PathBuf>,
    /// Write the schedule to this CSV file, in torchtitan's format
    #[arg(long)]
    pub csv: Option<PathBuf>,
    /// Compare with the last step of this trace of a run (recipe key parallel.trace): simulate with its mean times, draw
    /// the measured timeline above the simulated one, and print both bubbles
    #[arg(long)]
    pub trace: Option<PathBuf>,
}

/// The model that is measured and divided into stages.
#[derive(Args)]
pub(crate) struct MeasuredModel {
    /// Measure the time of each segment of this model by two training steps on meaningless tokens, and print the
    /// partition into stages that the times give
    #[arg(long, value_name = "MODEL")]
    pub measure: Option<String>,
    /// Fine-tuning method of --measure: full or lora
    #[arg(long, default_value = "lora", value_parser = estimate::parse_method, requires = "measure")]
    pub method: MethodKind,
    /// Tokens in the micro-batch of --measure
    #[arg(long, default_value = "512", value_parser = clap::value_parser!(u64).range(1..), requires = "measure")]
    pub tokens: u64,
}

/// Runs the verb `schedule`: prints a table of what each rank computes when, the bubble, and the peak number of live
/// activations.
pub(crate) fn schedule(args: &ScheduleArgs) -> Result<()> {
    let chunks = args.chunks.or(args.kind.fixed_chunks()).unwrap_or(1);
    let shape = PipelineShape::new(args.stages, chunks, args.micro_batches)?.with_placement(args.kind.placement());
    let schedule = PipelineSchedule::new(args.kind, shape)?;
    let program = schedule.program(SendMode::Buffered);
    program.validate(SendMode::Buffered)?;
    let measured = args.files.trace.as_deref().map(|path| measured_timeline(path, &schedule)).transpose()?;
    let stages = match &measured {
        Some(measured) => measured.mean_times(shape),
        None => vec![args.times.stage_times()?; shape.stages()],
    };
    let simulated = program.simulate(&Costs { stages, message: 0.0, send_mode: SendMode::Buffered })?;
    let partition = args.measure.partition(shape.stages())?;
    if let Some(path) = &args.files.csv {
        write::write_atomically(path, schedule.to_csv().as_bytes())?;
    }
    if let Some(path) = &args.files.svg {
        let picture = match &measured {
            Some(measured) => measured.to_svg_above("measured", ("simulated", &simulated)),
            None => simulated.to_svg(),
        };
        write::write_atomically(path, picture.as_bytes())?;
    }
    print!("{}", table(&schedule));
    match &measured {
        Some(measured) => print_comparison(measured, &simulated),
        None => print_simulated(&simulated, args.times.backward),
    }
    print_activations(&program);
    print!("{}", partition.unwrap_or_default());
    Ok(())
}

/// Reads the timeline of the last step in a trace file.
fn measured_timeline(path: &Path, schedule: &PipelineSchedule) -> Result<Timeline> {
    let read = || -> Result<Timeline> { Ok(TraceFile::parse(&fs::read_to_string(path)?)?.timeline(schedule)?) };
    read().with_context(|| path.display().to_string())
}

impl PassTimes {
    /// Returns the times of a stage.
    ///
    /// # Errors
    /// If a time is negative or not finite, or the part is larger than the whole.
    fn stage_times(&self) -> Result<StageTimes> {
        let Self { backward, backward_weight } = *self;
        if !(backward.is_finite() && backward >= 0.0) {
            bail!("`--backward`: expected a time of at least 0, found {backward}");
        }
        let weight = backward_weight.unwrap_or(backward / 2.0);
        if !(0.0..=backward).contains(&weight) {
            bail!("`--backward-weight`: expected a part of the backward pass, from 0 to {backward}, found {weight}");
        }
        Ok(StageTimes { forward: 1.0, backward_input: backward - weight, backward_weight: weight })
    }
}

impl MeasuredModel {
    /// Measures the model and returns the text that tells the times and the partition; `None` without a model.
    fn partition(&self, stages: usize) -> Result<Option<String>> {
        let model = self.measure.as_ref();
        model.map(|model| measure::partition_text(model, self.method, self.tokens, stages)).transpose()
    }
}

fn print_simulated(timeline: &Timeline, backward: f64) {
    println!("\nbubble           {:.1} %", 100.0 * timeline.bubble_fraction());
    println!("time             {} (a forward pass of a stage is 1, a backward pass {backward})", timeline.makespan());
    let idle: Vec<String> = timeline.idle_within().iter().map(f64::to_string).collect();
    println!("idle within      {} between the first and the last pass, by rank", idle.join(", "));
}

fn print_comparison(measured: &Timeline, simulated: &Timeline) {
    println!("\n                 measured    simulated with the mean times");
    let row = |name: &str, value: &dyn Fn(&Timeline) -> String| {
        println!("{name:<17}{:<12}{}", value(measured), value(simulated));
    };
    row("bubble", &|timeline| format!("{:.1} %", 100.0 * timeline.bubble_fraction()));
    row("milliseconds", &|timeline| format!("{:.1}", 1e3 * timeline.makespan()));
    let within = |timeline: &Timeline| 1e3 * timeline.idle_within().iter().copied().fold(0.0, f64::max);
    row("idle within", &|timeline| format!("{:.1} ms at most", within(timeline)));
}

fn print_activations(program: &Program) {
    let list = |peaks: Vec<usize>| peaks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    println!("live activations {} at most, by rank", list(program.peak_live_activations()));
    println!("kept for weights {} at most, by rank", list(program.peak_kept_activations()));
}

/// Formats one line per rank: forward passes as micro-batch numbers, backward passes in brackets, their input halves in
/// parentheses and their weight halves in braces, with the chunk after a point if a rank has several.
fn table(schedule: &PipelineSchedule) -> String {
    let chunks = schedule.shape().chunks();
    let cell = |work: Action| {
        let name =
            if chunks > 1 { format!("{}.{}", work.micro_batch, work.chunk) } else { work.micro_batch.to_string() };
        match work.computation {
            ComputationType::Forward => name,
            ComputationType::Backward => format!("[{name}]"),
            ComputationType::BackwardInput => format!("({name})"),
            ComputationType::BackwardWeight => format!("{{{name}}}"),
        }
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
