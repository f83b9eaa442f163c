//! Overlap and offload: the results are the same wherever states and weights are kept, and the timelines show the
//! overlap.

use super::{
    world::{CASES, Case, STAGES, assert_same, batch, run, values},
    *,
};
use crate::{
    MemoryTier,
    comm::{CommVolume, Communicator, Exchange, Lane, Message, Operation, Solo, Traffic, threads},
};
use std::time::Duration;

/// Returns pairs of memory tiers: that of the optimizer states and that of the rank's weight shards.
fn tiers(folder: &std::path::Path) -> [(MemoryTier, MemoryTier); 6] {
    let file = || MemoryTier::File(folder.to_owned());
    [
        (MemoryTier::Device, MemoryTier::Device),
        (MemoryTier::Host, MemoryTier::Device),
        (file(), MemoryTier::Device),
        (MemoryTier::Device, MemoryTier::Host),
        (MemoryTier::Host, file()),
        (file(), file()),
    ]
}

/// All models (full and adapter-like, tied and untied, unequal, tiny and frozen tensors, kept and recomputed graphs,
/// updates after or during the backward pass) give the same result in every stage, world size and memory tier: bit for
/// bit that of one process which accumulates the same micro-batches with everything on the device and updates at the
/// end.
#[test]
fn wherever_things_are_a_world_is_one_process_bit_for_bit() {
    let _alone = backward_lock();
    let folder = tempfile::tempdir().unwrap();
    let cases = [CASES[0], CASES[1], CASES[4], CASES[5], CASES[6]];
    let early = [0, 1, 2, 4, 5, 6].map(|case: usize| CASES[case].with_optimizer_in_backward());
    for case in cases.into_iter().chain(early) {
        let whole = Case { optimizer_in_backward: false, ..case };
        let [one, two, three, four] = [1, 2, 3, 4].map(|micros| run(whole, whole.config(), micros).0);
        for (world, expected) in [(1, one), (2, two), (3, three), (4, four)] {
            for stage in STAGES {
                for (states, weights) in tiers(folder.path()) {
                    if weights != MemoryTier::Device && stage != ZeroStage::Weights {
                        continue;
                    }
                    let what = format!("{case:?}, {stage:?}, {world} ranks, {states:?}, {weights:?}");
                    for (found, memory) in threads::run(world, |group| {
                        let sharding = Sharding { stage, bucket_size: case.bucket_size };
                        let config = case.config().with_communicator(Box::new(group)).with_sharding(sharding);
                        let config = config.with_weights_in(weights.clone()).with_optimizer_states_in(states.clone());
                        let (found, engine) = run(case, config, 1);
                        (found, engine.memory())
                    }) {
                        assert_same(&found.parameters, &expected.parameters, &what);
                        assert_eq!(found.norms, expected.norms, "{what}");
                        assert_eq!(memory.gradients, 0, "{what}");
                        assert_eq!(memory.moments > 0, states == MemoryTier::Device && memory.moments > 0, "{what}");
                        // A model whose weights are elsewhere keeps placeholders of one value.
                        let shells = 4 * 6;
                        assert!(weights == MemoryTier::Device || memory.parameters + memory.frozen <= shells, "{what}");
                        let nothing = matches!(
                            (&states, &weights),
                            (MemoryTier::File(_), MemoryTier::File(_) | MemoryTier::Device)
                        );
                        assert!(!nothing || memory.host == 0, "{what}: {memory:?}");
                    }
                }
            }
        }
    }
    assert_eq!(folder.path().read_dir().unwrap().count(), 0, "an engine removes its files");
}

#[test]
fn overlap_changes_no_number() {
    let _alone = backward_lock();
    for (case, tier) in [
        (CASES[0], MemoryTier::Device),
        (CASES[1], MemoryTier::Host),
        (CASES[0].with_optimizer_in_backward(), MemoryTier::Device),
        (CASES[1].with_optimizer_in_backward(), MemoryTier::Host),
    ] {
        for stage in STAGES {
            let outcome = |overlap| {
                threads::run(2, |group| {
                    let sharding = Sharding { stage, bucket_size: 300 };
                    let config = case.config().with_communicator(Box::new(group)).with_sharding(sharding);
                    run(case, config.with_overlap(overlap).with_optimizer_states_in(tier.clone()), 2).0
                })
            };
            assert_eq!(outcome(true), outcome(false), "{stage:?}");
        }
    }
}

/// The largest number of attempts: on a busy machine many a run shows no overlap. The first that does ends them.
const RUNS: usize = 50;

/// A model large enough that its segments compute for a while.
pub(super) const LARGE: Case =
    Case { vocab: 2000, hidden: 320, tied: false, checkpointing: Checkpointing::All, bucket_size: 1, ..CASES[0] };

/// Returns the timelines of two ranks that take two steps.
fn timeline(sharding: Sharding, states: &MemoryTier, overlap: bool) -> Vec<crate::comm::Trace> {
    threads::run(2, |group| {
        let config = LARGE.config().with_communicator(Box::new(group)).with_sharding(sharding);
        let config = config.with_overlap(overlap).with_optimizer_states_in(states.clone());
        let mut engine = config.init(LARGE.model()).unwrap();
        let rank = engine.rank();
        for step in 0..2 {
            engine.forward_backward(&[batch(step, rank)]).unwrap();
            engine.step(1e-3).unwrap();
        }
        engine.trace().clone()
    })
}

/// The threads of one process take turns computing, so the measured share says little about the real overlap (processes
/// under `mpirun` hide most of the communication), and on a busy machine one thread may finish before the other begins.
/// Hence the test requires that in one of several runs every rank hides some communication, and that without overlap
/// none does.
#[test]
fn collectives_lie_inside_segments_only_with_overlap() {
    let _alone = backward_lock();
    for (stage, direction) in
        [(ZeroStage::Gradients, "backward"), (ZeroStage::Weights, "forward"), (ZeroStage::Weights, "backward")]
    {
        let shares = |overlap| -> Vec<f64> {
            let traces = timeline(Sharding { stage, bucket_size: 1 }, &MemoryTier::Device, overlap);
            let share = |trace: &crate::comm::Trace| trace.overlap_fraction_in(Lane::Communication, direction);
            traces.iter().map(|trace| share(trace).expect("two ranks communicate")).collect()
        };
        let hidden = (0..RUNS).any(|_| shares(true).iter().all(|&share| share > 0.0));
        assert!(hidden, "{stage:?}, {direction}: some rank hides nothing in each of {RUNS} runs");
        let without = shares(false);
        assert!(without.iter().all(|&share| share == 0.0), "{stage:?}, {direction}: {without:?} without overlap");
    }
}

/// A world of one rank in which a reduction, here the copy of a bucket to the host, takes a while, as over a bus. In
/// the memory of the CPU backend it takes a fraction of a millisecond, and on a busy machine it may then be over
/// whenever the compute thread gets a turn.
struct SlowTransfer(Solo);

impl Communicator for SlowTransfer {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn world_size(&self) -> usize {
        self.0.world_size()
    }

    fn start(&mut self, operation: Operation, outgoing: Vec<Message>, incoming: &[usize]) -> Result<Exchange, Error> {
        if operation == Operation::ReduceScatter {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.0.start(operation, outgoing, incoming)
    }

    fn split(&mut self, color: usize, key: usize) -> Result<Box<dyn Communicator>, Error> {
        self.0.split(color, key)
    }

    fn traffic(&self) -> Traffic {
        self.0.traffic()
    }

    fn record_sent(&mut self, operation: Operation, sent: CommVolume) {
        self.0.record_sent(operation, sent);
    }
}

/// With one process the gradients are copied to the host during the backward pass, and the device never holds all of
/// them.
#[test]
fn offload_overlaps_the_backward_pass() {
    let _alone = backward_lock();
    // An update of the head takes longer than the compute thread needs to wake up.
    let case = Case { vocab: 8000, ..LARGE };
    let config = case.config().with_sharding(Sharding { stage: ZeroStage::Gradients, bucket_size: 1 });
    let config = config.with_communicator(Box::new(SlowTransfer(Solo))).with_optimizer_states_in(MemoryTier::Host);
    let mut engine = config.init(case.model()).unwrap();
    let mut step = |number| {
        engine.forward_backward(&[batch(number, 0)]).unwrap();
        engine.step(1e-3).unwrap();
        let share = |lane, within| engine.trace().overlap_fraction_in(lane, within).expect("both happen");
        [share(Lane::Transfer, "backward"), share(Lane::Optimizer, "step")].map(|share| share > 0.0)
    };
    step(0);
    let mut seen = [false; 2];
    for number in 1..=RUNS {
        let hidden = step(number);
        seen = [seen[0] || hidden[0], seen[1] || hidden[1]];
        if seen == [true; 2] {
            break;
        }
    }
    assert!(seen[0], "in none of {RUNS} steps do gradients leave during the backward pass");
    assert!(seen[1], "in none of {RUNS} steps do updates overlap with uploads");
    let whole: usize = values(engine.model()).iter().map(Vec::len).sum::<usize>() * 4;
    // Reduced gradients on the host count too; unreduced ones on the device were at most those of one segment.
    assert!(
        engine.peak_memory().gradients <= whole + 4 * case.vocab * case.hidden + 4096,
        "{:?} of {whole}",
        engine.peak_memory()
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    engine.write_trace(&path).unwrap();
    let read: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let names: Vec<&str> =
        read["traceEvents"].as_array().unwrap().iter().filter_map(|event| event["name"].as_str()).collect();
    for name in ["backward 1", "forward 0", "to the host 0", "update", "step"] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
}

/// The f32 master weights of half-precision parameters belong to the optimizer states: they are off the device with
/// them and are saved from there.
#[test]
fn masters_are_where_the_states_are() {
    let _alone = backward_lock();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let outcome = |tier: MemoryTier| {
        let config = EngineConfig::new(AdamW::default()).with_max_grad_norm(1.0).with_optimizer_states_in(tier);
        let mut engine = config.init(super::optimizers::toy_with_bf16_matrix()).unwrap();
        for step in 0..3 {
            engine.train_step(&[batch(step, 0)], 1e-3).unwrap();
        }
        engine.save(&path).unwrap();
        (engine.memory(), std::fs::read(&path).unwrap())
    };
    let ((device, expected), (host, found)) = (outcome(MemoryTier::Device), outcome(MemoryTier::Host));
    assert!(device.master > 0 && device.moments > 0 && device.host == 0);
    assert_eq!((host.master, host.moments, host.host), (0, 0, device.master + device.moments));
    assert!(found == expected, "the states are the same");
}
