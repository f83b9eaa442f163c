//! LoRA variants and IA3 equal PEFT's in files, logits, gradients and merged weights.

mod initial;

use burn::{
    backend::{Autodiff, Flex},
    module::AutodiffModule,
    tensor::DType,
};
use burn_llama::{
    Checkpoint, Llama,
    checkpoint::gguf::{BlockType, write},
    kernel::Kernels,
};
use burn_peft::{
    AdapterModel, Ia3Config, Linears, LoraConfig, TargetModules, adapter,
    config::{Bias, InitLoraWeights},
    param,
};
use burn_zero::segment::Checkpointing;
use laws::{
    files::{fields, same_files, saved_adapters},
    fixture, floats, max_abs, max_diff, one_backward_at_a_time,
    reference::{Reference, compare, driven_rows, examples, gradients, row_logits_differ},
    tensors,
};
use serde_json::json;
use std::{path::PathBuf, sync::Arc};

type Train = Autodiff<Flex>;

/// Pairs of fixture and base model.
const CASES: [(&str, &str); 17] = [
    ("dora", "gqa_llama3"),
    ("dora_qwen2", "qwen2"),
    ("patterns", "gqa_llama3"),
    ("layers", "gqa_llama3"),
    ("exclude", "gqa_llama3"),
    ("bias_all", "qwen2"),
    ("bias_lora_only", "qwen2"),
    ("saved_modules", "gqa_llama3"),
    ("saved_tied", "tied_bias"),
    ("saved_tied_head", "tied_bias"),
    ("head", "gqa_llama3"),
    ("head_tied", "tied_bias"),
    ("ia3", "gqa_llama3"),
    ("ia3_head", "gqa_llama3"),
    ("ia3_qwen2", "qwen2"),
    ("pissa", "gqa_llama3"),
    ("olora", "gqa_llama3"),
];

fn base<B: Kernels>(name: &str) -> Llama<B> {
    Checkpoint::open(&fixture(&format!("models/{name}"))).unwrap().load(DType::F32, &Default::default()).unwrap()
}

fn directory(name: &str) -> PathBuf {
    fixture(&format!("family/{name}"))
}

fn reference(name: &str) -> Reference {
    tensors(&format!("family/{name}/reference.safetensors"))
}

/// Reads the weights of an adapter's layers after merging, and the gradients of these weights.
fn merged(name: &str) -> Reference {
    tensors(&format!("family/{name}/merged.safetensors"))
}

/// Loads the fixture's adapter onto the model.
fn load_adapter<B: Kernels>(model: &mut Llama<B>, name: &str) {
    let unknown = if name.starts_with("ia3") {
        adapter::load_ia3(model, "default", &directory(name)).unwrap().unknown_fields
    } else {
        adapter::load(model, "default", &directory(name)).unwrap().unknown_fields
    };
    assert!(unknown.is_empty(), "{name}: {unknown:?}");
}

/// Returns our parameter path for PEFT's in-memory `key`.
fn path(key: &str) -> String {
    let path =
        key.strip_prefix("base_model.model.").unwrap().replace(".base_layer", "").replace(".modules_to_save", "");
    [
        (".lora_A.weight", ".adapters.0.lora_a"),
        (".lora_B.weight", ".adapters.0.lora_b"),
        (".lora_magnitude_vector.weight", ".adapters.0.dora.magnitude"),
        (".ia3_l", ".ia3.0.ia3_l"),
    ]
    .into_iter()
    .fold(path, |path, (theirs, ours)| path.replace(theirs, ours))
}

#[test]
fn logits_and_gradients_are_peft_s() {
    let _lock = one_backward_at_a_time();
    for (name, model) in CASES {
        let reference = reference(name);
        let plain = row_logits_differ(&base::<Flex>(model), &reference);
        assert!(plain > 1e-2, "{name}: the adapter must matter, not {plain:e}");
        let mut model = base::<Train>(model);
        load_adapter(&mut model, name);
        let model = adapter::train_active(model).unwrap();
        let difference = row_logits_differ(&model.valid(), &reference);
        assert!(difference < 1e-4, "{name}: logits differ by {difference:e}");
        let (loss, found) = gradients(&model, &reference);
        assert!((loss - floats(&reference["loss"])[0]).abs() < 1e-5, "{name}: loss {loss}");
        let keys: Vec<&str> = reference.keys().filter_map(|key| key.strip_prefix("grad.")).collect();
        assert_eq!(keys.len(), found.len(), "{name}: {:?}", found.keys());
        for key in keys {
            compare(&found[&path(key)], &floats(&reference[&format!("grad.{key}")]), &format!("{name}: {key}"));
        }
    }
}

#[test]
fn segments_give_the_same_gradients_however_rows_lie_with_dropout() {
    let _lock = one_backward_at_a_time();
    for (name, base_name) in CASES {
        let mut model = base::<Train>(base_name);
        load_adapter(&mut model, name);
        let mut model = adapter::train_active(model).unwrap();
        let rows = examples(&reference(name));
        let without = driven_rows(&model, &rows, false, Checkpointing::None);
        model.linears_mut(&mut |_, linear| {
            linear.adapters.iter_mut().for_each(|adapter| Arc::make_mut(&mut adapter.config).lora_dropout = 0.2)
        });
        let kept = driven_rows(&model, &rows, false, Checkpointing::None);
        assert_eq!(driven_rows(&model, &rows, false, Checkpointing::Full), kept, "{name}: recomputed");
        for (path, expected) in &kept {
            let packed = max_diff(&driven_rows(&model, &rows, true, Checkpointing::None)[path], expected);
            assert!(packed <= 2e-5 * max_abs(expected), "{name}, packed: {path} {packed:e}");
        }
        if !name.starts_with("ia3") {
            let matters = kept.iter().any(|(path, g)| max_diff(g, &without[path]) > 1e-3 * max_abs(g));
            assert!(matters, "{name}: dropout must matter");
        }
    }
}

#[test]
fn saved_files_are_peft_s() {
    let temporary = tempfile::tempdir().unwrap();
    let kept = saved_adapters(temporary.path());
    for (name, model) in CASES {
        let mut model = base::<Flex>(model);
        load_adapter(&mut model, name);
        let out = kept.join(name);
        model.save_adapter("default", &out).unwrap();
        same_files(&out, &directory(name), 0.0, name);
    }
}

#[test]
fn merged_is_unmerged_and_peft_s() {
    for (name, base_name) in CASES {
        let (reference, mut model) = (reference(name), base::<Flex>(base_name));
        load_adapter(&mut model, name);
        let weights = |model: &Llama<Flex>| {
            let mut all = Vec::new();
            model.linears(&mut |_, linear| {
                all.extend(floats(&linear.weight.val().into_data()));
                all.extend(linear.bias.iter().flat_map(|bias| floats(&bias.val().into_data())));
            });
            all
        };
        let before = weights(&model);
        adapter::merge(&mut model, "default").unwrap();
        adapter::merge(&mut model, "default").unwrap();
        assert!(row_logits_differ(&model, &reference) < 1e-4, "{name}: merged");
        if directory(name).join("merged.safetensors").exists() {
            let merged = merged(name);
            model.linears(&mut |path, linear| {
                let bias = linear.bias.as_ref().map(|bias| bias.val().into_data());
                for (part, value) in [("weight", Some(linear.weight.val().into_data())), ("bias", bias)] {
                    if let (Some(value), Some(expected)) = (value, merged.get(&format!("{path}.{part}"))) {
                        let difference = max_diff(&floats(&value), &floats(expected));
                        assert!(difference < 1e-5, "{name}: {path}.{part} differs by {difference:e}");
                    }
                }
            });
        }
        assert!(max_diff(&weights(&model), &before) > 1e-3, "{name}: merging must matter");
        let mut detached = model.clone();
        let refused = |linear: &mut burn_peft::Linear<Flex>| linear.delete_adapter("default").is_err();
        let mut any = false;
        detached.linears_mut(&mut |_, linear| any |= refused(linear));
        assert!(any, "{name}: a merged adapter cannot be taken away");
        adapter::unmerge(&mut model, "default");
        let difference = max_diff(&weights(&model), &before);
        assert!(difference < 1e-5, "{name}: unmerged weights differ by {difference:e}");
        assert!(row_logits_differ(&model, &reference) < 1e-4, "{name}: unmerged");
    }
}

#[test]
fn a_merged_model_s_gradients_are_peft_s() {
    let _lock = one_backward_at_a_time();
    for (name, base_name) in CASES.into_iter().filter(|(name, _)| directory(name).join("merged.safetensors").exists()) {
        let (merged, mut model) = (merged(name), base::<Train>(base_name));
        load_adapter(&mut model, name);
        adapter::merge(&mut model, "default").unwrap();
        let expected = |path: &str| merged.get(&format!("grad.{path}"));
        let model = param::train_only(model, |path| expected(path).is_some());
        let (_, found) = gradients(&model, &reference(name));
        assert_eq!(found.len(), merged.keys().filter(|key| key.starts_with("grad.")).count(), "{name}");
        for (path, gradient) in found {
            compare(&gradient, &floats(expected(&path).unwrap()), &format!("{name}, merged: {path}"));
        }
    }
}

#[test]
fn a_head_s_adapter_brings_the_head_s_own_weight() {
    // By default PEFT saves this weight as well.
    let (temporary, from) = (tempfile::tempdir().unwrap(), directory("head"));
    let mut tensors = burn_peft::format::read_tensors(&from).unwrap();
    let mut expected = base::<Flex>("gqa_llama3");
    load_adapter(&mut expected, "head");
    let head = expected.lm_head.as_mut().unwrap();
    let shape = head.shape();
    let own = head.weight.val().mul_scalar(2.0).into_data();
    head.weight = burn_peft::Weight::dense("lm_head.weight", head.weight.val().mul_scalar(2.0));
    assert_eq!(own.shape.as_slice(), shape);
    tensors.insert("base_model.model.lm_head.base_layer.weight".to_owned(), own);
    burn_peft::format::write(temporary.path(), &fields(&from), tensors).unwrap();
    let mut model = base::<Flex>("gqa_llama3");
    adapter::load(&mut model, "default", temporary.path()).unwrap();
    let logits = |model: &Llama<Flex>| floats(&burn_llama::generate::logits(model, &[3, 5, 8]).unwrap().into_data());
    assert_eq!(logits(&model), logits(&expected));
}

#[test]
fn fields_from_the_future_are_told() {
    let temporary = tempfile::tempdir().unwrap();
    for name in ["dora", "ia3"] {
        let out = temporary.path().join(name);
        std::fs::create_dir(&out).unwrap();
        let weights = "adapter_model.safetensors";
        std::fs::copy(directory(name).join(weights), out.join(weights)).unwrap();
        let mut config = fields(&directory(name));
        config["from_the_future"] = json!([1]);
        std::fs::write(out.join("adapter_config.json"), config.to_string()).unwrap();
        let load = || {
            let mut model = base::<Flex>("gqa_llama3");
            if name == "ia3" {
                adapter::load_ia3(&mut model, "default", &out).map(|read| read.unknown_fields)
            } else {
                adapter::load(&mut model, "default", &out).map(|read| read.unknown_fields)
            }
        };
        assert_eq!(load().unwrap(), ["from_the_future"], "{name}");
    }
}

#[test]
fn what_learns_beside_an_adapter_is_what_the_configuration_names() {
    let _lock = one_backward_at_a_time();
    let learned = |model: &str, config: &LoraConfig| -> Vec<String> {
        let model = base::<Train>(model);
        let model = adapter::attach_and_freeze(model, "default", config).unwrap();
        let list = param::named_parameters::<Train, _>(&model).into_iter();
        list.filter(|param| param.requires_grad && !adapter::is_adapter(&param.path)).map(|param| param.path).collect()
    };
    let only = |names: &[&str]| LoraConfig {
        modules_to_save: Some(names.iter().map(|name| (*name).to_owned()).collect()),
        ..LoraConfig::default()
    };
    let bias = |bias| LoraConfig { bias, ..LoraConfig::default() };
    let qwen = |layers: &[&str]| -> Vec<String> {
        let name = |layer: usize, name: &str| format!("model.layers.{layer}.self_attn.{name}.bias");
        (0..2).flat_map(|layer| layers.iter().map(move |part| name(layer, part))).collect()
    };
    assert_eq!(learned("qwen2", &bias(Bias::None)), [""; 0]);
    assert_eq!(learned("qwen2", &bias(Bias::LoraOnly)), qwen(&["q_proj", "v_proj"]));
    assert_eq!(learned("qwen2", &bias(Bias::All)), qwen(&["q_proj", "k_proj", "v_proj"]));
    assert_eq!(
        learned("gqa_llama3", &only(&["lm_head", "embed_tokens"])),
        ["model.embed_tokens.weight", "lm_head.weight"]
    );
    assert_eq!(learned("gqa_llama3", &only(&["model.norm"])), ["model.norm.weight"]);
    let mut model = base::<Train>("gqa_llama3");
    let error = adapter::attach(&mut model, "default", &only(&["lm_heat"]), 0).unwrap_err().to_string();
    assert!(error.contains("lm_heat") && error.contains("lm_head"), "{error}");
    // A tied head that is trained gets its own copy of the weight.
    let both = ["model.embed_tokens.weight", "lm_head.weight"];
    assert_eq!(learned("tied_bias", &only(&["embed_tokens"])), both[..1]);
    assert_eq!(learned("tied_bias", &only(&["lm_head"])), both[1..]);
    assert_eq!(learned("tied_bias", &only(&["lm_head", "embed_tokens"])), both);
}

#[test]
fn half_precision_weights_carry_the_family_too() {
    for (name, base_name) in [("dora", "gqa_llama3"), ("saved_modules", "gqa_llama3"), ("ia3", "gqa_llama3")] {
        let checkpoint = Checkpoint::open(&fixture(&format!("models/{base_name}"))).unwrap();
        let mut model = checkpoint.load::<Flex>(DType::BF16, &Default::default()).unwrap();
        load_adapter(&mut model, name);
        let difference = row_logits_differ(&model, &reference(name));
        let size = max_abs(&floats(&reference(name)["logits"]));
        assert!(difference < 0.05 * size, "{name}: {difference}");
        if name == "saved_modules" {
            assert_eq!(model.model.embed_tokens.weight.val().dtype(), DType::F32);
        }
    }
}

#[test]
fn what_llama_cpp_s_adapter_file_cannot_hold_is_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("adapter.gguf");
    for (name, base_name) in CASES {
        let plain = matches!(name, "layers" | "exclude" | "head");
        let (config, from) = (base::<Flex>(base_name).config().clone(), directory(name));
        let written = write::save_adapter(&config, &from, BlockType::F32, &out);
        assert_eq!(written.is_ok(), plain, "{name}: {:?}", written.err());
    }
}

#[test]
fn adapters_of_another_kind_or_base_are_refused() {
    let mut model = base::<Flex>("mha");
    for name in ["dora", "saved_modules", "patterns"] {
        let error = adapter::load(&mut model, "default", &directory(name)).unwrap_err().to_string();
        assert!(error.contains("another base model") && error.contains("lora_A"), "{name}: {error}");
    }
    let error = adapter::load_ia3(&mut model, "default", &directory("ia3")).unwrap_err().to_string();
    assert!(error.contains("another base model") && error.contains("ia3_l"), "{error}");
    let error = adapter::load_ia3(&mut model, "default", &directory("dora")).unwrap_err().to_string();
    assert!(error.contains("IA3") && error.contains("LORA"), "{error}");
    let mut model = base::<Flex>("gqa_llama3");
    adapter::attach_ia3(&mut model, "a", &Ia3Config::default()).unwrap();
    let error = adapter::attach(&mut model, "a", &LoraConfig::default(), 0).unwrap_err().to_string();
    assert!(error.contains("exists already"), "{error}");
}
