//! What goes on beside computation: the same numbers wherever things are, and timelines that show it.

use super::{
    world::{CASES, Case, STAGES, assert_same, batch, run, values},
    *,
};
use crate::{
    Tier,
    comm::{Lane, threads},
};

/// Where optimizer states and the rank's part of the weights are.
fn tiers(folder: &std::path::Path) -> [(Tier, Tier); 6] {
    let file = || Tier::File(folder.to_owned());
    [
        (Tier::Device, Tier::Device),
        (Tier::Host, Tier::Device),
        (file(), Tier::Device),
        (Tier::Device, Tier::Host),
        (Tier::Host, file()),
        (file(), file()),
    ]
}

/// Full and adapter-like, tied and not, unequal and tiny tensors, frozen ones, kept graphs and remade ones, updated in the end
/// or on the way: every stage, world and place gives bit for bit what one process gives that accumulates the same micro-batches
/// with everything on the device and updates in the end.
#[test]
fn wherever_things_are_a_world_is_one_process_bit_for_bit() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let cases = [CASES[0], CASES[1], CASES[4], CASES[5], CASES[6]];
    let early = [0, 1, 2, 4, 5, 6].map(|case: usize| CASES[case].updated_early());
    for case in cases.into_iter().chain(early) {
        let whole = Case { early: false, ..case };
        let [one, two, three, four] = [1, 2, 3, 4].map(|micros| run(whole, whole.engine(), micros).0);
        for (world, expected) in [(1, one), (2, two), (3, three), (4, four)] {
            for stage in STAGES {
                for (states, weights) in tiers(folder.path()) {
                    if weights != Tier::Device && stage != Stage::Weights {
                        continue;
                    }
                    let what = format!("{case:?}, {stage:?}, {world} ranks, {states:?}, {weights:?}");
                    for (found, memory) in threads::run(world, |group| {
                        let sharding = Sharding { stage, bucket_size: case.bucket_size };
                        let engine = case.engine().in_world(Box::new(group), sharding);
                        let engine = engine.with_weights_in(weights.clone()).with_states_in(&states).unwrap();
                        let (found, engine, model) = run(case, engine, 1);
                        (found, engine.memory(&model))
                    }) {
                        assert_same(&found.parameters, &expected.parameters, &what);
                        assert_eq!(found.norms, expected.norms, "{what}");
                        assert_eq!(memory.gradients, 0, "{what}");
                        assert_eq!(memory.moments > 0, states == Tier::Device && memory.moments > 0, "{what}");
                        // What stays of a model whose weights are elsewhere are shells of one value.
                        let shells = 4 * 6;
                        assert!(weights == Tier::Device || memory.parameters + memory.frozen <= shells, "{what}");
                        let nothing = matches!((&states, &weights), (Tier::File(_), Tier::File(_) | Tier::Device));
                        assert!(!nothing || memory.host == 0, "{what}: {memory:?}");
                    }
                }
            }
        }
    }
    assert_eq!(folder.path().read_dir().unwrap().count(), 0, "files go with their engines");
}

#[test]
fn overlap_changes_no_number() {
    let _alone = alone();
    for (case, tier) in [
        (CASES[0], Tier::Device),
        (CASES[1], Tier::Host),
        (CASES[0].updated_early(), Tier::Device),
        (CASES[1].updated_early(), Tier::Host),
    ] {
        for stage in STAGES {
            let outcome = |overlap| {
                threads::run(2, |group| {
                    let sharding = Sharding { stage, bucket_size: 300 };
                    let engine = case.engine().in_world(Box::new(group), sharding).with_overlap(overlap);
                    run(case, engine.with_states_in(&tier).unwrap(), 2).0
                })
            };
            assert_eq!(outcome(true), outcome(false), "{stage:?}");
        }
    }
}

/// So often may a machine that does other things too hide nothing.
const RUNS: usize = 5;

/// A model whose segments compute for a while.
pub(super) const LARGE: Case =
    Case { vocab: 2000, hidden: 320, tied: false, checkpointing: Checkpointing::All, bucket_size: 1, ..CASES[0] };

/// The timeline of the second step of two ranks.
fn timeline(sharding: Sharding, states: &Tier, overlap: bool) -> Vec<crate::comm::Trace> {
    threads::run(2, |group| {
        let engine = LARGE.engine().in_world(Box::new(group), sharding).with_overlap(overlap);
        let mut engine = engine.with_states_in(states).unwrap();
        let (mut model, rank) = (LARGE.model(), engine.rank());
        for step in 0..2 {
            engine.accumulate(&mut model, &batch(step, rank)).unwrap();
            engine.step(&mut model, 1e-3).unwrap();
        }
        engine.trace().clone()
    })
}

/// Threads of one process take turns at computing, so that their share says little about how much is hidden (processes under
/// `mpirun` hide most of it), and on a busy machine one may be through before the other begins. Hence: in one of some runs every
/// rank hides something, and without overlap none does.
#[test]
fn collectives_lie_inside_segments_only_with_overlap() {
    let _alone = alone();
    for (stage, sweep) in [(Stage::Gradients, "backward"), (Stage::Weights, "forward"), (Stage::Weights, "backward")] {
        let shares = |overlap| -> Vec<f64> {
            let traces = timeline(Sharding { stage, bucket_size: 1 }, &Tier::Device, overlap);
            let share = |trace: &crate::comm::Trace| trace.share_within(Lane::Communication, sweep);
            traces.iter().map(|trace| share(trace).expect("two ranks communicate")).collect()
        };
        let hidden = (0..RUNS).any(|_| shares(true).iter().all(|&share| share > 0.0));
        assert!(hidden, "{stage:?}, {sweep}: some rank hides nothing in each of {RUNS} runs");
        let without = shares(false);
        assert!(without.iter().all(|&share| share == 0.0), "{stage:?}, {sweep}: {without:?} without overlap");
    }
}

/// The gradients of one process leave the device while it walks backward, and it never holds all of them there.
#[test]
fn offload_overlaps_the_backward_pass() {
    let _alone = alone();
    let mut engine =
        LARGE.engine().in_world(Box::new(crate::comm::Solo), Sharding { stage: Stage::Gradients, bucket_size: 1 });
    engine = engine.with_states_in(&Tier::Host).unwrap();
    let mut model = LARGE.model();
    let mut step = |number| {
        engine.accumulate(&mut model, &batch(number, 0)).unwrap();
        engine.step(&mut model, 1e-3).unwrap();
        let share = |lane, within| engine.trace().share_within(lane, within).expect("both happen");
        [share(Lane::Transfer, "backward"), share(Lane::Optimizer, "step")].map(|share| share > 0.0)
    };
    step(0);
    let steps: Vec<[bool; 2]> = (1..=RUNS).map(&mut step).collect();
    for (index, what) in ["gradients leave beside the backward pass", "updates go on beside uploads"].iter().enumerate()
    {
        assert!(steps.iter().any(|hidden| hidden[index]), "{what}: not in {RUNS} steps");
    }
    let whole: usize = values(&model).iter().map(Vec::len).sum::<usize>() * 4;
    // Parts on the host are gradients too; whole ones on the device were at most one segment's.
    assert!(engine.peak().gradients <= whole + 4 * 2000 * 320 + 4096, "{:?} of {whole}", engine.peak());
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

/// Masters in half precision are optimizer states too: off the device with them, and saved from there.
#[test]
fn masters_are_where_the_states_are() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let outcome = |tier: &Tier| {
        let mut engine = super::engine(Some(1.0)).with_states_in(tier).unwrap();
        let mut model = super::optimizers::half();
        for step in 0..3 {
            engine.accumulate(&mut model, &batch(step, 0)).unwrap();
            engine.step(&mut model, 1e-3).unwrap();
        }
        engine.save(&model, &path).unwrap();
        (engine.memory(&model), std::fs::read(&path).unwrap())
    };
    let ((device, expected), (host, found)) = (outcome(&Tier::Device), outcome(&Tier::Host));
    assert!(device.master > 0 && device.moments > 0 && device.host == 0);
    assert_eq!((host.master, host.moments, host.host), (0, 0, device.master + device.moments));
    assert!(found == expected, "the states are the same");
}
