//! Measures the bubble of pipelines between real processes: `mpirun -n 4 bubble FOLDER`, see `tests/mpi/bubble`.
//!
//! Every segment of the model sleeps for 20 ms in its forward pass, 20 ms for the gradient of its input and 20 ms for that
//! of its weight, so a simulation of the schedule knows all times. Rank 0 prints a row per schedule that compares the time
//! of the shortest of some steps with the simulated one, and writes the trace of all ranks until then into the folder.
//! Between the threads of one process the bubble cannot be measured, because one of them computes at a time.

use burn_zero::{
    Engine, EngineConfig, Error, PipelineConfig,
    comm::{Collectives, Communicator, ProcessGroup, mpi},
    optimizer::AdamW,
    pipeline::{Costs, PipelineKind, PipelineSchedule, PipelineShape, SendMode, StageTimes, Timeline, TraceFile},
};
use model::{PASS, Sleeper, TrainBackend, input};
use std::{
    error::Error as StdError,
    fs,
    path::{Path, PathBuf},
};

mod model;

/// The most steps of a measurement: what else runs on the machine only ever lengthens a step.
const STEPS: usize = 8;
/// The largest part by which a step may be longer than the simulated one.
const TOLERANCE: f64 = 0.02;

/// A schedule that is measured.
struct Measurement {
    schedule: PipelineSchedule,
    simulated: Timeline,
    trace: PathBuf,
}

impl Measurement {
    fn new(kind: PipelineKind, ranks: usize, micro_batches: usize, folder: &Path) -> Result<Self, Error> {
        let chunks = kind.fixed_chunks().unwrap_or(1);
        let shape = PipelineShape::new(ranks, chunks, micro_batches)?.with_placement(kind.placement());
        let schedule = PipelineSchedule::new(kind, shape)?;
        let pass = PASS.as_secs_f64();
        let times = StageTimes { forward: pass, backward_input: pass, backward_weight: pass };
        let stages = vec![times; shape.stages()];
        let costs = Costs { stages, message: 0.0, send_mode: SendMode::Buffered };
        let simulated = schedule.program(SendMode::Buffered).simulate(&costs)?;
        let trace = folder.join(format!("{kind}-{ranks}-{micro_batches}.json"));
        Ok(Self { schedule, simulated, trace })
    }

    fn engine(
        &self,
        kind: PipelineKind,
        group: &mut ProcessGroup,
    ) -> Result<Engine<TrainBackend, Sleeper<TrainBackend>>, Error> {
        let shape = self.schedule.shape();
        let segments = (0..shape.stages()).map(|stage| stage..stage + 1).collect();
        let pipeline = PipelineConfig { ranks: shape.ranks(), kind, chunks: shape.chunks(), segments };
        let communicator = group.split(0, group.rank())?;
        let config = EngineConfig::new(AdamW::default()).with_communicator(communicator).with_pipeline(pipeline);
        config.init(Sleeper::new(shape.stages()))
    }

    /// Trains until a step is as long as the simulated one, to [`TOLERANCE`], and returns the timeline of that step, or
    /// of the shortest. The trace ends with that step if it is near enough.
    fn run(&self, kind: PipelineKind, group: &mut ProcessGroup) -> Result<Option<Timeline>, Box<dyn StdError>> {
        let mut engine = self.engine(kind, group)?;
        let batches: Vec<_> = (0..self.schedule.shape().micro_batches()).map(input).collect();
        let mut shortest: Option<Timeline> = None;
        for _ in 0..STEPS {
            engine.train_step(&batches, 1e-3)?;
            engine.write_trace(&self.trace)?;
            if group.rank() == 0 {
                let found = TraceFile::parse(&fs::read_to_string(&self.trace)?)?.timeline(&self.schedule)?;
                if shortest.as_ref().is_none_or(|shortest| found.makespan() < shortest.makespan()) {
                    shortest = Some(found);
                }
            }
            let is_near = shortest.as_ref().is_some_and(|found| self.excess(found) <= TOLERANCE);
            let mut near = [f32::from(u8::from(is_near))];
            group.all_reduce(&mut near)?;
            if near[0] > 0.0 {
                break;
            }
        }
        Ok(shortest)
    }

    /// Returns the part by which a step was longer than the simulated one.
    fn excess(&self, measured: &Timeline) -> f64 {
        measured.makespan() / self.simulated.makespan() - 1.0
    }

    /// Returns a row of the table.
    fn row(&self, kind: PipelineKind, measured: &Timeline) -> String {
        let shape = self.schedule.shape();
        let [simulated, found] =
            [&self.simulated, measured].map(|timeline| (1e3 * timeline.makespan(), timeline.bubble_fraction()));
        let excess = 100.0 * self.excess(measured);
        let (ranks, micro_batches) = (shape.ranks(), shape.micro_batches());
        format!(
            "| {kind} | {ranks} | {micro_batches} | {:.0} | {:.1} | {excess:+.1} % | {:.4} | {:.4} |",
            simulated.0, found.0, simulated.1, found.1
        )
    }
}

fn measure(group: &mut ProcessGroup, folder: &Path) -> Result<(), Box<dyn StdError>> {
    let ranks = group.world_size();
    let schedules = [
        (PipelineKind::OneFOneB, 4),
        (PipelineKind::OneFOneB, 8),
        (PipelineKind::ZBH1, 4),
        (PipelineKind::ZBH1, 8),
        (PipelineKind::ZBV, 4),
        (PipelineKind::ZBV, 8),
    ];
    // With four ranks, four micro-batches do not fill the pipeline of a zero-bubble schedule.
    for (kind, micro_batches) in schedules.into_iter().filter(|&(_, micro_batches)| micro_batches >= 2 * ranks) {
        let measurement = Measurement::new(kind, ranks, micro_batches, folder)?;
        let Some(measured) = measurement.run(kind, group)? else { continue };
        println!("{}", measurement.row(kind, &measured));
        if measurement.excess(&measured) > TOLERANCE {
            return Err(format!("{kind}: none of {STEPS} steps lay within {TOLERANCE} of the simulated time").into());
        }
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn StdError>> {
    let folder = std::env::args().nth(1).ok_or("usage: mpirun -n 4 bubble FOLDER")?;
    let (session, mut group) = mpi::Session::init()?;
    if let Err(error) = measure(&mut group, Path::new(&folder)) {
        eprintln!("rank {}: {error}", group.rank());
        // Exit without `finalize`, so that mpirun ends the other ranks.
        std::process::exit(1);
    }
    session.finalize();
    Ok(())
}
