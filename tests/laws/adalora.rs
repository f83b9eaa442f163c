//! AdaLoRA trains as PEFT's: losses, the ranks that every allocation keeps, and the saved files.

use burn::{
    backend::{Autodiff, Flex},
    module::Param,
    tensor::{DType, Tensor, TensorData},
};
use burn_llama::{Checkpoint, Example, Llama, SequenceLayout};
use burn_peft::{
    AdapterModel, ForwardContext, Linears, LoraConfig, TargetModules,
    adapter::{self, RankAllocator},
    config::AdaLoraConfig,
};
use burn_zero::{Engine, EngineConfig, optimizer::AdamW, segment::DynTensor};
use laws::{
    files::{fields, same_files, saved_adapters},
    fixture, one_backward_at_a_time,
    reference::{Reference, examples, row_logits_differ},
    tensors,
};
use serde_json::Value;
use std::collections::BTreeMap;

type Train = Autodiff<Flex>;
type TrainEngine = Engine<Train, Llama<Train>>;

fn steps() -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture("adalora/steps.json")).unwrap()).unwrap()
}

fn base<B: burn_llama::kernel::Kernels>() -> Llama<B> {
    Checkpoint::open(&fixture("models/gqa_llama3")).unwrap().load(DType::F32, &Default::default()).unwrap()
}

fn reference() -> Reference {
    tensors("models/gqa_llama3/reference.safetensors")
}

/// Returns the model with the fixture's adapter before its first step.
fn initial() -> Llama<Train> {
    let settings = steps()["settings"].clone();
    let config = LoraConfig {
        r: settings["init_r"].as_u64().unwrap() as usize,
        lora_alpha: 6.0,
        target_modules: TargetModules::Suffixes(["down_proj", "q_proj", "v_proj"].map(str::to_owned).into()),
        adalora: Some(serde_json::from_value::<AdaLoraConfig>(settings).unwrap()),
        base_model_name_or_path: Some("models/gqa_llama3".to_owned()),
        ..LoraConfig::default()
    };
    let (mut model, mut values) = (base::<Train>(), tensors("adalora/initial.safetensors"));
    adapter::attach(&mut model, "default", &config, 0).unwrap();
    model.linears_mut(&mut |path, linear| {
        for lora in &mut linear.adapters {
            let mut set = |param: &mut Param<Tensor<Train, 2>>, part: &str| {
                let data: TensorData = values.remove(&format!("{path}.{part}")).unwrap();
                *param = param.clone().map(|_| Tensor::from_data(data, &Default::default()).require_grad());
            };
            set(&mut lora.lora_a, "lora_A");
            set(&mut lora.lora_b, "lora_B");
            set(&mut lora.adalora.as_mut().unwrap().lora_e, "lora_E");
        }
    });
    assert!(values.is_empty(), "{:?}", values.keys());
    adapter::train_active(model).unwrap()
}

fn engine(model: Llama<Train>) -> TrainEngine {
    let norm = steps()["settings"]["max_norm"].as_f64().unwrap();
    let adamw = AdamW { weight_decay: 0.0, ..AdamW::default() };
    EngineConfig::new(adamw).with_max_grad_norm(norm).init(model).unwrap()
}

/// Takes the step, counted from 1, and returns its loss.
fn train_step(engine: &mut TrainEngine, allocator: &mut RankAllocator<Train>, step: usize, rows: &[Example]) -> f64 {
    let settings = steps()["settings"].clone();
    let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len()).collect();
    let layout = SequenceLayout::from_lengths(&lengths, false);
    let targets: usize = rows.iter().map(Example::num_targets).sum();
    let batch = engine.model().batch(rows, &layout, 1.0 / targets as f32, ForwardContext::default()).unwrap();
    let loss = engine.forward_backward(std::slice::from_ref(&batch)).unwrap();
    let orthogonality = allocator.orthogonality(engine.model());
    for (id, value) in orthogonality.gradients {
        engine.accumulate_gradient(id, DynTensor::new(value));
    }
    let mut gradients = BTreeMap::new();
    for id in allocator.parameters(engine.model()) {
        gradients.insert(id, engine.accumulated_gradient(id).unwrap().tensor::<2>());
    }
    let report = engine.step(settings["learning_rate"].as_f64().unwrap()).unwrap();
    let clip = (settings["max_norm"].as_f64().unwrap() / (report.grad_norm + 1e-6)).min(1.0);
    engine.map_model(|mut model| {
        allocator.update_and_allocate(step, &mut model, |id| Some(gradients.get(&id)?.clone() * clip));
        model
    });
    loss + orthogonality.loss
}

/// Returns the ranks that each layer keeps.
fn kept(model: &Llama<Train>) -> Value {
    let mut kept = serde_json::Map::new();
    model.linears(&mut |path, linear| {
        let adalora = linear.adapters.first().and_then(|lora| lora.adalora.as_ref());
        kept.extend(
            adalora.and_then(|adalora| adalora.kept.as_ref()).map(|kept| (path.to_owned(), kept.clone().into())),
        );
    });
    if kept.is_empty() { Value::Null } else { kept.into() }
}

#[test]
fn losses_ranks_and_files_are_peft_s() {
    let _lock = one_backward_at_a_time();
    let (rows, expected) = (examples(&reference()), steps());
    let mut engine = engine(initial());
    let mut allocator = RankAllocator::new(engine.model(), "default").unwrap();
    for (index, expected) in expected["steps"].as_array().unwrap().iter().enumerate() {
        let loss = train_step(&mut engine, &mut allocator, index + 1, &rows);
        let expected_loss = expected["loss"].as_f64().unwrap();
        assert!(
            (loss - expected_loss).abs() < 1e-5 * expected_loss,
            "step {}: {loss} against {expected_loss}",
            index + 1
        );
        assert_eq!(kept(engine.model()), expected["kept"], "step {}", index + 1);
    }
    let folder = tempfile::tempdir().unwrap();
    let ours = saved_adapters(folder.path()).join("trained");
    engine.model().save_adapter("default", &ours).unwrap();
    let theirs = fixture("adalora/trained");
    same_files(&ours, &theirs, 1e-4, "adalora");
    assert_eq!(fields(&ours)["rank_pattern"], fields(&theirs)["rank_pattern"]);
    // Read back, it is plain LoRA that computes the same.
    let mut read = base::<Flex>();
    adapter::load(&mut read, "default", &ours).unwrap();
    let mut model = engine.into_model().unwrap();
    model.linears_mut(&mut |_, linear| linear.adapters.iter_mut().for_each(|lora| lora.active = true));
    let whole = burn_llama::generate::logits(&burn::module::AutodiffModule::valid(&model), &rows[0].ids).unwrap();
    let found = burn_llama::generate::logits(&read, &rows[0].ids).unwrap();
    assert!((whole - found).abs().max().into_scalar() < 1e-4);
    assert!(row_logits_differ(&read, &reference()) > 1e-2, "the adapter must matter");
}

/// A state that is saved and restored in the middle leads to the same ranks and losses.
#[test]
fn training_goes_on_from_a_saved_state() {
    let _lock = one_backward_at_a_time();
    let rows = examples(&reference());
    let mut expected = engine(initial());
    let mut allocator = RankAllocator::new(expected.model(), "default").unwrap();
    for step in 1..=7 {
        train_step(&mut expected, &mut allocator, step, &rows);
    }
    let state = allocator.state(expected.model());
    let mut resumed = RankAllocator::new(expected.model(), "default").unwrap();
    let losses = |engine: &mut TrainEngine, allocator: &mut RankAllocator<Train>| -> Vec<f64> {
        (8..=16).map(|step| train_step(engine, allocator, step, &rows)).collect()
    };
    let folder = tempfile::tempdir().unwrap();
    expected.save(&folder.path().join("state")).unwrap();
    let mut again = engine(initial());
    again.restore(&folder.path().join("state")).unwrap();
    let mut result = Ok(());
    again.map_model(|mut model| {
        result = resumed.restore(&mut model, state.clone());
        model
    });
    result.unwrap();
    assert_eq!(losses(&mut again, &mut resumed), losses(&mut expected, &mut allocator));
    assert_eq!(kept(again.model()), kept(expected.model()));
    let mut other = state;
    other.insert("model.layers.9.kept".to_owned(), TensorData::from([1.0f32]));
    let error = resumed.restore(&mut initial(), other).unwrap_err().to_string();
    assert!(error.contains("model.layers.9.kept"), "{error}");
}
