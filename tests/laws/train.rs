//! Training equals that of torch, and does not depend on how gradients are computed or how rows are split into batches.

use burn::{
    backend::{Autodiff, Flex},
    tensor::{DType, Tensor, TensorData},
};
use burn_llama::{Checkpoint, Example, Llama, SequenceLayout};
use burn_peft::{DropoutKey, ForwardContext, LoraConfig, MatmulPrecision, TargetModules, adapter, param};
use burn_zero::{
    EngineConfig,
    optimizer::{AdamW, ParamGroups},
    segment::{self, Checkpointing, Segments},
};
use laws::{fixture, floats, max_abs, max_diff, one_backward_at_a_time, reference::driven, tensors};
use std::collections::BTreeMap;

type Train = Autodiff<Flex>;

fn rows() -> Vec<Example> {
    let row = |n: usize, prompt: usize| Example {
        ids: (0..n).map(|i| (i * 13 + prompt) as u32 % 60).collect(),
        loss_mask: (0..n).map(|i| i >= prompt).collect(),
    };
    vec![row(20, 5), row(9, 2), row(14, 11), row(31, 3)]
}

fn layout(rows: &[Example], packed: bool) -> SequenceLayout {
    SequenceLayout::from_lengths(&rows.iter().map(|row| row.ids.len()).collect::<Vec<_>>(), packed)
}

fn context(layout: &SequenceLayout, first: usize) -> ForwardContext {
    ForwardContext::training(DropoutKey { seed: 1, step: 2, tokens: layout.dropout_tokens(first as u64) })
}

fn adapted(dropout: f64, dtype: DType) -> Llama<Train> {
    let checkpoint = Checkpoint::open(&fixture("models/gqa_llama3")).unwrap();
    let mut model = checkpoint.load::<Train>(dtype, &Default::default()).unwrap();
    let target_modules = TargetModules::Pattern("all-linear".into());
    let config = LoraConfig { r: 3, lora_alpha: 7.0, lora_dropout: dropout, target_modules, ..LoraConfig::default() };
    adapter::attach(&mut model, "default", &config, 5).unwrap();
    // B starts at zero, which would make the gradient of A zero as well.
    burn_peft::Linears::linears_mut(&mut model, &mut |_, linear| {
        for adapter in &mut linear.adapters {
            adapter.lora_b = adapter.lora_b.clone().map(|b| (b.detach() + 0.03).detach().require_grad());
        }
    });
    param::train_only(model, adapter::is_adapter)
}

fn gradients(model: &Llama<Train>, dropout: bool, checkpointing: Checkpointing) -> BTreeMap<String, Vec<f32>> {
    let rows = rows();
    let (layout, targets) = (layout(&rows, false), rows.iter().map(Example::num_targets).sum::<usize>());
    let context = if dropout { context(&layout, 0) } else { ForwardContext::default() };
    let batch = model.batch(&rows, &layout, 1.0 / targets as f32, context).unwrap();
    driven(model, &batch, checkpointing)
}

#[test]
fn recomputed_segments_give_the_retained_gradients_with_dropout() {
    let _lock = one_backward_at_a_time();
    let model = adapted(0.1, DType::F32);
    let retained = gradients(&model, true, Checkpointing::None);
    assert_eq!(retained.len(), 2 * 7 * 2, "A and B of seven layers in two blocks");
    for checkpointing in [Checkpointing::Full, Checkpointing::Every(2), Checkpointing::Every(3)] {
        assert_eq!(gradients(&model, true, checkpointing), retained, "{checkpointing:?}");
    }
    let without = gradients(&model, false, Checkpointing::None);
    let difference = |path: &String| max_diff(&without[path], &retained[path]) / max_abs(&retained[path]);
    assert!(retained.keys().all(|path| difference(path) > 1e-3), "dropout must matter");
}

#[test]
fn only_positions_with_a_target_leave_the_last_layer_s_attention() {
    let _lock = one_backward_at_a_time();
    for (packed, compute) in
        [(true, MatmulPrecision::F32), (false, MatmulPrecision::F32), (true, MatmulPrecision::Bf16)]
    {
        let (model, rows) = (adapted(0.1, DType::F32).with_matmul_precision(compute), rows());
        let (layout, targets) = (layout(&rows, packed), rows.iter().map(Example::num_targets).sum::<usize>());
        let batch = model.batch(&rows, &layout, 1.0, context(&layout, 0)).unwrap();
        let (mut values, last) = (Vec::new(), model.segments() - 1);
        for segment in 0..last {
            values = model.forward_segment(segment, &batch, values);
            let tokens = if segment + 2 < last { layout.rows * layout.length } else { targets };
            assert_eq!(values[0].clone().tensor::<2>().dims(), [tokens, model.config().hidden_size], "{segment}");
        }
        let hidden = model.hidden_states(model.embed(batch.ids.clone()), &layout, None, &context(&layout, 0)).unwrap();
        let all = model.loss(
            hidden.select(0, batch.output_slots.slots.clone()),
            &batch.targets,
            &batch.output_slots.forward_context,
        );
        let (all, found) = (floats(&all.into_data()), floats(&model.batch_loss(&batch).into_data()));
        assert!(max_diff(&found, &all) < 1e-5, "packed {packed}, {compute:?}: {:e}", max_diff(&found, &all));
    }
}

#[test]
fn a_tied_embedding_s_gradient_comes_once_and_whole() {
    let _lock = one_backward_at_a_time();
    let checkpoint = Checkpoint::open(&fixture("models/tied_bias")).unwrap();
    let model = checkpoint.load::<Train>(DType::F32, &Default::default()).unwrap();
    let rows = rows();
    let batch = model.batch(&rows, &layout(&rows, true), 0.1, ForwardContext::default()).unwrap();
    let mut grads = model.batch_loss(&batch).sum().backward();
    let expected = model.model.embed_tokens.weight.val().grad_remove(&mut grads).unwrap();
    let expected = floats(&expected.into_data());
    let mut found = Vec::new();
    segment::forward_backward(&model, &batch, Checkpointing::None, &mut |ready| found.extend(ready));
    let names = found.iter().filter(|gradient| gradient.path == "model.embed_tokens.weight").count();
    assert_eq!(names, 1);
    let last = found.pop().unwrap();
    assert_eq!(last.path, "model.embed_tokens.weight");
    assert!(max_diff(&floats(&last.value.flatten().into_data()), &expected) <= 1e-6 * max_abs(&expected));
}

/// Returns the adapter values after three steps.
fn trained(micro: usize, packed: bool, dtype: DType) -> Vec<f32> {
    let (model, rows) = (adapted(0.1, dtype), rows());
    let mut engine = EngineConfig::new(AdamW::default()).with_max_grad_norm(1.0).init(model).unwrap();
    let targets: usize = rows.iter().map(Example::num_targets).sum();
    for _ in 0..3 {
        for (index, part) in rows.chunks(micro).enumerate() {
            let layout = layout(part, packed);
            let context = context(&layout, index * micro);
            let batch = engine.model().batch(part, &layout, 1.0 / targets as f32, context).unwrap();
            engine.forward_backward(&[batch]).unwrap();
        }
        engine.step(1e-2).unwrap();
    }
    let mut all = Vec::new();
    burn_peft::Linears::linears(engine.model(), &mut |_, linear| {
        for adapter in &linear.adapters {
            all.extend(floats(&adapter.lora_a.val().into_data()));
            all.extend(floats(&adapter.lora_b.val().into_data()));
        }
    });
    all
}

#[test]
fn accumulated_and_packed_micro_batches_are_one_batch_with_unequal_targets_and_dropout() {
    let _lock = one_backward_at_a_time();
    let one = trained(4, false, DType::F32);
    for (micro, packed) in [(1, false), (2, false), (3, false), (4, true), (3, true)] {
        let difference = max_diff(&trained(micro, packed, DType::F32), &one);
        assert!(difference < 2e-5, "micro-batches of {micro}, packed {packed}: {difference:e}");
    }
}

#[test]
fn half_precision_weights_train_close_to_f32() {
    let _lock = one_backward_at_a_time();
    let reference = trained(4, true, DType::F32);
    for dtype in [DType::BF16, DType::F16] {
        let found = trained(4, true, dtype);
        assert!(found.iter().all(|x| x.is_finite()));
        // Three Adam steps move a weight by about 0.03 at most, regardless of rounding.
        let difference = found.iter().zip(&reference).map(|(a, b)| (a - b).abs() as f64).sum::<f64>();
        assert!(difference / (found.len() as f64) < 4e-3, "{dtype:?}: {difference}");
    }
}

#[test]
fn adamw_is_torch_s() {
    let golden = tensors("torch/adamw.safetensors");
    let rates = golden["lr"].clone().convert::<f64>().into_vec::<f64>().unwrap();
    let adamw = AdamW::default();
    for name in ["a", "b"] {
        let tensor = |key: String| {
            let values = floats(&golden[&key]);
            let n = values.len();
            Tensor::<Flex, 1>::from_data(TensorData::new(values, [n]), &Default::default())
        };
        let (mut value, mut state) = (tensor(format!("param0.{name}")), None);
        for (t, &rate) in rates.iter().enumerate() {
            let (new, moments) =
                adamw.update(rate, adamw.weight_decay, value, tensor(format!("grad.{t}.{name}")), state);
            (value, state) = (new, Some(moments));
            let expected = floats(&golden[&format!("param.{t}.{name}")]);
            let difference = max_diff(&floats(&value.clone().into_data()), &expected);
            assert!(difference <= 1e-6 * max_abs(&expected), "{name} after step {t}: {difference:e}");
        }
    }
}

#[test]
fn trainable_counts_are_peft_s() {
    let text = std::fs::read(fixture("peft/trainable_counts.json")).unwrap();
    let cases: Vec<serde_json::Value> = serde_json::from_slice(&text).unwrap();
    assert!(cases.len() >= 9);
    for case in cases {
        let size = |key: &str| case[key].as_u64().unwrap() as usize;
        let (hidden, mlp) = (size("hidden_size"), size("intermediate_size"));
        let kv = size("head_dim") * size("num_key_value_heads");
        let wide = size("head_dim") * size("num_attention_heads");
        let block = [
            ("self_attn.q_proj", [wide, hidden]),
            ("self_attn.k_proj", [kv, hidden]),
            ("self_attn.v_proj", [kv, hidden]),
            ("self_attn.o_proj", [hidden, wide]),
            ("mlp.gate_proj", [mlp, hidden]),
            ("mlp.up_proj", [mlp, hidden]),
            ("mlp.down_proj", [hidden, mlp]),
        ];
        let blocks = (0..size("num_hidden_layers"))
            .flat_map(|layer| block.map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape)));
        let layers: Vec<_> = blocks.chain([("lm_head".to_owned(), [size("vocab_size"), hidden])]).collect();
        let target_modules: TargetModules = serde_json::from_value(case["target_modules"].clone()).unwrap();
        let config = LoraConfig { r: size("r"), target_modules, ..LoraConfig::default() };
        let count = config.count_trainable(layers.iter().map(|(path, shape)| (path.as_str(), *shape))).unwrap();
        assert_eq!(count, size("trainable"), "{} {}", case["model"], config.target_modules);
    }
}

/// Uses the fact that the first Adam step moves every value by its learning rate.
#[test]
fn lora_plus_moves_b_ratio_times_as_fast() {
    let _lock = one_backward_at_a_time();
    let moved = |groups: ParamGroups| {
        let (model, rows) = (adapted(0.0, DType::F32), rows());
        let values = |model: &Llama<Train>| {
            let mut all = [Vec::new(), Vec::new()];
            burn_peft::Linears::linears(model, &mut |_, linear| {
                let Some(adapter) = linear.adapters.first() else { return };
                for (all, matrix) in all.iter_mut().zip([&adapter.lora_a, &adapter.lora_b]) {
                    all.extend(floats(&matrix.val().into_data()));
                }
            });
            all
        };
        let before = values(&model);
        let batch = model.batch(&rows, &layout(&rows, true), 0.1, ForwardContext::default()).unwrap();
        let config = EngineConfig::new(AdamW { weight_decay: 0.0, ..AdamW::default() }).with_param_groups(groups);
        let mut engine = config.init(model).unwrap();
        engine.forward_backward(&[batch]).unwrap();
        engine.step(1e-4).unwrap();
        let after = values(engine.model());
        [0, 1].map(|i| before[i].iter().zip(&after[i]).map(|(a, b)| (a - b).abs() as f64).sum::<f64>())
    };
    let ([a, b], [same, faster]) = (moved(ParamGroups::default()), moved(ParamGroups::lora_plus(16.0)));
    assert!((same / a - 1.0).abs() < 1e-3 && (faster / b - 16.0).abs() < 0.02, "A {a} {same}, B {b} {faster}");
}
