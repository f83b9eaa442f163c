//! The model of a rank that holds some segments of a pipeline: its own parameters are bit for bit those of the whole
//! model, the others are placeholders, and everything else about the two models is the same.

use super::{
    MODELS, PACKED, Train, base,
    table::{Method, lora, methods},
};
use burn::{
    backend::Flex,
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::{DType, Int, Tensor, TensorData},
};
use burn_llama::{Checkpoint, HeldSegments, Llama, LlamaConfig, Storage, checkpoint};
use burn_peft::{
    AdapterModel, LoraConfig, TargetModules, adapter,
    config::{InitLoraWeights, TokenIndices},
    param,
};
use burn_zero::segment::{Segments, TrainSegments};
use laws::fixture;
use std::{
    collections::BTreeSet,
    ops::Range,
    path::{Path, PathBuf},
    sync::LazyLock,
};
use tempfile::TempDir;

/// A Hugging Face model whose projections are quantized when they are loaded.
const NF4: &str = "nf4";

/// A parameter of a model.
struct Parameter {
    path: String,
    id: ParamId,
    trained: bool,
    values: TensorData,
}

/// Collects every parameter, floats and packed rows.
#[derive(Default)]
struct Collect {
    path: Vec<String>,
    found: Vec<Parameter>,
}

impl Collect {
    fn add(&mut self, id: ParamId, trained: bool, values: TensorData) {
        self.found.push(Parameter { path: self.path.join("."), id, trained, values });
    }
}

impl ModuleVisitor<Train> for Collect {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
        self.add(param.id, param.val().is_require_grad(), param.val().into_data());
    }
    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<Train, D, Int>>) {
        self.add(param.id, false, param.val().into_data());
    }
}

fn parameters(model: &Llama<Train>) -> Vec<Parameter> {
    let mut collect = Collect::default();
    model.visit(&mut collect);
    collect.found
}

/// Returns the paths of the parameters that some segments use.
fn used_by(model: &Llama<Train>, segments: &Range<usize>) -> BTreeSet<String> {
    let mut collect = Collect::default();
    segments.clone().for_each(|segment| model.visit_segment(segment, &mut collect));
    collect.found.into_iter().map(|parameter| parameter.path).collect()
}

/// Writes a random model whose rows are whole blocks of NF4.
fn write_wide(folder: &Path) {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 30, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": false,
    });
    let model = LlamaConfig::from_json(config).unwrap().init::<Flex>(3, &Default::default());
    checkpoint::save(&model, folder).unwrap();
}

/// Returns the folder of the model of [`write_wide`].
fn wide() -> PathBuf {
    static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        write_wide(folder.path());
        folder
    });
    FOLDER.path().to_owned()
}

fn load(name: &str, held: &HeldSegments) -> Llama<Train> {
    let (path, storage) = match name {
        PACKED => (fixture("gguf/model.gguf"), Storage::Packed),
        NF4 => (wide(), Storage::Nf4),
        other => (fixture(&format!("models/{other}")), Storage::Dense(DType::F32)),
    };
    let model = Checkpoint::open(&path).unwrap().load_segments(held, storage, &Default::default()).unwrap();
    // Weights in half precision cannot be trained.
    if matches!(storage, Storage::Dense(_)) { model } else { param::train_only(model, |_| false) }
}

/// Cuts the segments of a model into that many stages.
fn stages(model: &Llama<Train>, count: usize) -> Vec<Range<usize>> {
    let all = Segments::segments(model);
    (0..count).map(|stage| all * stage / count..all * (stage + 1) / count).collect()
}

/// Checks the law for every stage of 2 to 4; `change` applies a method.
fn check(what: &str, name: &str, change: impl Fn(&mut Llama<Train>)) {
    let made = |held: &HeldSegments| {
        let mut model = load(name, held);
        change(&mut model);
        adapter::train_active(model).unwrap()
    };
    let whole = made(&HeldSegments::all());
    for count in 2..=4 {
        let mut held = BTreeSet::new();
        for range in stages(&whole, count) {
            let stage = made(&HeldSegments::of([range.clone()]));
            let (own, place) = (used_by(&stage, &range), format!("{what} on {name}, segments {range:?}"));
            check_stage(&place, [&whole, &stage], &own);
            held.extend(own);
        }
        let all: BTreeSet<String> = parameters(&whole).into_iter().map(|parameter| parameter.path).collect();
        assert_eq!(held, all, "{what} on {name}: {count} stages hold everything");
    }
}

fn check_stage(what: &str, [whole, stage]: [&Llama<Train>; 2], own: &BTreeSet<String>) {
    let (expected, found) = (parameters(whole), parameters(stage));
    assert_eq!(expected.len(), found.len(), "{what}");
    let mut bytes = [0, 0];
    for (expected, found) in expected.iter().zip(&found) {
        let (path, held) = (&found.path, own.contains(&found.path));
        assert_eq!((path, found.id, found.trained), (&expected.path, expected.id, expected.trained), "{what}");
        assert_eq!(found.values.dtype, expected.values.dtype, "{what}: {path}");
        assert_eq!(stage.held_segments().holds(stage.config(), path), held, "{what}: {path} by its name");
        match held {
            true => assert_eq!(found.values, expected.values, "{what}: {path}"),
            // A packed weight keeps one row.
            false => assert_eq!(found.values.shape[0], 1, "{what}: {path}"),
        }
        let float = found.values.dtype != DType::I32;
        assert!(held || !float || found.values.num_elements() == 1, "{what}: {path} is {:?}", found.values.shape);
        if held {
            bytes[0] += expected.values.as_bytes().len();
        } else if float {
            bytes[1] += found.values.dtype.size();
        }
    }
    let floats = found.iter().filter(|parameter| own.contains(&parameter.path) || parameter.values.dtype != DType::I32);
    let in_all: usize = floats.map(|parameter| parameter.values.as_bytes().len()).sum();
    assert_eq!(in_all, bytes[0] + bytes[1], "{what}: bytes of its own tensors and of one value for each other");
}

/// Returns whether a method can start on a part of the model.
fn starts_on_a_part(method: &Method) -> bool {
    let reads = |config: &LoraConfig| config.init_lora_weights.reads_base_weights();
    !matches!(method, Method::From(_)) && !method.config().is_some_and(reads)
}

fn names() -> impl Iterator<Item = &'static str> {
    MODELS.into_iter().chain([NF4])
}

fn fits(method: &Method, name: &str) -> bool {
    method.fits(if name == NF4 { PACKED } else { name })
}

#[test]
fn a_stage_has_its_part_of_a_new_adapter() {
    for name in names() {
        check("the model alone", name, |_| {});
        for (what, method) in methods().into_iter().filter(|(_, method)| fits(method, name)) {
            if starts_on_a_part(&method) {
                check(what, name, |model| method.attach(model, "new"));
            }
        }
    }
}

#[test]
fn a_stage_has_its_part_of_an_adapter_of_the_embedding() {
    let embedding = |tie: bool| {
        lora(move |config| {
            config.target_modules = TargetModules::Suffixes(vec!["embed_tokens".into(), "q_proj".into()]);
            config.ensure_weight_tying = tie;
        })
    };
    let tokens = lora(|config| config.trainable_token_indices = Some(TokenIndices::Embedding(vec![3, 5])));
    for name in names() {
        check("LoRA of the embedding", name, |model| embedding(false).attach(model, "new"));
        check("LoRA of a tied embedding", name, |model| embedding(true).attach(model, "new"));
        check("rows of tokens", name, |model| {
            tokens.attach(model, "new");
            adapter::init_tokens_by_mean(model, "new");
        });
        check("new rows", name, |model| {
            let rows = model.config().vocab_size + 3;
            burn_peft::Linears::resize_token_embeddings(model, rows);
            tokens.attach(model, "new");
        });
    }
}

#[test]
fn a_stage_has_its_part_of_an_adapter_from_a_file() {
    for name in names() {
        for (what, method) in methods().into_iter().filter(|(_, method)| fits(method, name)) {
            let folder = tempfile::tempdir().unwrap();
            let mut model = load(name, &HeldSegments::all());
            method.attach(&mut model, "default");
            model.save_adapter("default", folder.path()).unwrap();
            check(what, name, |model| {
                if method.is_prompt() {
                    let read = burn_peft::Prompt::load(folder.path(), model.config().base_shape(), &model.device());
                    model.add_prompt(read.unwrap().value);
                } else {
                    method.load(model, "default", folder.path());
                }
            });
        }
    }
}

#[test]
fn a_start_that_needs_the_whole_model_is_refused_on_a_part() {
    let mut part = load("gqa_llama3", &HeldSegments::of(std::iter::once(0..3)));
    let loftq = lora(|config| config.init_lora_weights = InitLoraWeights::Loftq);
    let refused = methods().into_iter().chain([("loftq", loftq)]).filter(|(_, method)| !starts_on_a_part(method));
    let mut seen = 0;
    for (what, method) in refused {
        let error = match &method {
            Method::Lora(config) => adapter::attach(&mut part, "new", config, 7).unwrap_err().to_string(),
            Method::From(config) => part.new_prompt(config, Some(&[3]), 7).unwrap_err().to_string(),
            _ => unreachable!("{what}"),
        };
        assert!(error.contains("make the adapter with one process and give it as `method.init`"), "{what}: {error}");
        seen += 1;
    }
    assert_eq!(seen, 5);
}

/// Tensors of other stages are not read: one that cannot be quantized stops only the stage that holds it.
#[test]
fn the_file_is_read_only_for_the_tensors_of_the_stage() {
    let folder = tempfile::tempdir().unwrap();
    write_wide(folder.path());
    let path = folder.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let table: serde_json::Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    let first = header + table["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[first..first + 4].fill(0xff);
    std::fs::write(&path, bytes).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let load = |range| {
        checkpoint.load_segments::<Train>(&HeldSegments::of([range]), Storage::Nf4, &Default::default()).map(drop)
    };
    let segments = checkpoint.config().num_segments();
    for segment in 0..segments {
        assert_eq!(load(segment..segment + 1).is_ok(), segment != 4, "segment {segment}");
    }
}

/// A rank that runs several stages holds them all.
#[test]
fn a_rank_holds_several_ranges() {
    let whole = base::<Train>("tied_bias", DType::F32);
    let last = Segments::segments(&whole) - 1;
    let stage = load("tied_bias", &HeldSegments::of([0..2, last..last + 1]));
    let own = used_by(&stage, &(0..2)).union(&used_by(&stage, &(last..last + 1))).cloned().collect();
    check_stage("two ranges", [&load("tied_bias", &HeldSegments::all()), &stage], &own);
}
