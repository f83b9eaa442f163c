//! Pipelines between real processes, alone and beside data parallelism.

use crate::{BUCKET, different, stack::*};
use burn_zero::{
    Engine, EngineConfig, Error, PipelineConfig, Sharding, ZeroStage,
    comm::{Communicator, ProcessGroup},
    pipeline::{PartitionMethod, PipelineKind},
    segment::Segments,
};

const STEPS: usize = 5;
/// The micro-batches of a step in one process: enough to fill the pipeline of ZBV with four ranks.
const MICRO_BATCHES: usize = 12;

/// The schedules, with chunks per rank.
const KINDS: [(PipelineKind, usize); 6] = [
    (PipelineKind::GPipe, 1),
    (PipelineKind::OneFOneB, 1),
    (PipelineKind::ZBH1, 1),
    (PipelineKind::Interleaved1F1B, 2),
    (PipelineKind::LoopedBFS, 2),
    (PipelineKind::ZBV, 2),
];

type StackEngine = Engine<TrainBackend, Stack<TrainBackend>>;

/// Returns the pipeline of a kind; none if the model has fewer segments than stages.
pub(crate) fn of_kind(ranks: usize, kind: PipelineKind, chunks: usize) -> Option<PipelineConfig> {
    let model = ModelVariant { tied: false, frozen: false }.stack();
    let segments = PartitionMethod::Uniform.split(&vec![1; model.segments()], ranks * chunks).ok()?;
    Some(PipelineConfig { ranks, kind, chunks, segments })
}

/// The outcome of some steps.
struct Trained {
    /// The sum of the losses of all ranks, by step.
    losses: Vec<f64>,
    /// The parameters that this rank keeps.
    values: Values,
}

fn train(mut engine: StackEngine) -> Result<Trained, Error> {
    let replicas = engine.replicas();
    let mut losses = Vec::new();
    for step in 0..STEPS {
        let own = (engine.replica()..MICRO_BATCHES).step_by(replicas);
        let micro_batches: Vec<_> = own.map(|micro| rows(step * MICRO_BATCHES + micro)).collect();
        let loss = engine.train_step(&micro_batches, 1e-3)?.loss;
        losses.push(engine.sum_over_ranks(&[loss])?[0]);
    }
    let mut values = values(engine.model());
    values.retain(|_, values| values.len() > 1);
    Ok(Trained { losses, values })
}

/// Compares a rank of pipelines with one process. One pipeline adds all gradients in the same order; the table of a tied
/// model and the sum over several pipelines have another order.
fn compare(found: &Trained, one: &Trained, same_order: bool, what: &str) {
    assert!(!found.values.is_empty(), "{what}: a rank keeps some parameters");
    if same_order {
        assert_eq!(found.losses, one.losses, "{what}");
        let own = one.values.iter().filter(|(name, _)| found.values.contains_key(*name));
        let own = own.map(|(name, values)| (*name, values.clone())).collect();
        assert_eq!(different(&found.values, &own), 0, "values that differ: {what}");
        return;
    }
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-5 * b.abs().max(1e-2);
    assert!(
        found.losses.iter().zip(&one.losses).all(|(&a, &b)| near(a, b)),
        "{what}: {:?} {:?}",
        found.losses,
        one.losses
    );
    for (name, values) in &found.values {
        let pairs = values.iter().zip(&one.values[name]);
        let apart = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart <= 1e-5, "{what}: {name} is {apart:e} off");
    }
}

/// Checks that every schedule on all ranks, and on each half of four with ZeRO, gives the result of one process.
pub(crate) fn laws(group: &mut ProcessGroup) -> Result<(), Error> {
    let (rank, world) = (group.rank(), group.world_size());
    for (tied, frozen) in [(false, false), (true, false), (false, true)] {
        let variant = ModelVariant { tied, frozen };
        for clip in [Some(0.5), None] {
            let config = || crate::config(clip);
            let one = train(config().init(variant.stack())?)?;
            let mut layouts = vec![(world, ZeroStage::Disabled)];
            if world == 4 {
                layouts.extend(
                    [ZeroStage::Disabled, ZeroStage::OptimizerStates, ZeroStage::Gradients].map(|stage| (2, stage)),
                );
            }
            for (ranks, stage) in layouts {
                for (kind, chunks) in KINDS {
                    let Some(pipeline) = of_kind(ranks, kind, chunks) else { continue };
                    let what = format!(
                        "{variant:?}, clipped to {clip:?}, {kind} of {ranks} ranks, {stage:?}, rank {rank} of {world}"
                    );
                    let config: EngineConfig = config().with_communicator(group.split(0, rank)?);
                    let sharding = Sharding { stage, bucket_size: BUCKET };
                    let engine = config.with_sharding(sharding).with_pipeline(pipeline).init(variant.stack())?;
                    compare(&train(engine)?, &one, ranks == world && !tied, &what);
                }
            }
        }
    }
    Ok(())
}
