//! Any world of ranks computes what a single rank computes from the micro-batches of all ranks.

use super::*;
use crate::{
    comm::threads,
    gather::gather_schedule,
    segment::{
        BackwardPlan,
        tests::{freeze, toy_of},
    },
};

pub(super) const STAGES: [ZeroStage; 4] =
    [ZeroStage::Disabled, ZeroStage::OptimizerStates, ZeroStage::Gradients, ZeroStage::Weights];
const STEPS: usize = 10;
/// A clipping norm that is exceeded in most steps.
const CLIP: f64 = 0.02;

/// A test case: shape of the model, frozen parameters, activation checkpointing, and how the optimizer steps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Case {
    pub vocab: usize,
    pub hidden: usize,
    pub tied: bool,
    pub frozen: &'static [&'static str],
    pub checkpointing: Checkpointing,
    pub bucket_size: usize,
    pub max_grad_norm: Option<f64>,
    /// True if the parameters are updated during the backward pass of a step's last micro-batch.
    pub optimizer_in_backward: bool,
}

pub(super) const CASES: [Case; 7] = {
    let full = Case {
        vocab: 41,
        hidden: 24,
        tied: true,
        frozen: &[],
        checkpointing: Checkpointing::Full,
        bucket_size: 1500,
        max_grad_norm: Some(CLIP),
        optimizer_in_backward: false,
    };
    [
        full,
        Case { tied: false, checkpointing: Checkpointing::All, ..full },
        Case { checkpointing: Checkpointing::None, bucket_size: 1, ..full },
        Case { checkpointing: Checkpointing::Every(2), bucket_size: 1 << 20, tied: false, ..full },
        // As in LoRA, a few trainable parameters lie between many frozen ones.
        Case { frozen: &["embed", "up", "norm"], ..full },
        Case {
            frozen: &["embed", "up", "down", "norm", "head"],
            tied: false,
            checkpointing: Checkpointing::None,
            ..full
        },
        // Every tensor is smaller than a block, and the world is larger than most.
        Case { vocab: 11, hidden: 2, bucket_size: 300, ..full },
    ]
};

impl Case {
    pub(super) fn model(&self) -> Toy<TestBackend> {
        freeze(toy_of(self.vocab, self.hidden, self.tied), self.frozen)
    }

    pub(super) fn config(&self) -> EngineConfig {
        let config = EngineConfig::new(AdamW::default()).with_max_grad_norm(self.max_grad_norm);
        config.with_checkpointing(self.checkpointing)
    }

    /// Returns an engine with the model of this case.
    pub(super) fn engine(&self) -> ToyEngine {
        self.config().init(self.model()).unwrap()
    }

    /// Returns the same case without clipping and with updates during the backward pass.
    pub(super) fn with_optimizer_in_backward(self) -> Self {
        Self { max_grad_norm: None, optimizer_in_backward: true, ..self }
    }
}

/// Returns one of a series of micro-batches of unequal size.
pub(super) fn batch(step: usize, micro: usize) -> ToyBatch<TestBackend> {
    let from = (step * 40 + micro * 7) as i32;
    ToyBatch::new(from, from + 5 + micro as i32, 20.0)
}

#[derive(Default)]
struct ParameterValues(Vec<Vec<f32>>);

impl ModuleVisitor<TestBackend> for ParameterValues {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<TestBackend, D>>) {
        self.0.push(param.val().into_data().to_vec().unwrap());
    }
}

pub(super) fn values(model: &Toy<TestBackend>) -> Vec<Vec<f32>> {
    let mut values = ParameterValues::default();
    model.visit(&mut values);
    values.0
}

/// Asserts equality bit for bit; a failure prints a summary instead of all values.
pub(super) fn assert_same(found: &[Vec<f32>], expected: &[Vec<f32>], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let different = found.iter().zip(expected).filter(|(a, b)| a.to_bits() != b.to_bits());
        let largest = different.clone().map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let (n, of) = (different.count(), expected.len());
        assert_eq!(n, 0, "{what}: parameter {i}: {n} values of {of} differ, by up to {largest:e}");
    }
}

/// The result of a training run.
#[derive(Debug, PartialEq)]
pub(super) struct Outcome {
    pub parameters: Vec<Vec<f32>>,
    pub norms: Vec<f64>,
    pub losses: Vec<f64>,
}

/// Takes one optimizer step of at least one micro-batch on this rank; returns the sum of their losses and the report.
pub(super) fn take_step(
    engine: &mut ToyEngine,
    batches: &[ToyBatch<TestBackend>],
    learning_rate: f64,
    optimizer_in_backward: bool,
) -> TrainStepOutput {
    if optimizer_in_backward {
        return engine.train_step(batches, learning_rate).unwrap();
    }
    let loss = engine.forward_backward(batches).unwrap();
    TrainStepOutput { loss, report: engine.step(learning_rate).unwrap() }
}

/// Runs [`STEPS`] steps of `micros` micro-batches each on this rank.
pub(super) fn run(case: Case, config: EngineConfig, micros: usize) -> (Outcome, ToyEngine) {
    let mut engine = config.init(case.model()).unwrap();
    let (rank, world) = (engine.rank(), engine.world());
    let (mut norms, mut losses) = (vec![], vec![]);
    for step in 0..STEPS {
        let batches: Vec<_> = (0..micros).map(|micro| batch(step, micro * world + rank)).collect();
        let TrainStepOutput { loss, report } = take_step(&mut engine, &batches, 1e-3, case.optimizer_in_backward);
        losses.extend(engine.sum_over_ranks(&[loss]).unwrap());
        norms.push(report.grad_norm);
    }
    let parameters = engine.with_full_params(values).unwrap();
    (Outcome { parameters, norms, losses }, engine)
}

pub(super) fn in_world<R: Send>(
    case: Case,
    stage: ZeroStage,
    world: usize,
    micros: usize,
    look: impl Fn(Outcome, ToyEngine) -> R + Sync,
) -> Vec<R> {
    threads::run(world, |group| {
        let sharding = Sharding { stage, bucket_size: case.bucket_size };
        let config = case.config().with_communicator(Box::new(group)).with_sharding(sharding);
        let (outcome, engine) = run(case, config, micros);
        look(outcome, engine)
    })
}

/// Burn 0.21 loses gradients of a leaf that several graphs share and that an earlier backward pass has used: if leaves
/// outlive a micro-batch, this test fails in most runs.
#[test]
fn accumulated_gradients_of_kept_and_remade_graphs_are_the_same_each_time() {
    let _alone = backward_lock();
    for tied in [true, false] {
        let remade = Case { tied, checkpointing: Checkpointing::All, ..CASES[0] };
        let (expected, ..) = run(remade, remade.config(), 5);
        for checkpointing in [Checkpointing::None, Checkpointing::Every(2), Checkpointing::Full] {
            let case = Case { checkpointing, ..remade };
            for _ in 0..20 {
                let found = run(case, case.config(), 5).0;
                assert_same(&found.parameters, &expected.parameters, &format!("{case:?}"));
                assert_eq!(found.norms, expected.norms);
            }
        }
    }
}

#[test]
fn every_stage_in_every_world_is_one_process_bit_for_bit() {
    let _alone = backward_lock();
    for case in CASES {
        for world in 1..=4 {
            let (expected, ..) = run(case, case.config(), world);
            assert!(expected.norms.iter().any(|&norm| norm > CLIP), "nothing is clipped: {:?}", expected.norms);
            for stage in STAGES {
                for (rank, found) in in_world(case, stage, world, 1, |found, _| found).iter().enumerate() {
                    let what = format!("{stage:?}, rank {rank} of {world}, {case:?}");
                    assert_same(&found.parameters, &expected.parameters, &what);
                    assert_eq!(found.norms, expected.norms, "{what}");
                    let near = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-12 * b.abs();
                    assert!(found.losses.iter().zip(&expected.losses).all(near), "{what}");
                }
            }
        }
    }
}

/// With several micro-batches per rank the order of summation equals that of one process only in stages 2 and 3, which
/// reduce every micro-batch; stages 0 and 1 first accumulate on each rank.
#[test]
fn several_micro_batches_per_rank_are_one_process_too() {
    let _alone = backward_lock();
    for case in [CASES[0], CASES[4], CASES[0].with_optimizer_in_backward(), CASES[4].with_optimizer_in_backward()] {
        let (world, micros) = (3, 2);
        let whole = Case { optimizer_in_backward: false, ..case };
        let (one, ..) = run(whole, whole.config(), world * micros);
        let stages = STAGES.map(|stage| in_world(case, stage, world, micros, |found, _| found));
        for found in stages[2].iter().chain(&stages[3]) {
            assert_same(&found.parameters, &one.parameters, "divided");
            assert_eq!(found.norms, one.norms);
        }
        for found in stages[0].iter().chain(&stages[1]) {
            assert_same(&found.parameters, &stages[0][0].parameters, "replicated");
            for (a, b) in found.parameters.iter().flatten().zip(one.parameters.iter().flatten()) {
                assert!((a - b).abs() <= 1e-6, "{a} against {b}");
            }
        }
    }
}

#[test]
fn losses_without_gradients_are_those_of_training_in_every_stage() {
    let _alone = backward_lock();
    for case in CASES {
        for stage in STAGES {
            for (forward, trained, released) in in_world(case, stage, 2, 1, |_, mut engine| {
                let batches = [batch(50, engine.rank()), batch(51, engine.rank())];
                let before = engine.memory();
                let forward = engine.losses(&batches).unwrap();
                let released = engine.memory() == before;
                (forward, engine.forward_backward(&batches).unwrap(), released)
            }) {
                assert_eq!(forward, trained, "{stage:?}, {case:?}");
                assert!(released, "{stage:?}, {case:?}: gathered weights stay");
            }
        }
    }
}

/// Returns the padded sizes of the buckets that are reduced, and of all buckets that are gathered.
fn padded(engine: &ToyEngine) -> (u64, u64) {
    let layout = &engine.sharded.layout;
    let trained: usize = layout.trainable_buckets().map(|(_, bucket)| bucket.length).sum();
    let gathered = gather_schedule(
        layout,
        BackwardPlan::new::<TestBackend, _>(engine.model()).first_trainable,
        engine.settings.checkpointing,
    )
    .iter()
    .flat_map(|step| step.gather.clone())
    .collect::<Vec<_>>();
    (trained as u64, gathered.iter().map(|&index| layout.buckets[index].length as u64).sum())
}

#[test]
fn communication_is_what_the_paper_says() {
    let _alone = backward_lock();
    for case in CASES {
        for world in 1..=4 {
            for stage in STAGES {
                for (traffic, before_whole, (trained, gathered)) in in_world(case, stage, world, 1, |_, engine| {
                    let before = engine.traffic();
                    engine.with_full_params(|_| ()).unwrap();
                    // In stage 3 `with_full_params` gathers all weights once: at the end of `run` and here.
                    (engine.traffic(), before, padded(&engine))
                }) {
                    let whole = traffic.gathered.elements - before_whole.gathered.elements;
                    let (reduced, found) = (before_whole.reduced.elements, before_whole.gathered.elements);
                    let found = if stage == ZeroStage::Weights { found - whole } else { found };
                    let (n, steps) = (world as u64, STEPS as u64);
                    // This is exact, because every length is a multiple of the world size.
                    let share = |elements: u64| elements / n * (n - 1) * steps;
                    let expected = match stage {
                        ZeroStage::Disabled => (2 * share(trained), 0),
                        ZeroStage::OptimizerStates | ZeroStage::Gradients => (share(trained), share(trained)),
                        ZeroStage::Weights => (share(trained), share(gathered)),
                    };
                    assert_eq!((reduced, found), expected, "{stage:?}, {world}, {case:?}");
                    if stage == ZeroStage::Weights && case.frozen.is_empty() && case.checkpointing == Checkpointing::All
                    {
                        assert_eq!(reduced + found, 3 * share(trained), "twice gathered, once reduced");
                    }
                    assert!(case.frozen.len() > 3 || reduced + found <= 3 * share(gathered.max(trained)));
                }
            }
        }
    }
}

#[test]
fn memory_is_divided_as_the_paper_says() {
    let _alone = backward_lock();
    let case = Case { bucket_size: 1 << 20, ..CASES[1] };
    for world in [1, 2, 4] {
        for stage in STAGES {
            let counted = in_world(case, stage, world, 1, |_, mut engine| {
                engine.forward_backward(&[batch(0, 0)]).unwrap();
                engine.barrier().unwrap();
                let sharded = &mut engine.sharded;
                // Wait for the buckets in flight.
                sharded.reducer.wait_all(&sharded.layout).unwrap();
                (engine.memory(), engine.peak_memory(), padded(&engine).0)
            });
            let whole = 4 * values(&case.model()).iter().map(Vec::len).sum::<usize>() as u64;
            let shells = 4 * 6;
            let mut sum = MemoryEstimate::default();
            for (memory, peak, padded) in counted {
                let part = 4 * padded / world as u64;
                let weights = if stage == ZeroStage::Weights { part + shells } else { whole };
                let (gradients, moments) = (
                    if stage >= ZeroStage::Gradients { part } else { whole },
                    2 * if stage >= ZeroStage::OptimizerStates { part } else { whole },
                );
                assert!(memory.parameters <= weights && memory.gradients <= gradients && memory.moments <= moments);
                sum.parameters += memory.parameters;
                sum.gradients += memory.gradients;
                sum.moments += memory.moments;
                assert!(peak.buckets as u64 <= 2 * 4 * padded, "{peak:?}");
            }
            // All ranks together hold one copy of what is sharded and one copy per rank of what is not.
            let (n, divided) = (world as u64, |from: ZeroStage| stage >= from);
            let times = |from: ZeroStage| if divided(from) { 1 } else { n };
            let shells = if divided(ZeroStage::Weights) { n * shells } else { 0 };
            assert_eq!(sum.parameters, times(ZeroStage::Weights) * whole + shells, "{stage:?}, {world}");
            assert_eq!(sum.moments, 2 * times(ZeroStage::OptimizerStates) * whole, "{stage:?}, {world}");
            let padding = if divided(ZeroStage::Gradients) && world > 1 { sum.gradients - whole } else { 0 };
            assert_eq!(sum.gradients - padding, times(ZeroStage::Gradients) * whole, "{stage:?}, {world}");
            assert!(padding < 4 * 256 * (6 + n), "{padding}");
        }
    }
}

#[test]
fn a_state_goes_on_in_another_world_and_stage() {
    let _alone = backward_lock();
    let case = CASES[4];
    let folder = tempfile::tempdir().unwrap();
    let settings = [
        (ZeroStage::Disabled, 2),
        (ZeroStage::OptimizerStates, 3),
        (ZeroStage::Gradients, 2),
        (ZeroStage::Weights, 4),
        (ZeroStage::Weights, 1),
    ];
    for (i, from) in settings.into_iter().enumerate() {
        let path = folder.path().join(format!("{i}.safetensors"));
        in_world(case, from.0, from.1, 1, |_, engine| {
            engine.save(&path).unwrap();
            engine.barrier().unwrap();
        });
        // The reference is one process that takes all micro-batches and saves a checkpoint.
        let (expected_there, whole) = run(case, case.config(), from.1);
        let reference = folder.path().join(format!("{i}.whole"));
        whole.save(&reference).unwrap();
        for to in settings {
            let restored = threads::run(to.1, |group| {
                let sharding = Sharding { stage: to.0, bucket_size: case.bucket_size };
                let config = case.config().with_communicator(Box::new(group)).with_sharding(sharding);
                let mut engine = config.init(case.model()).unwrap();
                engine.restore(&path).unwrap();
                assert_eq!(engine.steps(), STEPS);
                let first = engine.with_full_params(values).unwrap();
                let rank = engine.rank();
                engine.forward_backward(&[batch(99, rank)]).unwrap();
                engine.step(1e-3).unwrap();
                (first, engine.with_full_params(values).unwrap())
            });
            let mut one = case.engine();
            one.restore(&reference).unwrap();
            for rank in 0..to.1 {
                one.forward_backward(&[batch(99, rank)]).unwrap();
            }
            one.step(1e-3).unwrap();
            for (first, then) in restored {
                assert_same(&first, &expected_there.parameters, &format!("{from:?} to {to:?}"));
                assert_same(&then, &values(one.model()), &format!("{from:?} to {to:?}, a step later"));
            }
        }
        consolidate(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&reference).unwrap(), "{from:?} consolidated");
    }
}
