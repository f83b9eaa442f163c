//! Every optimizer and every memory tier of its states, in every world size.

use super::{
    world::{CASES, Case, STAGES, assert_same, batch, run, take_step, values},
    *,
};
use crate::{
    comm::threads,
    optimizer::{Lamb, Lion, NamedLrScale, Optimizer, ParamGroups, Sgd},
};
use burn::{module::ModuleMapper, tensor::DType};

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

/// A model with a matrix that is large enough for 8-bit states.
const CASE: Case = Case { vocab: 150, hidden: 32, ..CASES[0] };

fn config(optimizer: Optimizer) -> EngineConfig {
    config_of(CASE, optimizer)
}

fn config_of(case: Case, optimizer: Optimizer) -> EngineConfig {
    let lr_scales = vec![NamedLrScale { name: "up".into(), lr_scale: 2.0 }];
    EngineConfig::new(optimizer)
        .with_max_grad_norm(case.max_grad_norm)
        .with_checkpointing(case.checkpointing)
        .with_param_groups(ParamGroups { lr_scales, ..ParamGroups::default() })
}

#[test]
fn every_optimizer_is_one_process_s_bit_for_bit_in_every_stage() {
    let _alone = backward_lock();
    for (optimizer, case) in
        optimizers().into_iter().flat_map(|one| [(one, CASE), (one, CASE.with_optimizer_in_backward())])
    {
        let new = || config_of(case, optimizer);
        let (expected, ..) = run(Case { optimizer_in_backward: false, ..case }, new(), 3);
        for stage in STAGES {
            for found in threads::run(3, |group| {
                let sharding = Sharding { stage, bucket_size: 6000 };
                run(case, new().with_communicator(Box::new(group)).with_sharding(sharding), 1).0
            }) {
                let what = format!("{optimizer:?}, {stage:?}, early {}", case.optimizer_in_backward);
                assert_same(&found.parameters, &expected.parameters, &what);
                assert_eq!(found.norms, expected.norms, "{what}");
            }
        }
    }
}

#[test]
fn states_off_the_device_give_the_same_parameters() {
    let _alone = backward_lock();
    let folder = tempfile::tempdir().unwrap();
    for optimizer in &optimizers()[..2] {
        let (expected, ..) = run(CASE, config(*optimizer), 2);
        for tier in [MemoryTier::Host, MemoryTier::File(folder.path().to_owned())] {
            for stage in STAGES {
                for world in [1, 2] {
                    for (found, memory) in threads::run(world, |group| {
                        let sharding = Sharding { stage, bucket_size: 6000 };
                        let config = config(*optimizer).with_communicator(Box::new(group)).with_sharding(sharding);
                        let (found, engine) = run(CASE, config.with_optimizer_states_in(tier.clone()), 2 / world);
                        (found, engine.memory())
                    }) {
                        assert_same(&found.parameters, &expected.parameters, &format!("{tier:?}, {stage:?}, {world}"));
                        assert_eq!(memory.moments, 0, "no state is on the device");
                        assert_eq!(memory.host > 0, tier == MemoryTier::Host);
                    }
                }
            }
        }
    }
}

#[test]
fn every_optimizer_resumes_bit_for_bit_also_elsewhere() {
    let _alone = backward_lock();
    let folder = tempfile::tempdir().unwrap();
    for (i, optimizer) in optimizers().into_iter().enumerate() {
        let path = folder.path().join(format!("{i}.safetensors"));
        let tiers: &[MemoryTier] = if i < 2 { &[MemoryTier::Device, MemoryTier::Host] } else { &[MemoryTier::Device] };
        for tier in tiers {
            threads::run(2, |group| {
                let sharding = Sharding { stage: ZeroStage::Gradients, bucket_size: 6000 };
                let config = config(optimizer).with_communicator(Box::new(group)).with_sharding(sharding);
                let (_, engine) = run(CASE, config.with_optimizer_states_in(tier.clone()), 1);
                engine.save(&path).unwrap();
            });
            let (_, mut unbroken) = run(CASE, config(optimizer).with_optimizer_states_in(tier.clone()), 2);
            for micro in 0..3 {
                unbroken.forward_backward(&[batch(77, micro)]).unwrap();
            }
            unbroken.step(1e-3).unwrap();
            for found in threads::run(3, |group| {
                let sharding = Sharding { stage: ZeroStage::Weights, bucket_size: 300 };
                let config = config(optimizer).with_communicator(Box::new(group)).with_sharding(sharding);
                let config = config.with_optimizer_states_in(tiers.last().unwrap().clone());
                let mut engine = config.init(CASE.model()).unwrap();
                engine.restore(&path).unwrap();
                let rank = engine.rank();
                engine.forward_backward(&[batch(77, rank)]).unwrap();
                engine.step(1e-3).unwrap();
                engine.with_full_params(values).unwrap()
            }) {
                assert_same(&found, &values(unbroken.model()), &format!("{optimizer:?}, from {tier:?}"));
            }
        }
    }
}

struct ToBf16;

impl ModuleMapper<TestBackend> for ToBf16 {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<TestBackend, D>>) -> Param<Tensor<TestBackend, D>> {
        let (id, value, mapper) = param.consume();
        let value = Tensor::from_inner(value.inner().cast(DType::BF16)).require_grad();
        Param::from_mapped_value(id, value, mapper)
    }
}

/// Returns the model with the matrix `down` in bf16.
pub(super) fn toy_with_bf16_matrix() -> Toy<TestBackend> {
    let mut model = CASE.model();
    model.down = ToBf16.map_float(model.down);
    model
}

/// Runs five steps of a model with a bf16 matrix, from step `from` on, and returns the matrix; the single steps are too
/// small to change a bf16 value.
fn train_bf16(engine: &mut ToyEngine, optimizer_in_backward: bool, micros: usize, from: usize) -> Vec<f32> {
    let (rank, world) = (engine.rank(), engine.world());
    for step in from..from + 5 {
        let batches: Vec<_> = (0..micros).map(|micro| batch(step, micro * world + rank)).collect();
        take_step(engine, &batches, 1e-4, optimizer_in_backward);
    }
    engine.with_full_params(|model| model.down.val().into_data().iter::<f32>().collect()).unwrap()
}

#[test]
fn masters_keep_what_half_precision_rounds_away() {
    let _alone = backward_lock();
    for case in [CASE, CASE.with_optimizer_in_backward()] {
        assert_master_weights(case);
    }
}

fn assert_master_weights(case: Case) {
    let (folder, adam) = (tempfile::tempdir().unwrap(), optimizers()[0]);
    let mut one = config_of(case, adam).init(toy_with_bf16_matrix()).unwrap();
    let expected = train_bf16(&mut one, false, 2, 0);
    let later = train_bf16(&mut one, false, 2, 5);
    let start: Vec<f32> = toy_with_bf16_matrix().down.val().into_data().iter::<f32>().collect();
    // Without master weights a step of 1e-4 is rounded away: above 0.1 bf16 numbers are at least 5e-4 apart.
    let large = |start: &f32| start.abs() > 0.1;
    let moved = later.iter().zip(&start).filter(|(a, b)| a != b && large(b)).count();
    assert!(moved > start.iter().filter(|start| large(start)).count() / 50, "{moved} of {}", start.len());
    for (i, (tier, stage)) in
        [MemoryTier::Device, MemoryTier::Host].iter().flat_map(|tier| STAGES.map(|s| (tier, s))).enumerate()
    {
        let path = folder.path().join(format!("{i}.safetensors"));
        for (found, resumed) in threads::run(2, |group| {
            let new = |communicator| {
                let sharding = Sharding { stage, bucket_size: 6000 };
                let config = config_of(case, adam).with_communicator(communicator).with_sharding(sharding);
                config.with_optimizer_states_in(tier.clone()).init(toy_with_bf16_matrix()).unwrap()
            };
            let mut group = group;
            let again = crate::comm::Communicator::split(&mut group, 0, 0).unwrap();
            let mut first = new(Box::new(group));
            let found = train_bf16(&mut first, case.optimizer_in_backward, 1, 0);
            first.save(&path).unwrap();
            first.barrier().unwrap();
            let mut second = new(again);
            second.restore(&path).unwrap();
            (found, train_bf16(&mut second, case.optimizer_in_backward, 1, 5))
        }) {
            assert_eq!(found, expected, "{case:?}, {tier:?}, {stage:?}");
            assert_eq!(resumed, later, "{case:?}, {tier:?}, {stage:?} resumed");
        }
    }
}

#[test]
fn an_overflow_on_one_rank_skips_the_step_on_all_and_halves_the_scale() {
    use crate::precision::{DynamicScale, LossScaler};
    let _alone = backward_lock();
    let settings = DynamicScale { initial_scale_power: 4, hysteresis: 1, ..DynamicScale::default() };
    let scaler = LossScaler::dynamic(settings).unwrap();
    let (expected, ..) = run(CASES[0], CASES[0].config(), 2);
    for stage in STAGES {
        for (before, skipped, after, scale, reference) in threads::run(2, |group| {
            let sharding = Sharding { stage, bucket_size: 1500 };
            let config = CASES[0].config().with_communicator(Box::new(group)).with_sharding(sharding);
            let mut engine = config.with_loss_scaler(scaler).init(CASES[0].model()).unwrap();
            let rank = engine.rank();
            let total = if rank == 1 { 0.0 } else { 20.0 };
            let before = engine.with_full_params(values).unwrap();
            engine.forward_backward(&[ToyBatch::new(0, 9, total)]).unwrap();
            let skipped = engine.step(1e-3).unwrap().skipped;
            let after = engine.with_full_params(values).unwrap();
            let scale = engine.loss_scale();
            // Scaling by powers of two is exact, so the results are those without a loss scale.
            let mut losses = 0.0;
            for step in 0..10 {
                let from = (step * 40 + rank * 7) as i32;
                let scaled = ToyBatch::new(from, from + 5 + rank as i32, 20.0 / engine.loss_scale() as f32);
                losses += engine.forward_backward(&[scaled]).unwrap();
                assert!(!engine.step(1e-3).unwrap().skipped);
            }
            assert!(losses > 0.0);
            (before, skipped, after, scale, engine.with_full_params(values).unwrap())
        }) {
            assert!(skipped && scale == 8.0, "{stage:?}: {scale}");
            assert_same(&after, &before, "skipped");
            for (a, b) in reference.iter().flatten().zip(expected.parameters.iter().flatten()) {
                assert!((a - b).abs() < 1e-6, "{stage:?}: {a} against {b}");
            }
        }
    }
}
