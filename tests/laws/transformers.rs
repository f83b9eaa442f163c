//! Logits and all gradients equal those of `transformers`, on random models of every variant.

use burn::{
    backend::{Autodiff, Flex},
    module::AutodiffModule,
    tensor::DType,
};
use burn_llama::{Checkpoint, Llama, LlamaConfig};
use burn_peft::{AdapterModel, adapter, param};
use laws::{
    files::{same_files, saved_adapters},
    fixture, floats, max_diff, one_backward_at_a_time,
    reference::{compare, gradients, logits_differ},
    tensors,
};
use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::json;
use std::collections::BTreeMap;

#[test]
fn logits_and_every_gradient_are_those_of_transformers() {
    let _lock = one_backward_at_a_time();
    let names =
        ["mha", "gqa_llama3", "tied_bias", "linear_rope", "yarn", "qwen2", "qwen3", "mistral_window", "own_head"];
    for name in names {
        let reference = tensors(&format!("models/{name}/reference.safetensors"));
        let checkpoint = Checkpoint::open(&fixture(&format!("models/{name}"))).unwrap();
        let model = checkpoint.load::<Autodiff<Flex>>(DType::F32, &Default::default()).unwrap();
        let difference = logits_differ(&model.valid(), &reference);
        assert!(difference < 1e-4, "{name}: logits differ by {difference:e}");
        let (loss, found) = gradients(&model, &reference);
        assert!((loss - floats(&reference["loss"])[0]).abs() < 1e-5, "{name}: loss {loss}");
        let expected = reference.iter().filter_map(|(key, value)| Some((key.strip_prefix("grad.")?, value)));
        let mut count = 0;
        for (key, value) in expected {
            compare(&found[key], &floats(value), &format!("{name}: {key}"));
            count += 1;
        }
        assert_eq!(count, found.len(), "{name}: gradients without a reference");
    }
}

#[test]
fn shards_and_half_precision_are_read() {
    for (name, stored) in [("sharded", DType::BF16), ("f16", DType::F16)] {
        let reference = tensors(&format!("models/{name}/reference.safetensors"));
        let checkpoint = Checkpoint::open(&fixture(&format!("models/{name}"))).unwrap();
        // In f32, and with matrices in their stored type; products are computed in f32 either way.
        for dtype in [DType::F32, stored] {
            let model = checkpoint.load::<Flex>(dtype, &Default::default()).unwrap();
            assert_eq!(model.model.layers[0].self_attn.q_proj.weight.val().dtype(), dtype);
            let difference = logits_differ(&model, &reference);
            assert!(difference < 1e-4, "{name} as {dtype:?}: logits differ by {difference:e}");
        }
    }
}

/// The config of this model ties its head, but its file has another one, which `transformers` 5 keeps.
#[test]
fn a_head_of_its_own_unties_the_model_and_an_equal_one_does_not() {
    let model = Checkpoint::open(&fixture("models/own_head")).unwrap();
    assert!(!model.config().tie_word_embeddings && model.config().to_json()["tie_word_embeddings"] == false);
    let loaded = model.load::<Flex>(DType::F32, &Default::default()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    burn_llama::checkpoint::save(&loaded, directory.path()).unwrap();
    let again = Checkpoint::open(directory.path()).unwrap().load::<Flex>(DType::F32, &Default::default()).unwrap();
    assert!(logits_differ(&again, &tensors("models/own_head/reference.safetensors")) < 1e-4);

    let other = changed_copy("own_head", |tensors| {
        let embedding = tensors["model.embed_tokens.weight"].clone();
        tensors.insert("lm_head.weight".to_owned(), embedding);
    });
    let model = Checkpoint::open(other.path()).unwrap();
    assert!(model.config().tie_word_embeddings);
    assert!(model.load::<Flex>(DType::F32, &Default::default()).unwrap().lm_head.is_none());
}

#[test]
fn a_stored_table_of_rotary_frequencies_must_be_the_one_of_the_configuration() {
    let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
    let other = changed_copy("own_head", |tensors| {
        tensors.get_mut(name).unwrap().1[4..8].copy_from_slice(&0.5f32.to_le_bytes());
    });
    let loaded = Checkpoint::open(other.path()).unwrap().load::<Flex>(DType::F32, &Default::default());
    let error = loaded.err().unwrap().to_string();
    assert!(error.contains(name) && error.contains("rope_theta = 10000"), "{error}");
}

/// Shape and bytes of the f32 tensors of a file.
type Changed = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

/// Copies a model with changed tensors.
fn changed_copy(name: &str, change: impl Fn(&mut Changed)) -> tempfile::TempDir {
    let (from, to) = (fixture(&format!("models/{name}")), tempfile::tempdir().unwrap());
    std::fs::copy(from.join("config.json"), to.path().join("config.json")).unwrap();
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (String, TensorView<'_>)| (name, (view.shape().to_vec(), view.data().to_vec()));
    let mut tensors: Changed = file.tensors().into_iter().map(tensor).collect();
    change(&mut tensors);
    let views = tensors
        .iter()
        .map(|(name, (shape, data))| (name, TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, &to.path().join("model.safetensors")).unwrap();
    to
}

#[test]
fn both_spellings_of_a_configuration_say_the_same() {
    let new = burn_llama::LlamaConfig::load(&fixture("models/gqa_llama3/config.json")).unwrap();
    let old = burn_llama::LlamaConfig::load(&fixture("models/gqa_llama3/config_old.json")).unwrap();
    assert!(matches!(new.rope_scaling, burn_llama::rope::RopeScaling::Llama3 { .. }));
    assert_eq!((new.rope_scaling, new.rope_theta), (old.rope_scaling, old.rope_theta));
}

/// Versions of `transformers` before 5 read `rope_theta` and `rope_scaling` only, and would silently take defaults for
/// what is in `rope_parameters`.
#[test]
fn a_written_configuration_says_the_same_in_both_spellings() {
    for name in ["mha", "gqa_llama3", "linear_rope", "yarn", "qwen2", "qwen3", "mistral_window"] {
        let config = LlamaConfig::load(&fixture(&format!("models/{name}/config.json"))).unwrap();
        let written = config.to_json();
        for spelling in [&["rope_theta", "rope_scaling"][..], &["rope_parameters"]] {
            let mut half = written.clone();
            spelling.iter().for_each(|key| drop(half.as_object_mut().unwrap().remove(*key).unwrap()));
            let found = LlamaConfig::from_json(half).unwrap();
            assert_eq!((found.rope_theta, &found.rope_scaling), (config.rope_theta, &config.rope_scaling), "{name}");
        }
        assert_eq!(written["torch_dtype"], written["dtype"]);
        if name == "linear_rope" {
            // Version 4.40 refuses any other key.
            assert_eq!(written["rope_scaling"], json!({ "type": "linear", "factor": 4.0 }));
        }
    }
}

#[test]
fn a_configuration_that_contradicts_itself_is_refused() {
    let base = LlamaConfig::load(&fixture("models/gqa_llama3/config.json")).unwrap().to_json();
    for (key, value, named) in [
        ("/rope_theta", json!(10_000.0), ["rope_parameters.rope_theta", "found 500"]),
        ("/rope_scaling/factor", json!(4.0), ["rope_scaling", "the rule of `rope_parameters`"]),
        ("/rope_scaling/type", json!("linear"), ["rope_scaling.type", "llama3"]),
        ("/rope_parameters/rope_theta", json!("500"), ["rope_theta", "a positive number"]),
        ("/rope_parameters/factor", json!("8"), ["rope_scaling.factor", "a positive number"]),
        ("/rope_parameters/partial_rotary_factor", json!(0.5), ["rope_parameters.partial_rotary_factor", "0.5"]),
        ("/rope_parameters/full_attention", json!({ "rope_theta": 1.0 }), ["full_attention", "one rule"]),
        ("/hidden_act", json!(3), ["hidden_act", "silu"]),
    ] {
        let mut config = base.clone();
        let (parent, last) = key.rsplit_once('/').unwrap();
        config.pointer_mut(parent).unwrap()[last] = value;
        let error = LlamaConfig::from_json(config).unwrap_err().to_string();
        assert!(named.iter().all(|words| error.contains(words)), "{key}: {error}");
    }
}

/// The defaults are those of `LlamaConfig`, `MistralConfig`, `Qwen2Config` and `Qwen3Config`.
#[test]
fn keys_that_a_configuration_lacks_have_the_defaults_of_the_model_type() {
    for (model_type, positions, kv_heads, head_dim, window) in [
        ("llama", 2048, 64, 4, None),
        ("mistral", 131_072, 8, 4, Some(4096)),
        ("qwen2", 32_768, 32, 4, None),
        ("qwen3", 32_768, 32, 128, None),
    ] {
        let config = LlamaConfig::from_json(json!({
            "model_type": model_type, "vocab_size": 8, "hidden_size": 256, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 64,
        }));
        let config = config.unwrap();
        assert_eq!(config.max_position_embeddings, positions, "{model_type}");
        assert_eq!((config.num_key_value_heads, config.head_dim), (kv_heads, head_dim), "{model_type}");
        assert_eq!(config.sliding_window, window, "{model_type}");
    }
}

#[test]
fn a_saved_model_is_the_model() {
    let checkpoint = Checkpoint::open(&fixture("models/qwen3")).unwrap();
    let model = checkpoint.load::<Flex>(DType::F32, &Default::default()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    burn_llama::checkpoint::save(&model, directory.path()).unwrap();
    let again = Checkpoint::open(directory.path()).unwrap().load::<Flex>(DType::F32, &Default::default()).unwrap();
    let reference = tensors("models/qwen3/reference.safetensors");
    assert_eq!(logits_differ(&model, &reference), logits_differ(&again, &reference));
    let names =
        |m: &Llama<Flex>| param::named_parameters::<Flex, _>(m).into_iter().map(|param| param.path).collect::<Vec<_>>();
    assert_eq!(names(&model), names(&again));
}

#[test]
fn lora_is_peft_s() {
    let _lock = one_backward_at_a_time();
    let checkpoint = Checkpoint::open(&fixture("models/gqa_llama3")).unwrap();
    for name in ["lora_qv", "lora_all", "lora_regex"] {
        let reference = tensors(&format!("peft/{name}/reference.safetensors"));
        let mut model = checkpoint.load::<Autodiff<Flex>>(DType::F32, &Default::default()).unwrap();
        adapter::load(&mut model, "default", &fixture(&format!("peft/{name}"))).unwrap();
        let model = param::train_only(model, adapter::is_adapter);
        let difference = logits_differ(&model.valid(), &reference);
        assert!(difference < 1e-4, "{name}: logits differ by {difference:e}");
        let (_, found) = gradients(&model, &reference);
        let keys: Vec<&str> = reference.keys().filter_map(|key| key.strip_prefix("grad.")).collect();
        assert_eq!(keys.len(), found.len(), "{name}: only adapters carry gradients, and all of them do");
        for key in keys {
            let path = key.strip_prefix("base_model.model.").unwrap();
            let path =
                path.replace(".lora_A.weight", ".adapters.0.lora_a").replace(".lora_B.weight", ".adapters.0.lora_b");
            compare(&found[&path], &floats(&reference[&format!("grad.{key}")]), &format!("{name}: {key}"));
        }
    }
}

#[test]
fn saved_files_are_peft_s() {
    let temporary = tempfile::tempdir().unwrap();
    let kept = saved_adapters(temporary.path());
    let checkpoint = Checkpoint::open(&fixture("models/gqa_llama3")).unwrap();
    for name in ["lora_qv", "lora_all", "lora_regex"] {
        let (mut model, theirs) = (checkpoint.load::<Flex>(DType::F32, &Default::default()).unwrap(), fixture("peft"));
        let read = adapter::load(&mut model, "default", &theirs.join(name)).unwrap();
        assert!(read.unknown_fields.is_empty(), "{read:?}");
        model.save_adapter("default", &kept.join(name)).unwrap();
        same_files(&kept.join(name), &theirs.join(name), 0.0, name);
    }
}

#[test]
fn an_adapter_survives_merging() {
    let checkpoint = Checkpoint::open(&fixture("models/gqa_llama3")).unwrap();
    let load = || checkpoint.load::<Flex>(DType::F32, &Default::default()).unwrap();
    let (mut model, reference) = (load(), tensors("peft/lora_qv/reference.safetensors"));
    let base = tensors("models/gqa_llama3/reference.safetensors");
    let read = adapter::load(&mut model, "default", &fixture("peft/lora_qv")).unwrap();
    assert!(read.unknown_fields.is_empty(), "{read:?}");
    let merged = tensors("peft/lora_qv/merged.safetensors");
    adapter::merge(&mut model, "default").unwrap();
    adapter::merge(&mut model, "default").unwrap();
    burn_peft::Linears::linears(&model, &mut |path, linear| {
        if let Some(expected) = merged.get(&format!("{path}.weight")) {
            let difference = max_diff(&floats(&linear.weight.val().into_data()), &floats(expected));
            assert!(difference < 1e-6, "{path}: merged weights differ by {difference:e}");
        }
    });
    assert!(logits_differ(&model, &reference) < 1e-4);
    adapter::unmerge(&mut model, "default");
    assert!(logits_differ(&model, &reference) < 1e-4);
    assert!(logits_differ(&model, &base) > 1e-2, "the adapter must matter");
    burn_peft::Linears::linears_mut(&mut model, &mut |_, linear| linear.delete_adapter("default").unwrap());
    assert!(logits_differ(&model, &base) < 1e-4);
}

#[test]
fn an_adapter_for_another_model_is_refused() {
    let checkpoint = Checkpoint::open(&fixture("models/mha")).unwrap();
    let mut model = checkpoint.load::<Flex>(DType::F32, &Default::default()).unwrap();
    let error = adapter::load(&mut model, "default", &fixture("peft/lora_qv")).unwrap_err().to_string();
    assert!(error.contains("another base model") && error.contains("q_proj.lora_A"), "{error}");
}
