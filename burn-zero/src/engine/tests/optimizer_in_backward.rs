//! Updates during the backward pass of a step's last micro-batch. The tables in `overlap` and `optimizers` check that
//! they do not change the results.

use super::{
    overlap::LARGE,
    world::{CASES, Case, STAGES, batch, take_step, values},
    *,
};
use crate::{comm::threads, segment::Segments};

/// Runs two steps of a case, with or without updates during the backward pass.
fn two_steps(case: Case, config: EngineConfig) -> ToyEngine {
    let mut engine = config.init(case.model()).unwrap();
    for step in 0..2 {
        let own = batch(step, engine.rank());
        take_step(&mut engine, &[own], 1e-3, case.optimizer_in_backward);
    }
    engine
}

/// Without clipping the gradients of the whole model never exist at once: alive are those of the segment just left, of
/// the bucket in flight, and of the bucket being updated.
#[test]
fn early_updates_hold_few_gradients() {
    let _alone = backward_lock();
    let whole = 4 * values(&LARGE.model()).iter().map(Vec::len).sum::<usize>();
    let head = 4 * 320 * (2000 + 1);
    for world in [1, 2] {
        for stage in STAGES {
            for tier in [MemoryTier::Device, MemoryTier::Host] {
                let peaks = |case: Case| {
                    threads::run(world, |group| {
                        let sharding = Sharding { stage, bucket_size: 1 };
                        let config = case.config().with_communicator(Box::new(group)).with_sharding(sharding);
                        two_steps(case, config.with_optimizer_states_in(tier.clone())).peak_memory().gradients
                    })
                };
                let what = format!("{world} ranks, {stage:?}, {tier:?}");
                for (early, late) in peaks(LARGE.with_optimizer_in_backward()).into_iter().zip(peaks(LARGE)) {
                    // The first and the last tensor of the backward pass are the largest; their gradients never exist
                    // at the same time.
                    assert!(early <= head + head / 3, "{what}: {early} of {whole}");
                    assert!(early < late, "{what}: {early} early, {late} late");
                    assert!(
                        early == head || world > 1 || tier == MemoryTier::Host,
                        "{what}: {early}, one segment's are {head}"
                    );
                }
            }
        }
    }
}

/// The driver and the model release a tensor before it is updated, so the update is in place and its buffer stays the
/// same.
#[test]
fn early_updates_are_in_place() {
    let _alone = backward_lock();
    #[derive(Default)]
    struct BufferAddresses(Vec<*const u8>);
    impl ModuleVisitor<TestBackend> for BufferAddresses {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<TestBackend, D>>) {
            let value = DynTensor::new(param.val().inner()).primitive();
            self.0.push(value.bytes().as_ptr());
        }
    }
    let buffers = |model: &Toy<TestBackend>| {
        let mut buffers = BufferAddresses::default();
        model.visit(&mut buffers);
        buffers.0
    };
    for tied in [true, false] {
        for checkpointing in [Checkpointing::None, Checkpointing::Full, Checkpointing::All] {
            for tier in [MemoryTier::Device, MemoryTier::Host] {
                let case = Case { tied, checkpointing, ..LARGE.with_optimizer_in_backward() };
                let mut engine = two_steps(case, case.config().with_optimizer_states_in(tier.clone()));
                let before = buffers(engine.model());
                engine.train_step(&[batch(2, 0)], 1e-3).unwrap();
                assert_eq!(buffers(engine.model()), before, "{tied}, {checkpointing:?}, {tier:?}");
            }
        }
    }
}

/// Updates overlap with the backward pass, as in ZeRO-Offload; with clipping they begin only after it.
#[test]
fn early_updates_lie_inside_the_backward_pass() {
    let _alone = backward_lock();
    for tier in [MemoryTier::Device, MemoryTier::Host] {
        let events = |case: Case| {
            let sharding = Sharding { stage: ZeroStage::Gradients, bucket_size: 1 };
            let config = case.config().with_sharding(sharding).with_optimizer_states_in(tier.clone());
            two_steps(case, config).trace().events(0)
        };
        let spans = |events: &[serde_json::Value], name: &str| -> Vec<[f64; 2]> {
            let own = events.iter().filter(|event| event["name"] == name);
            own.map(|event| ["ts", "dur"].map(|key| event[key].as_f64().unwrap())).collect()
        };
        // For each step, the number of updates that ended before the backward pass of segment 0 began.
        let ended = |case: Case| -> Vec<usize> {
            let events = events(case);
            let (updates, turns) = (spans(&events, "update"), spans(&events, "backward 0"));
            assert_eq!((updates.len(), turns.len()), (12, 2), "{tier:?}: a bucket for each parameter, twice");
            let passes = spans(&events, "B 0").into_iter().zip(turns);
            let inside = |[pass, _]: [f64; 2], [turn, _]: [f64; 2]| {
                updates.iter().filter(|[begin, long]| pass < *begin && begin + long <= turn).count()
            };
            passes.map(|(pass, turn)| inside(pass, turn)).collect()
        };
        assert!(ended(LARGE.with_optimizer_in_backward()).iter().all(|&updates| updates >= 2), "{tier:?}");
        assert_eq!(ended(LARGE), [0, 0], "{tier:?}: all gradients are waited for");
    }
}

#[test]
fn an_early_update_with_what_is_not_finite_is_an_error_after_the_fact() {
    let _alone = backward_lock();
    for stage in STAGES {
        for errors in threads::run(2, |group| {
            let case = CASES[0].with_optimizer_in_backward();
            let sharding = Sharding { stage, bucket_size: 300 };
            let config = case.config().with_communicator(Box::new(group)).with_sharding(sharding);
            let mut engine = config.init(case.model()).unwrap();
            let total = if engine.rank() == 1 { 0.0 } else { 20.0 };
            let error = engine.train_step(&[ToyBatch::new(0, 9, total)], 1e-3).unwrap_err();
            let updated = engine.with_full_params(values).unwrap();
            (
                matches!(error, Error::Numeric(crate::NumericError::NotFinite { step: 0, .. })),
                updated.iter().flatten().any(|value| value.is_nan()),
            )
        }) {
            assert_eq!(errors, (true, true), "{stage:?}");
        }
    }
}

/// A model with a parameter that some batches do not use.
#[derive(Module, Debug)]
struct ConditionalModel<B: Backend> {
    always: Param<Tensor<B, 1>>,
    at_times: Param<Tensor<B, 1>>,
}

impl<B: Backend> Segments<B> for ConditionalModel<B> {
    /// True if the parameter `at_times` is used.
    type Batch = bool;

    fn segments(&self) -> usize {
        2
    }

    fn forward_segment(&self, segment: usize, batch: &bool, inputs: Vec<DynTensor<B>>) -> Vec<DynTensor<B>> {
        let x = inputs.into_iter().next().map(DynTensor::tensor::<1>);
        vec![DynTensor::new(match x {
            None => self.always.val() * 2.0,
            Some(x) if *batch && segment == 1 => x * self.at_times.val(),
            Some(x) => x,
        })]
    }
}

impl<B: AutodiffBackend> TrainSegments<B> for ConditionalModel<B> {
    fn inner_batch(batch: &bool) -> bool {
        *batch
    }

    fn visit_segment<V: ModuleVisitor<B>>(&self, segment: usize, visitor: &mut V) {
        let (name, param) = [("always", &self.always), ("at_times", &self.at_times)][segment];
        visitor.enter_module(name, "");
        visitor.visit_float(param);
        visitor.exit_module(name, "");
    }
}

/// Parameters for which any rank has a gradient are updated on all ranks, and no others.
#[test]
fn who_has_a_gradient_is_agreed_upon_early_too() {
    let _alone = backward_lock();
    let uses = [[false, false], [true, false], [false, true], [true, true]];
    for (stage, tier) in STAGES.into_iter().flat_map(|stage| [(stage, MemoryTier::Device), (stage, MemoryTier::Host)]) {
        let outcome = |early: bool, uses: [bool; 2]| {
            threads::run(2, |group| {
                let param = |value: f32| Param::from_tensor(Tensor::full([3], value, &Default::default()));
                let model = ConditionalModel::<TestBackend> { always: param(1.0), at_times: param(2.0) };
                let config = EngineConfig::new(AdamW::default()).with_communicator(Box::new(group));
                let config = config.with_sharding(Sharding { stage, bucket_size: 1 });
                let mut engine = config.with_optimizer_states_in(tier.clone()).init(model).unwrap();
                let rank = engine.rank();
                for step in 0..3 {
                    let used = uses[rank] && step != 1;
                    if early {
                        engine.train_step(&[used], 0.1).unwrap();
                    } else {
                        engine.forward_backward(&[used]).unwrap();
                        engine.step(0.1).unwrap();
                    }
                }
                let read = |model: &ConditionalModel<TestBackend>| {
                    [&model.always, &model.at_times].map(|param| param.val().into_data().to_vec::<f32>().unwrap())
                };
                engine.with_full_params(read).unwrap()
            })
        };
        for uses in uses {
            let (early, late) = (outcome(true, uses), outcome(false, uses));
            assert_eq!(early, late, "{stage:?}, {tier:?}, {uses:?}");
            assert!(early.iter().all(|[_, at_times]| (at_times == &[2.0; 3]) != uses.contains(&true)), "{early:?}");
        }
    }
}
