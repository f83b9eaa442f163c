//! Every optimizer, and every place for its states, in every world.

use super::{
    world::{CASES, Case, STAGES, assert_same, batch, run, values},
    *,
};
use crate::{
    comm::threads,
    optimizer::{Groups, Lamb, Lion, Optimizer, Sgd},
};

fn optimizers() -> [Optimizer; 6] {
    let adam = AdamW { weight_decay: 0.1, ..AdamW::default() };
    [
        Optimizer::AdamW(adam),
        Optimizer::Adam(adam),
        Optimizer::AdamW8bit(adam),
        Optimizer::Lamb(Lamb { weight_decay: 0.1, ..Lamb::default() }),
        Optimizer::Lion(Lion { weight_decay: 0.1, ..Lion::default() }),
        Optimizer::Sgd(Sgd { momentum: 0.9, ..Sgd::default() }),
    ]
}

/// A matrix that is large enough for states of 8 bits.
const CASE: Case = Case { vocab: 150, hidden: 32, ..CASES[0] };

fn engine(optimizer: Optimizer) -> Engine<AB> {
    Engine::new(optimizer, Some(0.02), CASE.checkpointing)
        .with_groups(Groups { scales: vec![("up".into(), 2.0)], ..Groups::default() })
}

#[test]
fn every_optimizer_is_one_process_s_bit_for_bit_in_every_stage() {
    let _alone = alone();
    for optimizer in optimizers() {
        let alone = || engine(optimizer).with_states_in(&Tier::Device).unwrap();
        let (expected, ..) = run(CASE, alone(), 3);
        for stage in STAGES {
            for found in threads::run(3, |group| {
                let sharding = Sharding { stage, bucket_size: 6000 };
                let engine = engine(optimizer).in_world(Box::new(group), sharding);
                run(CASE, engine.with_states_in(&Tier::Device).unwrap(), 1).0
            }) {
                assert_same(&found.parameters, &expected.parameters, &format!("{optimizer:?}, {stage:?}"));
            }
        }
    }
}

#[test]
fn states_off_the_device_give_the_same_parameters() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    for optimizer in &optimizers()[..2] {
        let (expected, ..) = run(CASE, engine(*optimizer), 2);
        for tier in [Tier::Host, Tier::File(folder.path().to_owned())] {
            for stage in STAGES {
                for world in [1, 2] {
                    for (found, memory) in threads::run(world, |group| {
                        let sharding = Sharding { stage, bucket_size: 6000 };
                        let engine = engine(*optimizer).in_world(Box::new(group), sharding);
                        let (found, engine, model) = run(CASE, engine.with_states_in(&tier).unwrap(), 2 / world);
                        (found, engine.memory(&model))
                    }) {
                        assert_same(&found.parameters, &expected.parameters, &format!("{tier:?}, {stage:?}, {world}"));
                        assert_eq!(memory.moments, 0, "no state is on the device");
                        assert_eq!(memory.host > 0, tier == Tier::Host);
                    }
                }
            }
        }
    }
}

#[test]
fn every_optimizer_resumes_bit_for_bit_also_elsewhere() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    for (i, optimizer) in optimizers().into_iter().enumerate() {
        let path = folder.path().join(format!("{i}.safetensors"));
        let tiers: &[Tier] = if i < 2 { &[Tier::Device, Tier::Host] } else { &[Tier::Device] };
        for tier in tiers {
            threads::run(2, |group| {
                let sharding = Sharding { stage: Stage::Gradients, bucket_size: 6000 };
                let engine = engine(optimizer).in_world(Box::new(group), sharding).with_states_in(tier).unwrap();
                let (_, engine, model) = run(CASE, engine, 1);
                engine.save(&model, &path).unwrap();
            });
            let (_, mut unbroken, mut model) = run(CASE, engine(optimizer).with_states_in(tier).unwrap(), 2);
            for micro in 0..3 {
                unbroken.accumulate(&mut model, &batch(77, micro)).unwrap();
            }
            unbroken.step(&mut model, 1e-3).unwrap();
            for found in threads::run(3, |group| {
                let sharding = Sharding { stage: Stage::Weights, bucket_size: 300 };
                let engine = engine(optimizer).in_world(Box::new(group), sharding);
                let mut engine = engine.with_states_in(tiers.last().unwrap()).unwrap();
                let mut model = engine.restore(CASE.model(), &path).unwrap();
                let rank = engine.rank();
                engine.accumulate(&mut model, &batch(77, rank)).unwrap();
                engine.step(&mut model, 1e-3).unwrap();
                engine.with_whole(&model, values).unwrap()
            }) {
                assert_same(&found, &values(&model), &format!("{optimizer:?}, from {tier:?}"));
            }
        }
    }
}
