//! Tests of several adapters on one model, compared with PEFT: selected by name or per row, combined, switched, merged.

use burn::{
    backend::Flex,
    tensor::{DType, Tensor},
};
use burn_llama::{Checkpoint, Generation, GenerationConfig, Llama, generate};
use burn_peft::{
    AdapterModel, Ia3Config, Linears, Loaded, LoraConfig, Prompt, adapter,
    adapter::CombinationType,
    config::{Bias, InitLoraWeights},
    route::BASE,
};
use laws::{files::same_files, fixture, floats, integers, max_abs, max_diff, tensors};
use std::{collections::BTreeMap, path::PathBuf};

/// A fixture, the adapters that are combined in it with their weights, and the kind of combination.
type CombinationCase = (&'static str, &'static [(&'static str, f64)], CombinationType);

const HOW: [CombinationCase; 5] = [
    ("linear", &[("a", 0.7), ("b", -0.4)], CombinationType::Linear),
    ("one", &[("b", -1.5)], CombinationType::Svd { rank: None }),
    ("cat", &[("a", 0.7), ("b", -0.4), ("wide", 1.2)], CombinationType::Cat),
    ("svd", &[("a", 0.7), ("b", -0.4), ("wide", 1.2)], CombinationType::Svd { rank: None }),
    ("svd_3", &[("a", 0.7), ("b", -0.4), ("wide", 1.2)], CombinationType::Svd { rank: Some(3) }),
];

fn base() -> Llama<Flex> {
    Checkpoint::open(&fixture("models/gqa_llama3")).unwrap().load(DType::F32, &Default::default()).unwrap()
}

fn directory(name: &str) -> PathBuf {
    fixture(&format!("several/{name}"))
}

/// Returns the model with one adapter of every kind, each named after its fixture.
fn crowded() -> Llama<Flex> {
    let mut model = base();
    for name in ["a", "b", "wide"] {
        adapter::load(&mut model, name, &directory(name)).unwrap();
    }
    adapter::load(&mut model, "dora", &fixture("family/dora")).unwrap();
    adapter::load_ia3(&mut model, "ia3", &fixture("family/ia3")).unwrap();
    for name in ["prefix", "prompt", "p_tuning"] {
        let shape = model.config().base_shape();
        let prompt = Prompt::load(&fixture(&format!("prompt/{name}")), shape, &model.device()).unwrap().value;
        model.prompts.push(prompt.named(name));
    }
    let long = model.new_prompt(&burn_peft::PromptConfig::prefix(9), None, 5).unwrap().named("long");
    model.prompts.push(long);
    adapter::activate(&mut model, &[]).unwrap();
    model
}

const ALL: [&str; 10] = ["a", "b", "prefix", BASE, "dora", "ia3", "prompt", "long", "p_tuning", "wide"];

fn sequence(seed: u32, length: u32) -> Vec<u32> {
    (0..length).map(|i| (i * i * 7 + seed * 13 + 3) % 60).collect()
}

fn logits(model: &Llama<Flex>, ids: &[u32]) -> Vec<f32> {
    floats(&generate::logits(model, ids).unwrap().into_data())
}

/// Returns the model with one adapter active.
fn only(name: &str) -> Llama<Flex> {
    let mut model = crowded();
    adapter::activate(&mut model, if name == BASE { &[] } else { std::slice::from_ref(&name) }).unwrap();
    model
}

fn weights(model: &Llama<Flex>) -> Vec<f32> {
    let mut all = Vec::new();
    model.linears(&mut |_, linear| {
        all.extend(floats(&linear.weight.val().into_data()));
        all.extend(linear.bias.iter().flat_map(|bias| floats(&bias.val().into_data())));
    });
    all
}

#[test]
fn rows_of_a_mixed_batch_are_single_runs() {
    let (model, settings) = (crowded(), GenerationConfig { max_new_tokens: 9, ..GenerationConfig::default() });
    // Once with the same text in all rows, once with texts of different lengths.
    for lengths in [[7; 10], [4, 9, 3, 11, 6, 1, 8, 5, 12, 2]] {
        let same = lengths[0] == lengths[1];
        let text = |i: usize| sequence(if same { 0 } else { i as u32 }, lengths[i]);
        let sequences: Vec<Vec<u32>> = (0..ALL.len()).map(text).collect();
        let found = generate::mixed_logits(&model, &sequences, &ALL).unwrap();
        let said = Generation::mixed(&model, &sequences, &ALL, &settings).unwrap().finish().unwrap();
        let plain: Vec<Vec<f32>> = sequences.iter().map(|ids| logits(&base(), ids)).collect();
        for (i, name) in ALL.into_iter().enumerate() {
            let (alone, found) = (only(name), floats(&found[i].clone().into_data()));
            let difference = max_diff(&found, &logits(&alone, &sequences[i]));
            assert!(difference < 1e-5, "{name}: {difference:e}");
            let effect = max_diff(&found, &plain[i]);
            assert_eq!(effect > 1e-2, name != BASE, "{name} must matter, and the base stay: {effect:e}");
            let run = Generation::new(&alone, &sequences[i..=i], &settings).unwrap().finish().unwrap();
            assert_eq!(said[i], run[0], "{name}: greedy tokens");
        }
    }
}

#[test]
fn rows_of_a_mixed_batch_are_peft_s() {
    let golden = tensors("several/rows.safetensors");
    let width = golden["ids"].shape[1];
    let ids: Vec<u32> = integers(&golden["ids"])[..width].iter().map(|&id| id as u32).collect();
    let found = generate::mixed_logits(&crowded(), &vec![ids; 3], &["a", "b", BASE]).unwrap();
    let found: Vec<f32> = found.into_iter().flat_map(|row| floats(&row.into_data())).collect();
    let difference = max_diff(&found, &floats(&golden["logits"]));
    assert!(difference < 1e-4, "{difference:e}");
}

#[test]
fn impossible_mixed_batches_are_refused() {
    let (mut model, texts) = (crowded(), vec![sequence(0, 5), sequence(1, 5)]);
    let error =
        |model: &Llama<Flex>, names: &[&str]| generate::mixed_logits(model, &texts, names).unwrap_err().to_string();
    assert!(error(&model, &["a"]).contains("2 rows, found 1"));
    assert!(error(&model, &["a", "b", "a"]).contains("2 rows, found 3"));
    let unknown = error(&model, &["a", "c"]);
    assert!(unknown.contains("`c` is not on the model, which has a, wide, dora"), "{unknown}");
    adapter::merge(&mut model, "b").unwrap();
    let merged = error(&model, &["a", BASE]);
    assert!(merged.contains("`b` is merged") && merged.contains("unmerge"), "{merged}");
    let mut pissa = base();
    adapter::load(&mut pissa, "pissa", &fixture("family/pissa")).unwrap();
    let changed = error(&pissa, &["pissa", BASE]);
    assert!(changed.contains("changed the base model"), "{changed}");
    assert!(generate::mixed_logits(&pissa, &texts, &["pissa", "pissa"]).is_ok(), "nobody needs the base");
    let empty: Vec<Vec<u32>> = vec![Vec::new()];
    assert!(generate::mixed_logits(&base(), &empty, &[BASE]).is_err());
}

#[test]
#[should_panic(expected = "the activation and the route have different numbers of tokens")]
fn a_route_for_other_rows_is_an_invariant_broken() {
    let mut layer = burn_peft::Linear::new("q", Tensor::<Flex, 2>::ones([2, 2], &Default::default()), None);
    layer.attach("q", "a", &LoraConfig::default(), 0).unwrap();
    let pass = burn_peft::ForwardContext::routed(burn_peft::Route::from_adapter_names(&["a", BASE], 3));
    layer.forward(Tensor::ones([5, 2], &Default::default()), &pass);
}

#[test]
fn active_adapters_add_up_and_none_is_the_base() {
    let (mut model, text) = (crowded(), sequence(2, 8));
    let plain = logits(&base(), &text);
    assert_eq!(logits(&model, &text), plain, "all are off");
    assert_eq!(adapter::active(&model), [""; 0]);
    assert_eq!(adapter::names(&model), ["a", "wide", "dora", "ia3", "b", "prefix", "prompt", "p_tuning", "long"]);
    adapter::activate(&mut model, &["a", "b"]).unwrap();
    let both = logits(&model, &text);
    // Merging them one by one gives the same sum.
    adapter::merge(&mut model, "a").unwrap();
    assert!(max_diff(&logits(&model, &text), &both) < 1e-4);
    adapter::merge(&mut model, "b").unwrap();
    assert!(max_diff(&logits(&model, &text), &both) < 1e-4);
    assert!(max_diff(&weights(&model), &weights(&base())) > 1e-2);
    // Deactivating a merged adapter removes it from the weights again, in any order.
    adapter::activate(&mut model, &["b"]).unwrap();
    assert!(max_diff(&logits(&model, &text), &logits(&only("b"), &text)) < 1e-4);
    adapter::activate(&mut model, &[]).unwrap();
    assert!(max_diff(&logits(&model, &text), &plain) < 1e-4);
    assert!(max_diff(&weights(&model), &weights(&base())) < 1e-5);
    let error = adapter::activate(&mut model, &["prefix", "long"]).unwrap_err().to_string();
    assert!(error.contains("`long` is the second prompt"), "{error}");
    let error = adapter::activate(&mut model, &["c"]).unwrap_err().to_string();
    assert!(error.contains("`c` is not on the model"), "{error}");
}

#[test]
fn deleted_adapters_leave_the_others() {
    let (mut model, text) = (crowded(), sequence(2, 8));
    adapter::merge(&mut model, "a").unwrap();
    let error = adapter::delete(&mut model, "a").unwrap_err().to_string();
    assert!(error.contains("merged"), "{error}");
    adapter::unmerge(&mut model, "a");
    for name in ["b", "ia3", "prefix", "dora"] {
        adapter::delete(&mut model, name).unwrap();
        assert!(adapter::delete(&mut model, name).is_err(), "{name} is gone");
    }
    assert_eq!(adapter::names(&model), ["a", "wide", "prompt", "p_tuning", "long"]);
    for name in ["a", "wide", "prompt", "long"] {
        adapter::activate(&mut model, &[name]).unwrap();
        assert!(max_diff(&logits(&model, &text), &logits(&only(name), &text)) < 1e-4, "{name}");
    }
    // The name of a deleted adapter can be used again.
    adapter::load(&mut model, "b", &directory("wide")).unwrap();
}

#[test]
fn names_are_free_text_but_taken_once() {
    let (text, expected) = (sequence(1, 6), logits(&only("b"), &sequence(1, 6)));
    // Some of these names are parts of PEFT's keys or of the model's parameter paths.
    for name in ["default", "q_proj", "lora_A", "v", "self_attn.v_proj", "ein Name", "0"] {
        let mut model = base();
        adapter::load(&mut model, name, &directory("b")).unwrap();
        assert_eq!(logits(&model, &text), expected, "{name}");
        let out = tempfile::tempdir().unwrap();
        model.save_adapter(name, out.path()).unwrap();
        let read = |path: PathBuf| burn_peft::format::read_tensors(&path).unwrap();
        assert_eq!(read(out.path().to_owned()), read(directory("b")), "{name}: the name is not in the keys");
        let before = weights(&model);
        for error in [
            adapter::load(&mut model, name, &directory("a")).unwrap_err(),
            adapter::attach(&mut model, name, &LoraConfig::default(), 0).unwrap_err(),
            adapter::attach_ia3(&mut model, name, &Ia3Config::default()).unwrap_err(),
            adapter::combine(&mut model, name, &[(name, 1.0)], CombinationType::Cat).unwrap_err(),
        ] {
            assert!(error.to_string().contains("exists already"), "{error}");
        }
        assert_eq!((weights(&model), logits(&model, &text)), (before, expected.clone()), "{name}: refused, unchanged");
    }
    let error = adapter::load(&mut base(), BASE, &directory("a")).unwrap_err().to_string();
    assert!(error.contains("stands for no adapter"), "{error}");
}

#[test]
fn what_changes_the_base_wants_a_model_of_its_own() {
    let config = |bias, init_lora_weights| LoraConfig { bias, init_lora_weights, ..LoraConfig::default() };
    let saved = LoraConfig { modules_to_save: Some(vec!["lm_head".into()]), ..LoraConfig::default() };
    for config in
        [config(Bias::All, InitLoraWeights::True), config(Bias::None, InitLoraWeights::Pissa { niter: Some(2) }), saved]
    {
        let mut model = base();
        adapter::attach(&mut model, "first", &LoraConfig::default(), 0).unwrap();
        let before = weights(&model);
        let error = adapter::attach(&mut model, "second", &config, 0).unwrap_err().to_string();
        assert!(error.contains("cannot share the model"), "{error}");
        assert_eq!((weights(&model), adapter::names(&model)), (before, vec!["first".to_owned()]));
        let mut model = base();
        adapter::attach(&mut model, "first", &config, 0).unwrap();
        assert!(adapter::attach(&mut model, "second", &LoraConfig::default(), 0).is_err());
        for error in
            [adapter::activate(&mut model, &[]).unwrap_err(), adapter::delete(&mut model, "first").unwrap_err()]
        {
            assert!(error.to_string().contains("load the model again"), "{error}");
        }
        assert_eq!(adapter::names(&model), ["first"]);
    }
}

/// Returns the scaled update `B·A` of every layer.
fn deltas(model: &Llama<Flex>, name: &str) -> BTreeMap<String, Vec<f32>> {
    let mut found = BTreeMap::new();
    model.linears(&mut |path, linear| {
        let delta = linear.adapter(name).map(|adapter| floats(&adapter.delta_weight().into_data()));
        found.extend(delta.map(|delta| (path.to_owned(), delta)));
    });
    found
}

#[test]
fn combinations_are_peft_s() {
    let kept = tempfile::tempdir().unwrap();
    for (name, parts, how) in HOW {
        let mut golden = base();
        let theirs = adapter::load(&mut golden, "made", &directory(name)).unwrap().value;
        let mut model = crowded();
        let config = adapter::combine(&mut model, "made", parts, how).unwrap();
        assert_eq!((config.r, config.scaling()), (theirs.r, 1.0), "{name}");
        assert_eq!(config.target_modules, theirs.target_modules, "{name}");
        assert!(!adapter::active(&model).contains(&"made".to_owned()), "{name}: not active yet");
        let out = kept.path().join(name);
        let paths: Vec<PathBuf> = parts.iter().map(|(part, _)| directory(part)).collect();
        let directories: Vec<_> =
            paths.iter().zip(parts).map(|(path, (_, weight))| (path.as_path(), *weight)).collect();
        adapter::combine_directories::<Flex>(&directories, how, &out, &Default::default()).unwrap();
        let mut reread = base();
        let Loaded { value: ours, unknown_fields } = adapter::load(&mut reread, "made", &out).unwrap();
        assert_eq!((ours.r, ours.target_modules, unknown_fields.len()), (theirs.r, theirs.target_modules, 0), "{name}");
        let expected = deltas(&golden, "made");
        for (found, by) in [(deltas(&model, "made"), "on the model"), (deltas(&reread, "made"), "from files")] {
            assert!(found.keys().eq(expected.keys()), "{name} {by}: {:?}", found.keys());
            for (path, expected) in &expected {
                let difference = max_diff(&found[path], expected);
                assert!(difference < 1e-5 * max_abs(expected).max(1.0), "{name} {by}, {path}: {difference:e}");
            }
        }
        // The values of a truncated SVD are not unique, so only those of other combinations are compared.
        let tolerance = if name.starts_with("svd") { f32::INFINITY } else { 1e-6 };
        same_files(&out, &directory(name), tolerance, name);
    }
}

#[test]
fn side_by_side_is_the_sum_of_the_outputs() {
    let (mut model, text) = (crowded(), sequence(3, 9));
    adapter::combine(&mut model, "sum", &[("a", 1.0), ("b", 1.0)], CombinationType::Cat).unwrap();
    let run = |model: &mut Llama<Flex>, names: &[&str]| {
        adapter::activate(model, names).unwrap();
        logits(model, &text)
    };
    let (both, sum) = (run(&mut model, &["a", "b"]), run(&mut model, &["sum"]));
    assert!(max_diff(&both, &sum) < 1e-5, "{:e}", max_diff(&both, &sum));
    // Weights of 1 and -1 cancel out.
    adapter::combine(&mut model, "nothing", &[("a", 1.0), ("a", -1.0)], CombinationType::Cat).unwrap();
    assert!(max_diff(&run(&mut model, &["nothing"]), &logits(&base(), &text)) < 1e-5);
}

#[test]
fn impossible_combinations_are_refused() {
    let mut model = crowded();
    let mut error =
        |parts: &[(&str, f64)], how| adapter::combine(&mut model, "made", parts, how).unwrap_err().to_string();
    let ranks = error(&[("a", 1.0), ("wide", 1.0)], CombinationType::Linear);
    assert!(ranks.contains("same r value") && ranks.contains("[4, 6]"), "{ranks}");
    assert!(error(&[("a", f64::NAN)], CombinationType::Cat).contains("NaN"));
    assert!(error(&[], CombinationType::Cat).contains("at least one"));
    assert!(error(&[("c", 1.0)], CombinationType::Cat).contains("`c` is not on the model"));
    for name in ["dora", "ia3", "prefix"] {
        assert!(error(&[("a", 1.0), (name, 1.0)], CombinationType::Cat).contains("cannot be combined"), "{name}");
    }
    assert!(error(&[("a", 1.0), ("b", 1.0)], CombinationType::Svd { rank: Some(0) }).contains("svd_rank"));
    assert!(!adapter::names(&model).contains(&"made".to_owned()));
    let out = tempfile::tempdir().unwrap();
    let (a, dora) = (directory("a"), fixture("family/dora"));
    let parts = [(a.as_path(), 1.0), (dora.as_path(), 1.0)];
    let place = out.path().join("x");
    let error = adapter::combine_directories::<Flex>(&parts, CombinationType::Cat, &place, &Default::default());
    assert!(error.unwrap_err().to_string().contains("without DoRA") && !place.exists());
}

/// Returns the memory addresses of all adapter values.
fn addresses(model: &Llama<Flex>) -> Vec<usize> {
    let mut all = Vec::new();
    let mut see = |tensor: Tensor<Flex, 2>| {
        let tensor = tensor.into_primitive().tensor();
        all.push(tensor.storage::<f32>().as_ptr() as usize);
    };
    model.linears(&mut |_, linear| {
        for adapter in &linear.adapters {
            see(adapter.lora_a.val());
            see(adapter.lora_b.val());
        }
    });
    all
}

#[test]
fn a_hot_swap_keeps_every_tensor_in_its_place() {
    let (mut model, text) = (base(), sequence(4, 9));
    adapter::load(&mut model, "live", &directory("a")).unwrap();
    let (places, first) = (addresses(&model), logits(&model, &text));
    let other = tempfile::tempdir().unwrap();
    let files = burn_peft::format::read(&directory("a")).unwrap();
    let changed = files.tensors.iter().map(|(key, data)| {
        let values: Vec<f32> = floats(data).iter().rev().map(|x| 1.5 * x).collect();
        (key.clone(), burn::tensor::TensorData::new(values, data.shape.clone()))
    });
    let config = LoraConfig { lora_alpha: 9.0, ..files.config };
    burn_peft::format::write(other.path(), &config.to_json(), changed).unwrap();
    let mut fresh = base();
    adapter::load(&mut fresh, "live", other.path()).unwrap();
    let swapped = adapter::hotswap(&mut model, "live", other.path()).unwrap();
    assert_eq!((swapped.value.lora_alpha, swapped.unknown_fields.len()), (9.0, 0));
    assert_eq!(logits(&model, &text), logits(&fresh, &text), "the new values, and their scaling");
    assert!(max_diff(&logits(&model, &text), &first) > 1e-2, "the swap must matter");
    assert_eq!(addresses(&model), places);
    adapter::hotswap(&mut model, "live", &directory("a")).unwrap();
    assert_eq!((logits(&model, &text), addresses(&model)), (first.clone(), places), "and back");

    for (directory, expected) in [
        (directory("wide"), "[4, 32], found [6, 32]"),
        (directory("b"), "have `mlp.down_proj` where `self_attn.q_proj` is expected"),
        (fixture("family/dora"), "lora_magnitude_vector"),
        (fixture("family/pissa"), "changes the base model"),
    ] {
        let error = adapter::hotswap(&mut model, "live", &directory).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(logits(&model, &text), first, "refused, unchanged");
    }
    let error = adapter::hotswap(&mut model, "live", &directory("wide")).unwrap_err().to_string();
    assert!(error.contains("delete `live` and load this one instead"), "{error}");
    assert!(
        adapter::hotswap(&mut model, "dead", &directory("a")).unwrap_err().to_string().contains("not on the model")
    );
    adapter::merge(&mut model, "live").unwrap();
    assert!(adapter::hotswap(&mut model, "live", &directory("a")).unwrap_err().to_string().contains("merged"));
}

#[test]
fn a_safe_merge_of_no_number_leaves_the_weights() {
    for (broken, name) in [(f32::NAN, "b"), (f32::INFINITY, "b"), (f32::NAN, "ia3"), (f32::NAN, "dora")] {
        let mut model = crowded();
        let before = weights(&model);
        // Only the last layer is broken, so that a careless merge would already have changed the others.
        model.linears_mut(&mut |path, linear| {
            if path.contains("layers.1.") {
                for lora in linear.adapters.iter_mut().filter(|lora| lora.name == name) {
                    lora.lora_b = lora.lora_b.clone().map(|b| b.mul_scalar(broken));
                }
                for ia3 in linear.ia3.iter_mut().filter(|ia3| ia3.name == name) {
                    ia3.ia3_l = ia3.ia3_l.clone().map(|l| l.mul_scalar(broken));
                }
            }
        });
        let error = adapter::safe_merge(&mut model, name).unwrap_err().to_string();
        assert!(error.contains("finite") && error.contains("layers.1."), "{error}");
        assert_eq!(weights(&model), before, "{name}");
        adapter::merge(&mut model, name).unwrap();
        assert!(weights(&model).iter().any(|x| !x.is_finite()), "the plain merge asks nothing");
    }
    let mut model = crowded();
    adapter::safe_merge(&mut model, "a").unwrap();
    let mut plain = crowded();
    adapter::merge(&mut plain, "a").unwrap();
    assert_eq!(weights(&model), weights(&plain));
    for name in ["prefix", "prompt"] {
        let error = adapter::merge(&mut model, name).unwrap_err().to_string();
        assert!(error.contains("cannot be merged"), "{error}");
    }
}
