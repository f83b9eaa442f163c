//! Exported models equal the original: written and read back, merged and unmerged, for llama.cpp and for
//! `transformers`.

mod vocabulary;

use burn::{
    backend::Flex,
    module::Param,
    tensor::{DType, Tensor},
};
use burn_llama::{
    Checkpoint, Error, Llama, LlamaConfig, Tokenizer,
    checkpoint::{
        gguf::{BlockType, Gguf, MetadataArray, MetadataValue, hugging_face_key, write},
        save_as,
    },
    generate,
    rope::RopeScaling,
};
use burn_peft::adapter;
use laws::{fixture, floats, max_abs, max_diff};
use serde_json::Value as Json;
use std::{collections::BTreeMap, path::Path};

const MODELS: [&str; 7] = ["mha", "gqa_llama3", "tied_bias", "linear_rope", "yarn", "qwen2", "qwen3"];
fn load(path: &Path) -> Llama<Flex> {
    Checkpoint::open(path).unwrap().load(DType::F32, &Default::default()).unwrap()
}

fn model(name: &str) -> Llama<Flex> {
    load(&fixture(&format!("models/{name}")))
}

fn logits(model: &Llama<Flex>) -> Vec<f32> {
    let ids: Vec<u32> = (0..24).map(|i| (i * 7 + 3) % 60).collect();
    let logits = floats(&generate::logits(model, &ids).unwrap().into_data());
    assert!(max_abs(&logits) > 0.1, "logits that could be anything prove nothing");
    logits
}

/// Returns every tensor of a checkpoint by its Hugging Face key.
fn values(gguf: &Gguf) -> BTreeMap<String, Vec<f32>> {
    gguf.tensors().filter_map(|entry| Some((hugging_face_key(&entry.name)?, gguf.read(entry).unwrap()))).collect()
}

/// Returns every tensor of a file by its GGUF name, with rows in the order of the file.
fn stored(gguf: &Gguf) -> BTreeMap<String, Vec<f32>> {
    let read = |entry: &burn_llama::checkpoint::gguf::TensorEntry| {
        let mut out = vec![0.0; entry.num_elements()];
        entry.kind.dequantize(gguf.raw(&entry.name).unwrap(), &mut out);
        (entry.name.clone(), out)
    };
    gguf.tensors().map(read).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Returns the largest permitted rounding error of a value: none, half a unit in the last place, or half a quantization
/// step plus the rounding of the scale.
fn bound(kind: BlockType, block: &[f32], x: f32) -> f32 {
    match kind {
        BlockType::F32 => 0.0,
        BlockType::F16 => x.abs() / 2048.0 + 3e-8,
        BlockType::Q8_0 => {
            let step = max_abs(block) / 127.0;
            step * 0.5001 + x.abs() / 2048.0 + 4e-6
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_written_is_read_back() {
    let directory = tempfile::tempdir().unwrap();
    for name in MODELS {
        let model = model(name);
        let expected = {
            let path = directory.path().join(format!("{name}-hf"));
            save_as(&model, DType::F32, &path).unwrap();
            let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let read = |(key, view): (String, safetensors::tensor::TensorView<'_>)| {
                let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                (key, values.collect::<Vec<_>>())
            };
            file.tensors().into_iter().map(read).collect::<BTreeMap<_, _>>()
        };
        for kind in BlockType::WRITABLE {
            let path = directory.path().join(format!("{name}-{kind:?}.gguf"));
            write::save(&model, vec![], kind, &path).unwrap();
            let gguf = Gguf::open(&path).unwrap();
            let found = values(&gguf);
            assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{name}");
            for entry in gguf.tensors() {
                assert_eq!(entry.offset % 32, 0, "{name}: {}", entry.name);
                let Some(key) = hugging_face_key(&entry.name) else { continue };
                let planned = match entry.shape.len() {
                    1 => BlockType::F32,
                    _ if entry.row_len() % kind.block_len() == 0 => kind,
                    _ => BlockType::F16,
                };
                assert_eq!(entry.kind, planned, "{name}: {key}");
                for (block, found) in expected[&key].chunks(32).zip(found[&key].chunks(32)) {
                    for (x, y) in block.iter().zip(found) {
                        assert!((x - y).abs() <= bound(entry.kind, block, *x), "{name} {kind:?} {key}: {x} became {y}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_configuration_survives_and_logits_are_the_same() {
    let directory = tempfile::tempdir().unwrap();
    for name in MODELS.into_iter().chain(["mistral_window"]) {
        let (model, path) = (model(name), directory.path().join(format!("{name}.gguf")));
        write::save(&model, vec![], BlockType::F32, &path).unwrap();
        let again = load(&path);
        let (expected, found) = (model.config(), again.config());
        // GGUF has no separate architecture for Mistral, and stores Llama 3's scaling as one divisor per frequency.
        let frequencies =
            |c: &LlamaConfig| (c.rope_scaling.frequencies(c.head_dim, c.rope_theta), c.rope_scaling.attention_factor());
        assert!(max_diff(&frequencies(expected).0, &frequencies(found).0) < 1e-7, "{name}");
        let same = LlamaConfig {
            model_type: found.model_type.clone(),
            raw_fields: found.raw_fields.clone(),
            rope_scaling: found.rope_scaling.clone(),
            ..expected.clone()
        };
        assert_eq!(&same, found, "{name}");
        let difference = max_diff(&logits(&model), &logits(&again));
        assert!(difference < 1e-5, "{name}: logits differ by {difference:e}");
    }
}

#[test]
fn rows_and_names_are_those_of_gguf_py() {
    // The fixture was written by gguf-py, with query and key rows in llama.cpp's order.
    let source = fixture("gguf/model.gguf");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("again.gguf");
    write::save(&load(&source), vec![], BlockType::F32, &path).unwrap();
    let (expected, found) = (Gguf::open(&source).unwrap(), Gguf::open(&path).unwrap());
    let (expected_values, found_values) = (stored(&expected), stored(&found));
    assert_eq!(found_values.keys().collect::<Vec<_>>(), expected_values.keys().collect::<Vec<_>>());
    for (name, values) in &expected_values {
        assert_eq!(bits(&found_values[name]), bits(values), "{name}");
    }
    for (key, value) in expected.all_metadata() {
        if key.starts_with("llama.") || key == "general.architecture" {
            assert_eq!(found.metadata(key), Some(value), "{key}");
        }
    }
    for (key, value) in [
        ("general.type", MetadataValue::String("model".into())),
        ("general.alignment", MetadataValue::Unsigned(32)),
        ("general.file_type", MetadataValue::Unsigned(0)),
        ("llama.vocab_size", MetadataValue::Unsigned(10)),
        ("llama.rope.dimension_count", MetadataValue::Unsigned(16)),
    ] {
        assert_eq!(found.metadata(key), Some(&value), "{key}");
    }
}

#[test]
fn merged_is_unmerged() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["lora_qv", "lora_all", "lora_regex"] {
        let (base, mut adapted) = (model("gqa_llama3"), model("gqa_llama3"));
        adapter::load(&mut adapted, "default", &fixture(&format!("peft/{name}"))).unwrap();
        let unmerged = logits(&adapted);
        assert!(max_diff(&unmerged, &logits(&base)) > 1e-2, "{name}: the adapter must matter");
        adapter::merge(&mut adapted, "default").unwrap();
        let (file, folder) = (directory.path().join("merged.gguf"), directory.path().join(name));
        write::save(&adapted, vec![], BlockType::F32, &file).unwrap();
        save_as(&adapted, DType::F32, &folder).unwrap();
        for path in [&file, &folder] {
            // Merging rounds every weight once more, so the limit is relative to the size of the logits.
            let (difference, size) = (max_diff(&logits(&load(path)), &unmerged), max_abs(&unmerged));
            let limit = 1e-5 * size.max(1.0);
            assert!(difference < limit, "{name}: {}: {difference:e} of {size}", path.display());
        }
    }
}

#[test]
fn an_adapter_file_on_the_base_file_is_the_merged_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let base = model("gqa_llama3");
    write::save(&base, vec![], BlockType::F32, &path("base.gguf")).unwrap();
    // `lora_all` uses rsLoRA, so the alpha written differs from the one in its configuration.
    for (name, pairs) in [("lora_qv", 4), ("lora_all", 14)] {
        let source = fixture(&format!("peft/{name}"));
        let mut merged = model("gqa_llama3");
        let config = adapter::load(&mut merged, "default", &source).unwrap().value;
        adapter::merge(&mut merged, "default").unwrap();
        write::save(&merged, vec![], BlockType::F32, &path("merged.gguf")).unwrap();
        write::save_adapter(base.config(), &source, BlockType::F32, &path("adapter.gguf")).unwrap();
        let open = |name: &str| Gguf::open(&path(name)).unwrap();
        let (base, merged, adapter) = (open("base.gguf"), open("merged.gguf"), open("adapter.gguf"));
        let text = |key: &str| adapter.metadata(key).and_then(MetadataValue::as_str);
        assert_eq!(text("general.type"), Some("adapter"));
        assert_eq!(text("adapter.type"), Some("lora"));
        assert_eq!(text("general.architecture"), Some("llama"));
        let alpha = adapter.metadata("adapter.lora.alpha").and_then(MetadataValue::as_f64).unwrap();
        assert!((alpha / config.r as f64 - config.scaling()).abs() < 1e-6, "{name}: {alpha}");
        assert_eq!(adapter.tensors().count(), 2 * pairs, "{name}");
        let (base, merged, parts) = (stored(&base), stored(&merged), stored(&adapter));
        for (tensor, weight) in &base {
            // llama.cpp computes W + alpha / r · B·A, with rows in the order of the file.
            let mut expected = weight.clone();
            if let Some(a) = parts.get(&format!("{tensor}.lora_a")) {
                let b = &parts[&format!("{tensor}.lora_b")];
                let (r, scale) = (config.r, alpha / config.r as f64);
                let features = a.len() / r;
                for (index, x) in expected.iter_mut().enumerate() {
                    let (row, column) = (index / features, index % features);
                    let sum: f64 =
                        (0..r).map(|k| f64::from(b[row * r + k]) * f64::from(a[k * features + column])).sum();
                    *x += (scale * sum) as f32;
                }
                assert!(max_diff(&expected, weight) > 1e-4, "{name}: {tensor}: the adapter must matter");
            }
            assert!(max_diff(&expected, &merged[tensor]) < 1e-6, "{name}: {tensor}");
        }
    }
}

/// Returns the tokenizer fixture with one part changed.
fn changed(part: &str, value: Json, directory: &Path) -> Tokenizer {
    let mut json: Json = serde_json::from_slice(&std::fs::read(fixture("tokenizer/tokenizer.json")).unwrap()).unwrap();
    json[part] = value;
    std::fs::write(directory.join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::from_dir(directory).unwrap()
}

#[test]
fn what_llama_cpp_has_no_name_for_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("refused.gguf");
    let steps = serde_json::json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
    ]});
    for (part, value, expected) in [
        ("pre_tokenizer", steps, "[a-z]+"),
        ("pre_tokenizer", serde_json::json!({"type": "Whitespace"}), "byte_fallback"),
        ("normalizer", serde_json::json!({"type": "Lowercase"}), "Lowercase"),
        ("model", serde_json::json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "WordLevel"),
    ] {
        let error = changed(part, value, directory.path()).gguf_metadata(1000).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("tokenizer.json"), "{error}");
    }
    let error = Tokenizer::from_dir(&fixture("tokenizer")).unwrap().gguf_metadata(100).unwrap_err().to_string();
    assert!(error.contains("100") && error.contains("373"), "{error}");

    let mut yarn = Checkpoint::open(&fixture("models/yarn")).unwrap().config().to_json();
    for spelling in ["rope_parameters", "rope_scaling"] {
        yarn[spelling]["attention_factor"] = serde_json::json!(2.0);
    }
    let folder = directory.path().join("yarn");
    save_as(&model("yarn"), DType::F32, &folder).unwrap();
    std::fs::write(folder.join("config.json"), yarn.to_string()).unwrap();
    let error = write::save(&load(&folder), vec![], BlockType::F32, &path).unwrap_err().to_string();
    assert!(error.contains("attention_factor"), "{error}");

    // llama.cpp counts the tensors of a qwen3 file, and has no place for these.
    let mut biased = Checkpoint::open(&fixture("models/qwen3")).unwrap().config().to_json();
    biased["attention_bias"] = true.into();
    let biased: Llama<Flex> = LlamaConfig::from_json(biased).unwrap().init(1, &Default::default());
    let error = write::save(&biased, vec![], BlockType::F32, &path).unwrap_err().to_string();
    assert!(error.contains("attention_bias") && error.contains("qwen3"), "{error}");

    let error = write::save(&model("mha"), vec![], BlockType::Q4_K, &path).unwrap_err().to_string();
    assert!(error.contains("Q4_K") && error.contains("Q8_0"), "{error}");
    let other = model("mha");
    let error = write::save_adapter(other.config(), &fixture("peft/lora_qv"), BlockType::F32, &path).unwrap_err();
    assert!(error.to_string().contains("another base model"), "{error}");
    assert!(!path.exists());
}

#[test]
fn a_sliding_window_that_llama_cpp_does_not_apply_is_noted() {
    for (name, noted) in [("mistral_window", true), ("mha", false), ("tied_bias", false), ("qwen2", false)] {
        let notes = write::check(model(name).config()).unwrap();
        assert_eq!(notes.iter().any(|note| note.contains("sliding window of 6 positions")), noted, "{notes:?}");
        assert_eq!(notes.is_empty(), !noted, "{name}: {notes:?}");
    }
}

#[test]
fn a_half_written_file_is_never_left() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let files =
        || std::fs::read_dir(directory.path()).unwrap().map(|file| file.unwrap().file_name()).collect::<Vec<_>>();
    // The final norm is written last, so that all other tensors have been written when it fails.
    let spoiled = |x: f32| {
        let mut model = model("mha");
        let norm = &mut model.model.norm.weight;
        let data = Tensor::<Flex, 1>::full([24], x, &Default::default());
        *norm = Param::initialized(norm.id, data);
        model
    };
    for (x, kind, stays) in
        [(f32::NAN, BlockType::F32, false), (1.0, BlockType::F32, true), (f32::NAN, BlockType::F16, true)]
    {
        let before = std::fs::read(&path).ok();
        let result = write::save(&spoiled(x), vec![], kind, &path);
        if x.is_nan() {
            let Err(Error::Format { key, found, .. }) = result else { panic!("{result:?}") };
            assert_eq!((key.as_str(), found.as_str()), ("output_norm.weight", "NaN"));
            assert_eq!(std::fs::read(&path).ok(), before, "what was there stays");
        } else {
            result.unwrap();
        }
        assert_eq!(files().len(), usize::from(stays), "{:?}", files());
    }
    let nowhere = directory.path().join("missing/model.gguf");
    assert!(matches!(write::save(&model("mha"), vec![], BlockType::F32, &nowhere), Err(Error::Io { .. })));
}

#[test]
fn divisors_of_llama_3_become_its_rule_again() {
    for (factor, original, head_dim) in [(8.0, 8192.0, 128), (32.0, 8192.0, 64), (8.0, 1024.0, 64)] {
        let llama3 = RopeScaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original };
        let divisors = llama3.divisors(head_dim, 5e5).unwrap();
        let stored: Vec<f64> = divisors.iter().map(|&x| f64::from(x as f32)).collect();
        let rule = RopeScaling::Factors(stored.clone()).as_llama3(head_dim, 5e5).unwrap();
        assert_eq!(RopeScaling::from_json(Some(&rule), 131_072, head_dim).unwrap(), llama3);
        let other = stored.iter().map(|x| x * 1.001).collect();
        assert_eq!(RopeScaling::Factors(other).as_llama3(head_dim, 5e5), None);
        assert_eq!(llama3.as_llama3(head_dim, 5e5), None);
    }
    assert_eq!(RopeScaling::None.divisors(64, 5e5), None);
}
