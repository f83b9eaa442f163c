//! One law: a world of ranks computes what one rank computes that takes all micro-batches.

use super::*;
use crate::{
    comm::{Communicator, threads},
    gather::visits,
    segment::tests::{freeze, toy_of},
};

pub(super) const STAGES: [Stage; 4] = [Stage::Replicated, Stage::States, Stage::Gradients, Stage::Weights];
const STEPS: usize = 10;
/// A norm that clips in most steps.
const CLIP: f64 = 0.02;

/// A model: its shape, what is frozen, how graphs are kept, and how it steps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Case {
    pub vocab: usize,
    pub hidden: usize,
    pub tied: bool,
    pub frozen: &'static [&'static str],
    pub checkpointing: Checkpointing,
    pub bucket_size: usize,
    pub max_grad_norm: Option<f64>,
    /// Whether the last micro-batch of a step is updated with on its way.
    pub early: bool,
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
        early: false,
    };
    [
        full,
        Case { tied: false, checkpointing: Checkpointing::All, ..full },
        Case { checkpointing: Checkpointing::None, bucket_size: 1, ..full },
        Case { checkpointing: Checkpointing::Every(2), bucket_size: 1 << 20, tied: false, ..full },
        // As LoRA has it: little is trained, between much that is not.
        Case { frozen: &["embed", "up", "norm"], ..full },
        Case {
            frozen: &["embed", "up", "down", "norm", "head"],
            tied: false,
            checkpointing: Checkpointing::None,
            ..full
        },
        // Every tensor smaller than a block, the world larger than most.
        Case { vocab: 11, hidden: 2, bucket_size: 300, ..full },
    ]
};

impl Case {
    pub fn model(&self) -> Toy<AB> {
        freeze(toy_of(self.vocab, self.hidden, self.tied), self.frozen)
    }

    pub fn engine(&self) -> Engine<AB> {
        Engine::new(AdamW::default(), self.max_grad_norm, self.checkpointing)
    }

    /// Without clipping, and updated on the way.
    pub fn updated_early(self) -> Self {
        Self { max_grad_norm: None, early: true, ..self }
    }
}

/// Unequal micro-batches.
pub(super) fn batch(step: usize, micro: usize) -> ToyBatch<AB> {
    let from = (step * 40 + micro * 7) as i32;
    ToyBatch::new(from, from + 5 + micro as i32, 20.0)
}

#[derive(Default)]
struct Values(Vec<Vec<f32>>);

impl ModuleVisitor<AB> for Values {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<AB, D>>) {
        self.0.push(param.val().into_data().to_vec().unwrap());
    }
}

pub(super) fn values(model: &Toy<AB>) -> Vec<Vec<f32>> {
    let mut values = Values::default();
    model.visit(&mut values);
    values.0
}

/// Equality bit for bit, without pages of numbers where it fails.
pub(super) fn assert_same(found: &[Vec<f32>], expected: &[Vec<f32>], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let different = found.iter().zip(expected).filter(|(a, b)| a.to_bits() != b.to_bits());
        let largest = different.clone().map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let (n, of) = (different.count(), expected.len());
        assert_eq!(n, 0, "{what}: parameter {i}: {n} values of {of} differ, by up to {largest:e}");
    }
}

/// What a run has come to.
#[derive(Debug, PartialEq)]
pub(super) struct Outcome {
    pub parameters: Vec<Vec<f32>>,
    pub norms: Vec<f64>,
    pub losses: Vec<f64>,
}

/// One rank's step of at least one micro-batch; the loss, and what the step found.
pub(super) fn take_step(
    (early, learning_rate): (bool, f64),
    engine: &mut Engine<AB>,
    model: &mut Toy<AB>,
    batches: &[ToyBatch<AB>],
) -> (f64, StepReport) {
    let (last, others) = batches.split_last().unwrap();
    let loss: f64 = others.iter().map(|batch| engine.accumulate(model, batch).unwrap()).sum();
    let (more, report) = if early {
        engine.accumulate_and_step(model, last, learning_rate).unwrap()
    } else {
        (engine.accumulate(model, last).unwrap(), engine.step(model, learning_rate).unwrap())
    };
    (loss + more, report)
}

/// One rank's run of [`STEPS`] steps, `micros` micro-batches each.
pub(super) fn run(case: Case, mut engine: Engine<AB>, micros: usize) -> (Outcome, Engine<AB>, Toy<AB>) {
    let (mut model, rank, world) = (case.model(), engine.rank(), engine.world());
    let (mut norms, mut losses) = (vec![], vec![]);
    for step in 0..STEPS {
        let batches = (0..micros).map(|micro| batch(step, micro * world + rank));
        let (loss, report) = take_step((case.early, 1e-3), &mut engine, &mut model, &batches.collect::<Vec<_>>());
        losses.extend(engine.sum_over_ranks(&[loss]).unwrap());
        norms.push(report.grad_norm);
    }
    let parameters = engine.with_whole(&model, values).unwrap();
    (Outcome { parameters, norms, losses }, engine, model)
}

fn in_world<R: Send>(
    case: Case,
    (stage, world): (Stage, usize),
    micros: usize,
    look: impl Fn(Outcome, Engine<AB>, Toy<AB>) -> R + Sync,
) -> Vec<R> {
    threads::run(world, |group| {
        let sharding = Sharding { stage, bucket_size: case.bucket_size };
        let engine = case.engine().in_world(Box::new(group) as Box<dyn Communicator>, sharding);
        let (outcome, engine, model) = run(case, engine, micros);
        look(outcome, engine, model)
    })
}

/// Burn 0.21 loses gradients of a leaf that several graphs share and that an earlier backward pass has used: with leaves that
/// outlive a micro-batch this fails in most runs.
#[test]
fn accumulated_gradients_of_kept_and_remade_graphs_are_the_same_each_time() {
    let _alone = alone();
    for tied in [true, false] {
        let remade = Case { tied, checkpointing: Checkpointing::All, ..CASES[0] };
        let (expected, ..) = run(remade, remade.engine(), 5);
        for checkpointing in [Checkpointing::None, Checkpointing::Every(2), Checkpointing::Full] {
            let case = Case { checkpointing, ..remade };
            for _ in 0..20 {
                let found = run(case, case.engine(), 5).0;
                assert_same(&found.parameters, &expected.parameters, &format!("{case:?}"));
                assert_eq!(found.norms, expected.norms);
            }
        }
    }
}

#[test]
fn every_stage_in_every_world_is_one_process_bit_for_bit() {
    let _alone = alone();
    for case in CASES {
        for world in 1..=4 {
            let (expected, ..) = run(case, case.engine(), world);
            assert!(expected.norms.iter().any(|&norm| norm > CLIP), "nothing is clipped: {:?}", expected.norms);
            for stage in STAGES {
                for (rank, found) in in_world(case, (stage, world), 1, |found, _, _| found).iter().enumerate() {
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

/// With several micro-batches per rank the order of the sum is that of one process only where every micro-batch is reduced;
/// the others add up each rank's first.
#[test]
fn several_micro_batches_per_rank_are_one_process_too() {
    let _alone = alone();
    for case in [CASES[0], CASES[4], CASES[0].updated_early(), CASES[4].updated_early()] {
        let (world, micros) = (3, 2);
        let whole = Case { early: false, ..case };
        let (one, ..) = run(whole, whole.engine(), world * micros);
        let stages = STAGES.map(|stage| in_world(case, (stage, world), micros, |found, _, _| found));
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

/// Padded values of the buckets that are reduced, and of all that are gathered.
fn padded(engine: &Engine<AB>) -> (u64, u64) {
    let layout = &engine.division.as_ref().unwrap().layout;
    let trained: usize = layout.trained().map(|(_, bucket)| bucket.length).sum();
    let gathered =
        visits(layout, engine.checkpointing).iter().flat_map(|visit| visit.gather.clone()).collect::<Vec<_>>();
    (trained as u64, gathered.iter().map(|&index| layout.buckets[index].length as u64).sum())
}

#[test]
fn communication_is_what_the_paper_says() {
    let _alone = alone();
    for case in CASES {
        for world in 1..=4 {
            for stage in STAGES {
                for (traffic, before_whole, (trained, gathered)) in
                    in_world(case, (stage, world), 1, |_, engine, model| {
                        let before = engine.traffic();
                        let mut engine = engine;
                        engine.with_whole(&model, |_| ()).unwrap();
                        // with_whole gathers everything once, in stage 3, at the end of the run and here.
                        (engine.traffic(), before, padded(&engine))
                    })
                {
                    let whole = traffic.gathered.elements - before_whole.gathered.elements;
                    let (reduced, found) = (before_whole.reduced.elements, before_whole.gathered.elements);
                    let found = if stage == Stage::Weights { found - whole } else { found };
                    let (n, steps) = (world as u64, STEPS as u64);
                    // Exactly: every length is a multiple of the world.
                    let share = |elements: u64| elements / n * (n - 1) * steps;
                    let expected = match stage {
                        Stage::Replicated => (2 * share(trained), 0),
                        Stage::States | Stage::Gradients => (share(trained), share(trained)),
                        Stage::Weights => (share(trained), share(gathered)),
                    };
                    assert_eq!((reduced, found), expected, "{stage:?}, {world}, {case:?}");
                    if stage == Stage::Weights && case.frozen.is_empty() && case.checkpointing == Checkpointing::All {
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
    let _alone = alone();
    let case = Case { bucket_size: 1 << 20, ..CASES[1] };
    for world in [1, 2, 4] {
        for stage in STAGES {
            let counted = in_world(case, (stage, world), 1, |_, mut engine, mut model| {
                engine.accumulate(&mut model, &batch(0, 0)).unwrap();
                engine.barrier().unwrap();
                let gradients = engine.division.as_mut().unwrap();
                // What is under way has arrived.
                gradients.gradients.settle_all(&gradients.layout).unwrap();
                (engine.memory(&model), engine.peak(), padded(&engine).0)
            });
            let whole = 4 * values(&case.model()).iter().map(Vec::len).sum::<usize>() as u64;
            let shells = 4 * 6;
            let mut sum = Memory::default();
            for (memory, peak, padded) in counted {
                let part = 4 * padded / world as u64;
                let weights = if stage == Stage::Weights { part + shells } else { whole };
                let (gradients, moments) = (
                    if stage >= Stage::Gradients { part } else { whole },
                    2 * if stage >= Stage::States { part } else { whole },
                );
                assert!(memory.parameters <= weights && memory.gradients <= gradients && memory.moments <= moments);
                sum.parameters += memory.parameters;
                sum.gradients += memory.gradients;
                sum.moments += memory.moments;
                assert!(peak.buckets as u64 <= 2 * 4 * padded, "{peak:?}");
            }
            // Together the ranks hold everything once where it is divided, and once each where it is not.
            let (n, divided) = (world as u64, |from: Stage| stage >= from);
            let times = |from: Stage| if divided(from) { 1 } else { n };
            let shells = if divided(Stage::Weights) { n * shells } else { 0 };
            assert_eq!(sum.parameters, times(Stage::Weights) * whole + shells, "{stage:?}, {world}");
            assert_eq!(sum.moments, 2 * times(Stage::States) * whole, "{stage:?}, {world}");
            let padding = if divided(Stage::Gradients) && world > 1 { sum.gradients - whole } else { 0 };
            assert_eq!(sum.gradients - padding, times(Stage::Gradients) * whole, "{stage:?}, {world}");
            assert!(padding < 4 * 256 * (6 + n), "{padding}");
        }
    }
}

#[test]
fn a_state_goes_on_in_another_world_and_stage() {
    let _alone = alone();
    let case = CASES[4];
    let folder = tempfile::tempdir().unwrap();
    let settings =
        [(Stage::Replicated, 2), (Stage::States, 3), (Stage::Gradients, 2), (Stage::Weights, 4), (Stage::Weights, 1)];
    for (i, from) in settings.into_iter().enumerate() {
        let path = folder.path().join(format!("{i}.safetensors"));
        in_world(case, from, 1, |_, engine, model| {
            engine.save(&model, &path).unwrap();
            engine.barrier().unwrap();
        });
        // One process that took all micro-batches, and has saved.
        let (expected_there, whole, whole_model) = run(case, case.engine(), from.1);
        let reference = folder.path().join(format!("{i}.whole"));
        whole.save(&whole_model, &reference).unwrap();
        for to in settings {
            let restored = threads::run(to.1, |group| {
                let sharding = Sharding { stage: to.0, bucket_size: case.bucket_size };
                let mut engine = case.engine().in_world(Box::new(group), sharding);
                let mut model = engine.restore(case.model(), &path).unwrap();
                assert_eq!(engine.steps(), STEPS);
                let first = engine.with_whole(&model, values).unwrap();
                let rank = engine.rank();
                engine.accumulate(&mut model, &batch(99, rank)).unwrap();
                engine.step(&mut model, 1e-3).unwrap();
                (first, engine.with_whole(&model, values).unwrap())
            });
            let mut one = case.engine();
            let mut model = one.restore(case.model(), &reference).unwrap();
            for rank in 0..to.1 {
                one.accumulate(&mut model, &batch(99, rank)).unwrap();
            }
            one.step(&mut model, 1e-3).unwrap();
            for (first, then) in restored {
                assert_same(&first, &expected_there.parameters, &format!("{from:?} to {to:?}"));
                assert_same(&then, &values(&model), &format!("{from:?} to {to:?}, a step later"));
            }
        }
        consolidate(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&reference).unwrap(), "{from:?} consolidated");
    }
}

#[test]
fn an_incomplete_state_is_refused() {
    let _alone = alone();
    let (case, folder) = (CASES[0], tempfile::tempdir().unwrap());
    let path = folder.path().join("state.safetensors");
    in_world(case, (Stage::States, 3), 1, |_, engine, model| engine.save(&model, &path).unwrap());
    let missing = case.engine().restore(case.model(), &folder.path().join("other.safetensors")).unwrap_err();
    assert!(matches!(missing, Error::Path { .. }), "{missing}");
    std::fs::remove_file(folder.path().join("state.1-of-3.safetensors")).unwrap();
    let incomplete = case.engine().restore(case.model(), &path).unwrap_err();
    assert!(incomplete.to_string().contains("1-of-3"), "{incomplete}");
}

#[test]
fn a_lost_rank_ends_the_step_of_the_others() {
    let _alone = alone();
    for stage in STAGES {
        let errors = threads::run(3, |group| {
            let sharding = Sharding { stage, bucket_size: 300 };
            let (mut engine, mut model) = (CASES[0].engine().in_world(Box::new(group), sharding), CASES[0].model());
            if engine.rank() == 2 {
                return None;
            }
            let lost = engine.accumulate(&mut model, &batch(0, 0)).and_then(|_| engine.step(&mut model, 1e-3));
            Some(lost.unwrap_err().to_string())
        });
        assert!(errors.iter().flatten().any(|error| error.contains("rank 2 has ended")), "{stage:?}: {errors:?}");
    }
}

#[test]
fn a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all() {
    let _alone = alone();
    for stage in STAGES {
        let skipped = threads::run(3, |group| {
            let sharding = Sharding { stage, bucket_size: 300 };
            let (mut engine, mut model) = (CASES[0].engine().in_world(Box::new(group), sharding), CASES[0].model());
            let before = values(&model);
            let total = if engine.rank() == 1 { 0.0 } else { 20.0 };
            engine.accumulate(&mut model, &ToyBatch::new(0, 9, total)).unwrap();
            let error = engine.step(&mut model, 1e-3).unwrap_err();
            assert!(matches!(error, Error::NotFinite { step: 0, .. }), "{error}");
            engine.with_whole(&model, values).unwrap() == before
        });
        assert!(skipped.into_iter().all(|same| same), "{stage:?}");
    }
}
