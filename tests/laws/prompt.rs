//! Prompt methods equal PEFT's in files, logits, gradients and generation; tests of their properties.

use burn::{
    backend::{Autodiff, Flex},
    module::AutodiffModule,
    tensor::DType,
};
use burn_llama::{Checkpoint, Example, Generation, GenerationConfig, Llama, SequenceLayout, generate};
use burn_peft::{
    DropoutKey, ForwardContext, LoraConfig, Prompt, PromptConfig, adapter, param,
    prompt::{PromptMethod, PromptTuningInit},
};
use burn_zero::{EngineConfig, optimizer::AdamW, segment::Checkpointing};
use laws::{
    files::{fields, same_files, saved_adapters},
    fixture, floats, integers, max_abs, max_diff, one_backward_at_a_time,
    reference::{Reference, compare, driven_rows, examples, gradients, row_logits_differ},
    tensors,
};
use serde_json::{Value, json};
use std::path::PathBuf;

type Train = Autodiff<Flex>;

/// Pairs of fixture and base model.
const CASES: [(&str, &str); 8] = [
    ("prefix", "gqa_llama3"),
    ("prefix_projection", "gqa_llama3"),
    ("prefix_qwen2", "qwen2"),
    ("prefix_projection_qwen2", "qwen2"),
    ("prompt", "gqa_llama3"),
    ("prompt_qwen2", "qwen2"),
    ("p_tuning", "gqa_llama3"),
    ("p_tuning_qwen2", "qwen2"),
];

fn base<B: burn_llama::kernel::Kernels>(name: &str) -> Llama<B> {
    Checkpoint::open(&fixture(&format!("models/{name}"))).unwrap().load(DType::F32, &Default::default()).unwrap()
}

fn directory(name: &str) -> PathBuf {
    fixture(&format!("prompt/{name}"))
}

fn reference(name: &str) -> Reference {
    tensors(&format!("prompt/{name}/reference.safetensors"))
}

/// Returns the model with the prompt of PEFT's adapter file, in which the encoder is already collapsed.
fn collapsed<B: burn_llama::kernel::Kernels>(name: &str, model: &str) -> Llama<B> {
    let mut model = base::<B>(model);
    let read = Prompt::load(&directory(name), model.config().base_shape(), &model.device()).unwrap();
    assert!(read.unknown_fields.is_empty(), "{name}: {:?}", read.unknown_fields);
    model.prompts = vec![read.value];
    model
}

/// Returns the trainable model with the prompt encoder from before PEFT collapsed it.
fn whole(name: &str, model: &str, dropout: f64) -> Llama<Train> {
    let mut model = base::<Train>(model);
    let read = Prompt::<Train>::load(&directory(name), model.config().base_shape(), &model.device()).unwrap();
    let mut config = read.value.config().clone();
    if let PromptMethod::Prefix { dropout: p, .. } = &mut config.method {
        *p = dropout;
    }
    let mut prompt = model.new_prompt(&config, None, 3).unwrap();
    prompt.read_encoder(&directory(name).join("encoder.safetensors")).unwrap();
    model.prompts = vec![prompt];
    param::train_only(model, adapter::is_adapter)
}

/// Returns our path for a parameter of PEFT's prompt encoder.
fn path(key: &str) -> String {
    let parts: Vec<&str> = key.split('.').collect();
    match parts[..] {
        [_, index, part] => format!("prompts.0.encoder.layers.{}.{part}", index.parse::<usize>().unwrap() / 2),
        _ => "prompts.0.encoder.embedding".to_owned(),
    }
}

#[test]
fn logits_and_gradients_are_peft_s() {
    let _lock = one_backward_at_a_time();
    for (name, model) in CASES {
        let reference = reference(name);
        let difference = row_logits_differ(&collapsed::<Flex>(name, model), &reference);
        assert!(difference < 1e-4, "{name}: logits differ by {difference:e}");
        let plain = row_logits_differ(&base::<Flex>(model), &reference);
        assert!(plain > 1e-2, "{name}: the prompt must matter, not {plain:e}");

        let model = whole(name, model, 0.0);
        assert!(row_logits_differ(&model.valid(), &reference) < 1e-4, "{name}: the whole encoder");
        let (loss, found) = gradients(&model, &reference);
        assert!((loss - floats(&reference["loss"])[0]).abs() < 1e-5, "{name}: loss {loss}");
        let keys: Vec<&str> = reference.keys().filter_map(|key| key.strip_prefix("grad.")).collect();
        assert_eq!(keys.len(), found.len(), "{name}: only the encoder carries gradients, and all of it does");
        for key in keys {
            compare(&found[&path(key)], &floats(&reference[&format!("grad.{key}")]), &format!("{name}: {key}"));
        }
    }
}

#[test]
fn segments_give_the_gradients_of_the_whole_however_rows_lie() {
    let _lock = one_backward_at_a_time();
    for (name, base) in CASES {
        let (model, reference) = (whole(name, base, 0.0), reference(name));
        let (_, expected) = gradients(&model, &reference);
        let rows = examples(&reference);
        for (packed, how) in [
            (true, Checkpointing::None),
            (false, Checkpointing::None),
            (true, Checkpointing::Full),
            (false, Checkpointing::Every(2)),
        ] {
            let found = driven_rows(&model, &rows, packed, how);
            assert!(found.keys().eq(expected.keys()), "{name}: {:?}", found.keys());
            for (path, expected) in &expected {
                let difference = max_diff(&found[path], expected);
                assert!(
                    difference <= 2e-5 * max_abs(expected),
                    "{name}, packed {packed}, {how:?}: {path} {difference:e}"
                );
            }
        }
    }
}

fn rows() -> Vec<Example> {
    let row = |n: usize, prompt: usize| Example {
        ids: (0..n).map(|i| (i * 13 + prompt) as u32 % 60).collect(),
        loss_mask: (0..n).map(|i| i >= prompt).collect(),
    };
    vec![row(20, 5), row(9, 2), row(14, 11), row(31, 3)]
}

/// Returns the virtual tokens after three training steps, trained together with a LoRA adapter with dropout.
fn trained(name: &str, base: &str, micro: usize, packed: bool) -> Vec<f32> {
    let (mut model, rows) = (whole(name, base, 0.2), rows());
    let lora = LoraConfig { r: 2, lora_dropout: 0.1, ..LoraConfig::default() };
    adapter::attach(&mut model, "lora", &lora, 5).unwrap();
    let mut engine = EngineConfig::new(AdamW::default()).with_max_grad_norm(1.0).init(model).unwrap();
    let targets: usize = rows.iter().map(Example::num_targets).sum();
    for step in 0..3 {
        for (index, part) in rows.chunks(micro).enumerate() {
            let layout =
                SequenceLayout::from_lengths(&part.iter().map(|row| row.ids.len()).collect::<Vec<_>>(), packed);
            let tokens = layout.dropout_tokens((index * micro) as u64);
            let context = ForwardContext::training(DropoutKey { seed: 1, step, tokens });
            let batch = engine.model().batch(part, &layout, 1.0 / targets as f32, context).unwrap();
            engine.forward_backward(&[batch]).unwrap();
        }
        engine.step(1e-2).unwrap();
    }
    floats(&engine.model().prompts[0].encoder.forward().into_data())
}

#[test]
fn accumulated_and_packed_micro_batches_are_one_batch_with_dropout() {
    let _lock = one_backward_at_a_time();
    for (name, base) in CASES {
        let one = trained(name, base, 4, false);
        for (micro, packed) in [(1, false), (3, true), (4, true)] {
            let difference = max_diff(&trained(name, base, micro, packed), &one);
            assert!(difference < 5e-5, "{name}, micro-batches of {micro}, packed {packed}: {difference:e}");
        }
        let start = floats(&collapsed::<Flex>(name, base).prompts[0].encoder.forward().into_data());
        assert!(max_diff(&one, &start) > 1e-2, "{name}: training must matter");
    }
}

#[test]
fn dropout_on_the_prefix_is_recomputed_alike_and_matters() {
    let _lock = one_backward_at_a_time();
    let rows = rows();
    for name in ["prefix", "prefix_projection"] {
        let model = whole(name, "gqa_llama3", 0.3);
        let kept = driven_rows(&model, &rows, true, Checkpointing::None);
        assert_eq!(driven_rows(&model, &rows, true, Checkpointing::Full), kept);
        let without = driven_rows(&whole(name, "gqa_llama3", 0.0), &rows, true, Checkpointing::None);
        assert!(kept.iter().all(|(path, g)| max_diff(g, &without[path]) > 1e-3 * max_abs(g)));
    }
}

#[test]
fn only_the_prompt_learns() {
    let _lock = one_backward_at_a_time();
    let model = whole("p_tuning", "gqa_llama3", 0.0);
    let before = param::named_parameters::<Train, _>(&model);
    let weights = |model: &Llama<Train>| {
        let mut all = Vec::new();
        burn_peft::Linears::linears(model, &mut |_, linear| all.extend(floats(&linear.weight.val().into_data())));
        all.extend(floats(&model.model.embed_tokens.weight.val().into_data()));
        all
    };
    let frozen = weights(&model);
    let (rows, layout) = (rows(), SequenceLayout::padded(&[20, 9, 14, 31]));
    let mut engine = EngineConfig::new(AdamW::default()).init(model).unwrap();
    for _ in 0..3 {
        let batch = engine.model().batch(&rows, &layout, 0.1, ForwardContext::default()).unwrap();
        engine.forward_backward(&[batch]).unwrap();
        engine.step(1e-2).unwrap();
    }
    let model = engine.into_model().unwrap();
    assert_eq!(weights(&model), frozen);
    let config = model.prompts[0].config().clone();
    assert_eq!(param::count_trainable::<Train, _>(&model), config.count_trainable(&model.config().base_shape()));
    assert!(before.iter().filter(|param| param.requires_grad).all(|param| param.path.starts_with("prompts.")));
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn greedy_tokens_are_peft_s_alone_and_in_a_batch() {
    let settings = GenerationConfig { max_new_tokens: 12, eos: vec![2], ..GenerationConfig::default() };
    for (name, base) in CASES {
        let model = collapsed::<Flex>(name, base);
        let text = std::fs::read(directory(name).join("greedy.json")).unwrap();
        let cases: Vec<Value> = serde_json::from_slice(&text).unwrap();
        let prompts: Vec<Vec<u32>> = cases.iter().map(|case| ids(&case["prompt"])).collect();
        let together = Generation::new(&model, &prompts, &settings).unwrap().finish().unwrap();
        for (index, case) in cases.iter().enumerate() {
            let expected: Vec<u32> = ids(&case["tokens"]).into_iter().take_while(|&id| id != 2).collect();
            let alone = Generation::new(&model, &prompts[index..=index], &settings).unwrap().finish().unwrap();
            assert_eq!(alone[0], expected, "{name}, prompt {index}");
            assert_eq!(together[index], expected, "{name}, prompt {index} in a batch");
        }
    }
}

#[test]
fn scores_are_those_of_the_logits() {
    for (name, base) in CASES {
        let model = collapsed::<Flex>(name, base);
        let sequence: Vec<u32> = (0..12).map(|i| (i * 7 + 3) % 60).collect();
        let all = floats(&generate::logits(&model, &sequence).unwrap().into_data());
        let vocabulary = model.config().vocab_size;
        let scores = generate::log_likelihoods(&model, &sequence[..5], &[sequence[5..].to_vec()]).unwrap();
        let expected: f64 = (5..12)
            .map(|i| {
                let row = &all[(i - 1) * vocabulary..i * vocabulary];
                let sum: f64 = row.iter().map(|&x| (x as f64).exp()).sum();
                row[sequence[i] as usize] as f64 - sum.ln()
            })
            .sum();
        assert!((scores[0] - expected).abs() < 1e-4, "{name}: {} against {expected}", scores[0]);
    }
}

#[test]
fn saved_files_are_peft_s() {
    let _lock = one_backward_at_a_time();
    let temporary = tempfile::tempdir().unwrap();
    let kept = saved_adapters(temporary.path());
    for (name, base) in CASES {
        let out = kept.join(name);
        for prompts in [collapsed::<Train>(name, base).prompts, whole(name, base, 0.0).prompts] {
            prompts[0].save(&out).unwrap();
            same_files(&out, &directory(name), 1e-5, name);
        }
        let again = Prompt::<Flex>::load(&out, self::base::<Flex>(base).config().base_shape(), &Default::default());
        let mut model = self::base::<Flex>(base);
        model.prompts = vec![again.unwrap().value];
        assert!(row_logits_differ(&model, &reference(name)) < 1e-4, "{name} after its own file");
    }
}

#[test]
fn a_prefix_from_the_cache_of_a_text_is_the_text() {
    let golden = tensors("prompt/text.safetensors");
    for name in ["gqa_llama3", "qwen2", "mha", "qwen3", "yarn"] {
        let (mut model, plain) = (base::<Flex>(name), base::<Flex>(name));
        let text: Vec<u32> = match golden.get(&format!("{name}.ids")) {
            Some(ids) => integers(ids).iter().map(|&id| id as u32).collect(),
            None => (0..7).map(|i| (i * 11 + 4) % 60).collect(),
        };
        model.prompts = vec![model.new_prompt(&PromptConfig::prefix(5), Some(&text), 0).unwrap()];
        let table = floats(&model.prompts[0].encoder.forward().into_data());
        if let Some(expected) = golden.get(&format!("{name}.prompt_embeddings")) {
            assert!(max_diff(&table, &floats(expected)) < 1e-5, "{name}: the cache is not PEFT's");
        }
        let sequence: Vec<u32> = (0..9).map(|i| (i * 7 + 5) % 60).collect();
        let after_prefix = floats(&generate::logits(&model, &sequence).unwrap().into_data());
        let real = [&text[..5], &sequence].concat();
        let after_text = floats(&generate::logits(&plain, &real).unwrap().into_data());
        let vocabulary = plain.config().vocab_size;
        let difference = max_diff(&after_prefix, &after_text[5 * vocabulary..]);
        assert!(difference < 1e-4, "{name}: {difference:e}");
        // A text that is shorter than the prefix is repeated.
        let short = plain.new_prompt(&PromptConfig::prefix(5), Some(&text[..2]), 0).unwrap().encoder.forward();
        let said = [text[0], text[1], text[0], text[1], text[0]];
        let again = plain.keys_and_values(&said).unwrap();
        assert_eq!(short.into_data(), again.into_data(), "{name}");
    }
}

fn prompt(init: PromptTuningInit) -> PromptConfig {
    let text = (init == PromptTuningInit::Text).then(|| "a text".to_owned());
    let method = PromptMethod::Prompt {
        prompt_tuning_init: init,
        prompt_tuning_init_text: text.clone(),
        tokenizer_name_or_path: text,
    };
    PromptConfig { method, ..PromptConfig::prefix(4) }
}

#[test]
fn prompts_start_as_their_configuration_says() {
    let model = base::<Flex>("gqa_llama3");
    let table = floats(&model.model.embed_tokens.weight.val().into_data());
    let embedding: Vec<&[f32]> = table.chunks_exact(32).collect();
    let start = |config: &PromptConfig, text: Option<&[u32]>, seed| {
        floats(&model.new_prompt(config, text, seed).unwrap().encoder.forward().into_data())
    };
    let text = start(&prompt(PromptTuningInit::Text), Some(&[7, 9, 11]), 0);
    assert_eq!(text, [embedding[7], embedding[9], embedding[11], embedding[7]].concat());
    let sampled = |seed| start(&prompt(PromptTuningInit::SampleVocab), None, seed);
    assert!(sampled(1).chunks_exact(32).all(|row| embedding.contains(&row)));
    let random = |seed| start(&prompt(PromptTuningInit::Random), None, seed);
    for (one, same, other) in [(sampled(1), sampled(1), sampled(2)), (random(1), random(1), random(2))] {
        assert_eq!(one, same);
        assert_ne!(one, other);
    }
    let all = start(&PromptConfig::prefix(40), None, 0);
    let square = all.iter().map(|x| x * x).sum::<f32>() / all.len() as f32;
    assert!((square - 1.0).abs() < 0.1, "a normal start: {square}");
    for prefix_projection in [false, true] {
        let method = PromptMethod::Prefix {
            prefix_projection,
            encoder_hidden_size: None,
            init_weights: Some("zero".into()),
            dropout: 0.0,
        };
        assert_eq!(max_abs(&start(&PromptConfig { method, ..PromptConfig::prefix(4) }, None, 0)), 0.0);
    }
    let error =
        |config: &PromptConfig, text: Option<&[u32]>| model.new_prompt(config, text, 0).unwrap_err().to_string();
    assert!(error(&prompt(PromptTuningInit::Text), None).contains("TEXT"));
    assert!(error(&prompt(PromptTuningInit::Random), Some(&[7, 9999])).contains("9999"));
    let method =
        PromptMethod::Prefix { prefix_projection: true, encoder_hidden_size: None, init_weights: None, dropout: 0.0 };
    assert!(error(&PromptConfig { method, ..PromptConfig::prefix(4) }, Some(&[7])).contains("prefix_projection"));
}

/// Nothing is frozen yet at that point, although products with trainable half-precision weights are not supported.
#[test]
fn a_model_in_half_precision_gives_a_start_before_it_is_frozen() {
    let _lock = one_backward_at_a_time();
    let checkpoint = Checkpoint::open(&fixture("models/gqa_llama3")).unwrap();
    let text = [7, 9, 11, 3, 5];
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let plain: Llama<Flex> = checkpoint.load(dtype, &Default::default()).unwrap();
        let model: Llama<Train> = checkpoint.load(dtype, &Default::default()).unwrap();
        assert!(param::count_trainable::<Train, _>(&model) > 0, "{dtype:?}: nothing is frozen");
        for config in [PromptConfig::prefix(5), prompt(PromptTuningInit::Text), prompt(PromptTuningInit::SampleVocab)] {
            let sampled = config == prompt(PromptTuningInit::SampleVocab);
            let text = (!sampled).then_some(&text[..]);
            let expected = plain.new_prompt(&config, text, 3).unwrap().encoder.forward().into_data();
            let start = model.new_prompt(&config, text, 3).unwrap().encoder;
            assert!(start.embedding.val().is_require_grad(), "the virtual tokens learn");
            assert_eq!(start.forward().into_data(), expected, "{dtype:?}: {config:?}");
        }
        let expected = plain.keys_and_values(&text).unwrap().into_data();
        assert_eq!(model.keys_and_values(&text).unwrap().into_data(), expected, "{dtype:?}");
        assert!(param::count_trainable::<Train, _>(&model) > 0, "{dtype:?}: the model is as it was");
    }
}

#[test]
fn a_prompt_of_another_base_and_fields_from_the_future() {
    for (name, other, expected) in [
        ("prefix", "qwen2", ["[5, 48]", "[5, 64]"]),
        ("prompt", "mha", ["[5, 24]", "[5, 32]"]),
        ("p_tuning_qwen2", "gqa_llama3", ["[5, 32]", "[5, 24]"]),
    ] {
        let shape = base::<Flex>(other).config().base_shape();
        let error = Prompt::<Flex>::load(&directory(name), shape, &Default::default()).unwrap_err().to_string();
        assert!(expected.iter().all(|part| error.contains(part)), "{name} on {other}: {error}");
        assert!(error.contains("another base model"), "{error}");
    }
    let (temporary, from) = (tempfile::tempdir().unwrap(), directory("prefix"));
    let name = "adapter_model.safetensors";
    std::fs::copy(from.join(name), temporary.path().join(name)).unwrap();
    let mut config = fields(&from);
    config["from_the_future"] = json!([1]);
    std::fs::write(temporary.path().join("adapter_config.json"), config.to_string()).unwrap();
    let shape = base::<Flex>("gqa_llama3").config().base_shape();
    let read = Prompt::<Flex>::load(temporary.path(), shape, &Default::default()).unwrap();
    assert_eq!(read.unknown_fields, ["from_the_future"]);
    let lora = Prompt::<Flex>::load(&fixture("peft/lora_qv"), shape, &Default::default()).unwrap_err().to_string();
    assert!(lora.contains("PREFIX_TUNING") && lora.contains("LORA"), "{lora}");
    let mut model = base::<Flex>("gqa_llama3");
    let prompt = adapter::load(&mut model, "default", &from).unwrap_err().to_string();
    assert!(prompt.contains("LORA") && prompt.contains("PREFIX_TUNING"), "{prompt}");
}
