//! Adapters in the forms in which they stand on the hub give PEFT's logits, and are written as PEFT writes them.

use burn::{
    backend::{Autodiff, Flex},
    module::AutodiffModule,
    tensor::{DType, TensorData},
};
use burn_llama::{Checkpoint, Llama, generate, kernel::Kernels};
use burn_peft::{AdapterModel, Error, Linears, adapter, format, route::BASE};
use burn_zero::segment::Checkpointing;
use laws::{
    files::{fields, same_files, saved_adapters},
    fixture, floats, max_diff, one_backward_at_a_time,
    reference::{Reference, compare, driven_rows, examples, gradients, row_logits_differ},
    tensors,
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path};

type Train = Autodiff<Flex>;

/// A fixture of an adapter.
struct Case {
    name: &'static str,
    base: &'static str,
    /// The number of rows by which the vocabulary grows.
    new: usize,
    /// True if saving the adapter gives PEFT's files; AdaLoRA becomes plain LoRA, and files may hold what follows from
    /// other tensors in them.
    same_files: bool,
}

const fn case(name: &'static str, base: &'static str, new: usize, same_files: bool) -> Case {
    Case { name, base, new, same_files }
}

const CASES: [Case; 15] = [
    case("embed", "gqa_llama3", 0, true),
    case("embed_auto", "gqa_llama3", 0, false),
    case("embed_tied", "tied_bias", 0, true),
    case("embed_ensure_tied", "tied_bias", 0, true),
    case("tokens", "gqa_llama3", 0, true),
    case("tokens_tied", "tied_bias", 0, true),
    case("tokens_grown", "gqa_llama3", 3, true),
    case("tokens_tied_grown", "tied_bias", 3, false),
    case("grown", "gqa_llama3", 3, true),
    case("grown_tied", "tied_bias", 3, false),
    case("saved_by_flag", "gqa_llama3", 0, true),
    case("norm", "gqa_llama3", 0, true),
    case("adalora", "gqa_llama3", 0, false),
    case("adalora_pruned", "gqa_llama3", 0, false),
    case("bin", "gqa_llama3", 0, false),
];

fn base<B: Kernels>(name: &str) -> Llama<B> {
    Checkpoint::open(&fixture(&format!("models/{name}"))).unwrap().load(DType::F32, &Default::default()).unwrap()
}

fn reference(name: &str) -> Reference {
    tensors(&format!("hub/{name}/reference.safetensors"))
}

fn load<B: Kernels>(model: &mut Llama<B>, directory: &Path) {
    let loaded = adapter::load(model, "default", directory).unwrap();
    assert!(loaded.unknown_fields.is_empty(), "{}: {:?}", directory.display(), loaded.unknown_fields);
}

/// Returns our parameter path for PEFT's in-memory `key`.
fn path(key: &str) -> String {
    let path = key.strip_prefix("base_model.model.").unwrap().replace(".modules_to_save", "");
    [
        (".lora_A.weight", ".adapters.0.lora_a"),
        (".lora_B.weight", ".adapters.0.lora_b"),
        (".lora_embedding_A", ".adapters.0.lora.lora_embedding_a"),
        (".lora_embedding_B", ".adapters.0.lora.lora_embedding_b"),
        (".token_adapter.trainable_tokens_delta", ".adapters.0.tokens.delta"),
    ]
    .into_iter()
    .fold(path, |path, (theirs, ours)| path.replace(theirs, ours))
}

#[test]
fn logits_and_gradients_are_peft_s() {
    let _lock = one_backward_at_a_time();
    for Case { name, base: base_name, new, .. } in CASES {
        let (reference, directory) = (reference(name), fixture(&format!("hub/{name}")));
        let mut plain = base::<Flex>(base_name);
        plain.resize_token_embeddings(plain.config().vocab_size + new);
        let without = row_logits_differ(&plain, &reference);
        assert!(without > 1e-3, "{name}: the adapter must matter, not {without:e}");
        let mut model = base::<Train>(base_name);
        load(&mut model, &directory);
        let model = adapter::train_active(model).unwrap();
        let difference = row_logits_differ(&model.valid(), &reference);
        assert!(difference < 3e-5, "{name}: logits differ by {difference:e}");
        if name.starts_with("adalora") {
            continue;
        }
        let (loss, found) = gradients(&model, &reference);
        assert!((loss - floats(&reference["loss"])[0]).abs() < 1e-5, "{name}: loss {loss}");
        // The segments that a run computes one after the other report one gradient, of embedding and tied head together.
        for (path, gradient) in driven_rows(&model, &examples(&reference), true, Checkpointing::Full) {
            compare(&gradient, &found[&path], &format!("{name}, driven: {path}"));
        }
        let keys: Vec<&str> = reference.keys().filter_map(|key| key.strip_prefix("grad.")).collect();
        assert_eq!(keys.len(), found.len(), "{name}: {:?}", found.keys());
        for key in keys {
            compare(&found[&path(key)], &floats(&reference[&format!("grad.{key}")]), &format!("{name}: {key}"));
        }
    }
}

#[test]
fn saved_files_are_peft_s_and_load_again() {
    let temporary = tempfile::tempdir().unwrap();
    let kept = saved_adapters(temporary.path());
    for Case { name, base: base_name, new, same_files: same } in CASES {
        let (directory, mut model) = (fixture(&format!("hub/{name}")), base::<Flex>(base_name));
        load(&mut model, &directory);
        // PEFT can load those with new rows only after the model was resized, which check_peft.py does not do.
        let out = if new == 0 { kept.join(name) } else { temporary.path().join(name) };
        model.save_adapter("default", &out).unwrap();
        if same {
            same_files(&out, &directory, 0.0, name);
        }
        let mut again = base::<Flex>(base_name);
        load(&mut again, &out);
        let difference = row_logits_differ(&again, &reference(name));
        assert!(difference < 3e-5, "{name}: logits differ by {difference:e}");
    }
}

#[test]
fn merged_adapters_give_the_same_logits_and_are_unmerged() {
    for Case { name, base: base_name, .. } in CASES {
        let (reference, mut model) = (reference(name), base::<Flex>(base_name));
        load(&mut model, &fixture(&format!("hub/{name}")));
        adapter::safe_merge(&mut model, "default").unwrap();
        assert!(!model.model.embed_tokens.is_adapted(), "{name}");
        assert!(row_logits_differ(&model, &reference) < 3e-5, "{name}: merged");
        assert!(adapter::delete(&mut model, "default").is_err(), "{name}: a merged adapter cannot be taken away");
        adapter::unmerge(&mut model, "default");
        assert!(row_logits_differ(&model, &reference) < 3e-5, "{name}: unmerged");
    }
}

#[test]
fn adapters_of_the_embedding_act_on_the_rows_that_name_them() {
    for (base_name, names) in [("gqa_llama3", ["embed", "tokens"]), ("tied_bias", ["embed_ensure_tied", "tokens_tied"])]
    {
        let ids = vec![5u32, 17, 60, 9];
        let logits = |model: &Llama<Flex>| floats(&generate::logits(model, &ids).unwrap().into_data());
        let mut model = base::<Flex>(base_name);
        let plain = logits(&model);
        for name in names {
            adapter::load(&mut model, name, &fixture(&format!("hub/{name}"))).unwrap();
        }
        let rows = [names[0], BASE, names[1]];
        let together = generate::mixed_logits(&model, &vec![ids.clone(); 3], &rows).unwrap();
        for (row, found) in rows.into_iter().zip(together) {
            adapter::activate(&mut model, if row == BASE { &[] } else { std::slice::from_ref(&row) }).unwrap();
            let alone = logits(&model);
            assert!(max_diff(&floats(&found.into_data()), &alone) < 3e-5, "{base_name}, {row}");
            assert_eq!(max_diff(&alone, &plain) > 1e-3, row != BASE, "{base_name}, {row}");
            let mut steps = Vec::new();
            generate::logits_by_steps(&model, &ids, |logits| steps.extend_from_slice(logits)).unwrap();
            assert!(max_diff(&steps, &alone) < 3e-5, "{base_name}, {row}: token by token");
        }
        for name in names {
            adapter::delete(&mut model, name).unwrap();
        }
        assert_eq!(logits(&model), plain, "{base_name}");
    }
}

/// Returns another name of a tensor.
type Rename<'a> = &'a dyn Fn(&str) -> String;

/// Writes a copy of an adapter with other names of its tensors.
fn with_names(from: &Path, out: &Path, rename: Rename<'_>) {
    let bytes = std::fs::read(from.join("adapter_model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter().map(|(name, view)| (rename(&name), view));
    std::fs::create_dir_all(out).unwrap();
    std::fs::write(out.join("adapter_model.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
    std::fs::copy(from.join("adapter_config.json"), out.join("adapter_config.json")).unwrap();
}

#[test]
fn names_that_all_differ_in_one_way_are_read_and_others_are_told_briefly() {
    let temporary = tempfile::tempdir().unwrap();
    let (from, expected) = (fixture("family/dora"), tensors("family/dora/reference.safetensors"));
    let prefix = "base_model.model.";
    let ways: [(&str, Rename<'_>); 7] = [
        ("adapter", &|name| name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")),
        ("compiled", &|name| format!("_orig_mod.{name}")),
        ("compiled inside", &|name| name.replace(prefix, &format!("{prefix}_orig_mod."))),
        ("no prefix", &|name| name.replace(prefix, "")),
        ("doubled", &|name| format!("{prefix}{name}")),
        ("no model", &|name| name.replace(&format!("{prefix}model."), prefix)),
        ("inside another model", &|name| name.replace(prefix, &format!("{prefix}language_model."))),
    ];
    for (way, rename) in ways {
        let out = temporary.path().join(way);
        with_names(&from, &out, rename);
        let mut model = base::<Flex>("gqa_llama3");
        load(&mut model, &out);
        assert!(row_logits_differ(&model, &expected) < 3e-5, "{way}");
    }
    let out = temporary.path().join("other");
    with_names(&from, &out, &|name| name.replace("self_attn", "attention"));
    let error = adapter::load(&mut base::<Flex>("gqa_llama3"), "default", &out).unwrap_err().to_string();
    assert!(error.len() < 800 && error.contains("layers.0") && error.contains("attention"), "{error}");
    let out = temporary.path().join("twice");
    with_names(&from, &out, &|name| {
        name.replace("layers.0.self_attn.q_proj.lora_A.", "layers.0.self_attn.q_proj.lora_A.b.")
    });
    load(&mut base::<Flex>("gqa_llama3"), &out);
}

#[test]
fn a_base_model_s_names_may_have_a_common_prefix_and_its_file_may_be_pytorch_s() {
    let temporary = tempfile::tempdir().unwrap();
    let from = fixture("models/gqa_llama3");
    let expected = tensors("models/gqa_llama3/reference.safetensors");
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for (prefix, cut) in [("_orig_mod.", ""), ("language_model.", ""), ("base_model.model.", ""), ("", "model.")] {
        let renamed = |name: String| format!("{prefix}{}", name.strip_prefix(cut).unwrap_or(&name));
        let tensors = file.tensors().into_iter().map(|(name, view)| (renamed(name), view));
        let out = temporary.path();
        std::fs::write(out.join("model.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
        std::fs::copy(from.join("config.json"), out.join("config.json")).unwrap();
        let model: Llama<Flex> = Checkpoint::open(out).unwrap().load(DType::F32, &Default::default()).unwrap();
        assert!(row_logits_differ(&model, &expected) < 1e-4, "{prefix} {cut}");
    }
    let pytorch = Checkpoint::open(&fixture("hub/pytorch_model")).unwrap();
    let model: Llama<Flex> = pytorch.load(DType::F32, &Default::default()).unwrap();
    let difference = row_logits_differ(&model, &tensors("models/linear_rope/reference.safetensors"));
    assert!(difference < 1e-4, "{difference:e}");
}

#[test]
fn what_a_pytorch_file_should_not_be_is_named() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("adapter_model.bin");
    let whole = std::fs::read(fixture("hub/bin/adapter_model.bin")).unwrap();
    let safetensors = std::fs::read(fixture("family/dora/adapter_model.safetensors")).unwrap();
    for (bytes, expected) in [
        (&whole[..whole.len() / 2], "another file, or one of an older PyTorch"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "torch.load(\"adapter_model.bin\")"),
        (&safetensors, "a safetensors file; rename it"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = format::read_tensors(temporary.path()).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("adapter_model.bin"), "{error}");
    }
}

#[test]
fn what_does_not_go_together_on_the_embedding_is_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let changed = |from: &str, change: &dyn Fn(&mut Value, &mut BTreeMap<String, TensorData>)| -> Error {
        let (from, out) = (fixture(from), temporary.path().join("changed"));
        let (mut config, mut tensors) = (fields(&from), format::read_tensors(&from).unwrap());
        change(&mut config, &mut tensors);
        format::write(&out, &config, tensors).unwrap();
        adapter::load(&mut base::<Flex>("gqa_llama3"), "default", &out).unwrap_err()
    };
    let set = |field: &'static str, value: Value| {
        move |config: &mut Value, _: &mut BTreeMap<String, TensorData>| config[field] = value.clone()
    };
    for (error, words) in [
        (changed("hub/tokens", &set("trainable_token_indices", json!([5, 17, 5]))), "found 5 twice"),
        (
            changed("hub/tokens", &set("trainable_token_indices", json!([5, 17, 97]))),
            "expected tokens below 96, found 97",
        ),
        (
            changed("hub/tokens", &set("trainable_token_indices", json!({"lm_head": [5]}))),
            "different tokens of `embed_tokens`",
        ),
        (changed("hub/tokens", &set("target_modules", json!(["embed_tokens"]))), "one of `target_modules`, too"),
        (changed("hub/tokens", &set("modules_to_save", json!(["embed_tokens"]))), "one of `modules_to_save`, too"),
        (changed("hub/embed", &set("use_dora", json!(true))), "DoRA of the embedding is not supported"),
        (changed("hub/tokens", &set("trainable_token_indices", json!([5, 17]))), "1 tensors have another shape"),
        (
            changed("hub/grown", &|_, tensors| {
                let name = "base_model.model.lm_head.weight";
                tensors.insert(name.to_owned(), TensorData::zeros::<f32, _>([98, 32]));
            }),
            "[99, 32], [98, 32]",
        ),
    ] {
        let error = error.to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
    let mut model = base::<Flex>("gqa_llama3");
    adapter::load(&mut model, "other", &fixture("hub/embed")).unwrap();
    let error = adapter::load(&mut model, "default", &fixture("hub/grown")).unwrap_err().to_string();
    assert!(error.contains("cannot share the model"), "{error}");
    assert_eq!(model.config().vocab_size, 96, "what was refused changes nothing");
}
