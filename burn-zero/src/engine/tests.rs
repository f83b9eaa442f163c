use super::*;
use crate::{
    estimate::MemoryEstimate,
    optimizer::AdamW,
    segment::{
        Checkpointing, DynTensor,
        tests::{TestBackend, Toy, ToyBatch, backward_lock, frozen, toy},
    },
    sharding::Sharding,
    stage::ZeroStage,
};
use burn::{
    module::{AutodiffModule, Module, ModuleVisitor, Param},
    tensor::{Tensor, backend::Backend},
};

mod checkpoints;
mod failures;
mod optimizer_in_backward;
mod optimizers;
mod overlap;
mod parts;
mod world;

/// The id, trainability and values of every parameter.
#[derive(Default, Debug, PartialEq)]
struct ParameterSnapshot(Vec<(ParamId, bool, Vec<f32>)>);

impl ModuleVisitor<TestBackend> for ParameterSnapshot {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<TestBackend, D>>) {
        let value = param.val();
        self.0.push((param.id, value.is_require_grad(), value.into_data().to_vec().unwrap()));
    }
}

fn parameter_snapshot(model: &Toy<TestBackend>) -> ParameterSnapshot {
    let mut read = ParameterSnapshot::default();
    model.visit(&mut read);
    read
}

type ToyEngine = Engine<TestBackend, Toy<TestBackend>>;

fn engine(model: Toy<TestBackend>, max_grad_norm: Option<f64>) -> ToyEngine {
    let config = EngineConfig::new(AdamW::default()).with_max_grad_norm(max_grad_norm);
    config.with_checkpointing(Checkpointing::Every(2)).init(model).unwrap()
}

/// Returns the accumulated gradients, ordered by path.
fn gradients(engine: &ToyEngine) -> Vec<f64> {
    let ShardingState { layout, reducer: gradients, .. } = &engine.sharded;
    let path = |(&index, value): (&usize, &DynTensor<_>)| (layout.parameters[index].path.clone(), value.clone());
    let mut sorted: Vec<_> = gradients.unreduced().iter().map(path).collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    let host = |(_, g): (String, DynTensor<_>)| g.flatten().into_data().iter::<f64>().collect::<Vec<_>>();
    sorted.into_iter().flat_map(host).collect()
}

#[test]
fn unequal_micro_batches_add_up_to_one_batch() {
    let _alone = backward_lock();
    let (mut parts, mut whole) = (engine(toy(), None), engine(toy(), None));
    let batches = [(0, 5), (5, 20)].map(|(a, b)| ToyBatch::new(a, b, 13.0));
    let whole_batch = [ToyBatch::new(0, 20, 13.0)];
    let loss = parts.forward_backward(&batches).unwrap();
    let expected = whole.forward_backward(&whole_batch).unwrap();
    assert_eq!((parts.losses(&batches).unwrap(), whole.losses(&whole_batch).unwrap()), (loss, expected));
    assert!((loss - expected).abs() < 1e-6 * expected, "{loss} against {expected}");
    let (parts, whole) = (gradients(&parts), gradients(&whole));
    let largest = whole.iter().fold(0f64, |a, b| a.max(b.abs()));
    assert_eq!(parts.len(), whole.len());
    for (part, whole) in parts.iter().zip(&whole) {
        assert!((part - whole).abs() <= 1e-6 * largest, "{part} against {whole}");
    }
}

#[test]
fn gradients_are_clipped_by_their_global_norm() {
    let _alone = backward_lock();
    let (batch, start) = ([ToyBatch::new(0, 20, 1.0)], toy());
    let mut reference = engine(start.clone(), None);
    reference.forward_backward(&batch).unwrap();
    let norm = gradients(&reference).iter().map(|g| g * g).sum::<f64>().sqrt();
    for (max, clipped) in [(norm / 4.0, true), (norm * 2.0, false)] {
        let mut engine = engine(start.clone(), Some(max));
        engine.forward_backward(&batch).unwrap();
        let unclipped = gradients(&engine);
        let report = engine.step(1e-3).unwrap();
        assert!((report.grad_norm - norm).abs() < 1e-6 * norm);
        assert_eq!(report.clipped, clipped);
        // After one step the first moment is (1 − β₁) times the clipped gradient.
        let coefficient = (max / (norm + 1e-6)).min(1.0);
        let largest = unclipped.iter().fold(0f64, |a, b| a.max(b.abs()));
        let (model, states) = (engine.model(), &engine.states.device);
        let embed = states[&model.embed.id].slots[0].clone().flatten().into_data();
        for (moment, gradient) in embed.iter::<f64>().zip(&unclipped[model.down.val().shape().num_elements()..]) {
            assert!((moment - 0.1 * coefficient * gradient).abs() <= 1e-6 * largest, "{moment} for {gradient}");
        }
    }
}

#[test]
fn a_step_changes_what_is_trainable_and_nothing_else() {
    let _alone = backward_lock();
    let batch = [ToyBatch::new(0, 20, 13.0)];
    let mut engine = engine(frozen(&["embed", "up_bias"]), Some(1.0));
    let before = parameter_snapshot(engine.model());
    let mut losses = vec![];
    for _ in 0..3 {
        losses.push(engine.train_step(&batch, 1e-2).unwrap().loss);
    }
    assert!(losses[2] < losses[1] && losses[1] < losses[0], "{losses:?}");
    assert_eq!((engine.steps(), engine.states.device.len(), engine.world()), (3, 3, 1));
    for (before, after) in before.0.iter().zip(parameter_snapshot(engine.model()).0) {
        assert_eq!((before.0, before.1), (after.0, after.1), "identity and trainability stay");
        assert_eq!(before.2 != after.2, before.1, "the trainable ones change, the others do not");
    }
}

#[test]
fn vectors_do_not_decay() {
    let _alone = backward_lock();
    // All tokens have weight zero, so every gradient is zero: only weight decay changes a parameter.
    let (model, lr) = (toy(), 0.5);
    let config = EngineConfig::new(AdamW { weight_decay: 0.2, ..AdamW::default() });
    let (up, bias) = (model.up.val().into_data(), model.up_bias.val().into_data());
    let mut engine = config.init(model).unwrap();
    engine.forward_backward(&[ToyBatch::new(0, 1, 1.0)]).unwrap();
    assert_eq!(engine.step(lr).unwrap().grad_norm, 0.0);
    let model = engine.into_model().unwrap();
    assert_eq!(model.up_bias.val().into_data(), bias);
    for (after, before) in model.up.val().into_data().iter::<f64>().zip(up.iter::<f64>()) {
        assert!((after - 0.9 * before).abs() <= 1e-6 * before.abs(), "{after} for {before}");
    }
}

#[test]
fn a_gradient_that_is_not_finite_leaves_everything_as_it_was() {
    let _alone = backward_lock();
    let mut engine = engine(toy(), Some(1.0));
    let before = parameter_snapshot(engine.model());
    engine.forward_backward(&[ToyBatch::new(0, 20, 0.0)]).unwrap();
    let error = engine.step(1e-3).unwrap_err();
    assert!(matches!(error, Error::Numeric(crate::NumericError::NotFinite { step: 0, .. })), "{error}");
    assert_eq!(parameter_snapshot(engine.model()), before);
    assert_eq!((engine.steps(), engine.states.device.len(), gradients(&engine).len()), (0, 0, 0));
    engine.forward_backward(&[ToyBatch::new(0, 20, 13.0)]).unwrap();
    assert!(engine.step(1e-3).is_ok());
    assert!(engine.model().valid().embed.val().into_data().iter::<f64>().all(f64::is_finite));
}

#[test]
fn settings_that_cannot_work_are_refused() {
    // The models are autodiff tensors: made beside another test's backward pass, they could lose its gradients.
    let _alone = backward_lock();
    let adam = |config: fn(EngineConfig) -> EngineConfig| config(EngineConfig::new(AdamW::default()));
    let host = |optimizer: Optimizer| EngineConfig::new(optimizer).with_optimizer_states_in(MemoryTier::Host);
    for (config, expected) in [
        (EngineConfig::new(AdamW { betas: (1.0, 0.9), ..AdamW::default() }), "betas"),
        (adam(|config| config.with_max_grad_norm(0.0)), "max_grad_norm"),
        (adam(|config| config.with_max_grad_norm(f64::NAN)), "max_grad_norm"),
        (host(Optimizer::Sgd(Default::default())), "Adam or AdamW"),
        (adam(|config| config.with_optimizer_states_in(MemoryTier::File("/dev/null/x".into()))), "/dev/null"),
    ] {
        let error = config.init::<TestBackend, _>(toy()).err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
