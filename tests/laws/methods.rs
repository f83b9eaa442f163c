//! Properties that every fine-tuning method must have, on two architectures, on a tied head and on packed weights. Each
//! method is a row of a table, each property is a test.

mod stages;
mod table;

use burn::{
    backend::{Autodiff, Flex},
    module::AutodiffModule,
    tensor::DType,
};
use burn_llama::{
    Checkpoint, Example, Generation, GenerationConfig, Llama, SequenceLayout, Storage, checkpoint, generate,
    kernel::Kernels,
};
use burn_peft::{AdapterModel, DropoutKey, ForwardContext, Linears, adapter, param};
use burn_zero::{EngineConfig, optimizer::AdamW, segment::Checkpointing};
use laws::{fixture, floats, max_abs, max_diff, one_backward_at_a_time, reference::driven_rows};
use std::collections::{BTreeMap, BTreeSet};
use table::{Method, lora, methods};

type Train = Autodiff<Flex>;

/// The base models; the last is a GGUF file whose blocks stay packed.
const MODELS: [&str; 4] = ["gqa_llama3", "qwen2", "tied_bias", PACKED];
const PACKED: &str = "packed";

fn base<B: Kernels>(name: &str, dtype: DType) -> Llama<B> {
    if name == PACKED {
        let checkpoint = Checkpoint::open(&fixture("gguf/model.gguf")).unwrap();
        // Weights that the file stores in half precision cannot be trained.
        return param::train_only(checkpoint.load(Storage::Packed, &Default::default()).unwrap(), |_| false);
    }
    Checkpoint::open(&fixture(&format!("models/{name}"))).unwrap().load(dtype, &Default::default()).unwrap()
}

fn logits<B: Kernels>(model: &Llama<B>) -> Vec<f32> {
    let ids: Vec<u32> = (0..11).map(|i| (i * 17 + 5) % 10).collect();
    floats(&generate::logits(model, &ids).unwrap().into_data())
}

fn rows() -> Vec<Example> {
    let row = |n: usize, prompt: usize| Example {
        ids: (0..n).map(|i| (i * 13 + prompt) as u32 % 10).collect(),
        loss_mask: (0..n).map(|i| i >= prompt).collect(),
    };
    vec![row(12, 5), row(7, 2)]
}

/// Returns the values of every parameter by path.
fn values(model: &Llama<Train>) -> BTreeMap<String, Vec<f32>> {
    struct ParameterReader(Vec<String>, BTreeMap<String, Vec<f32>>);
    impl burn::module::ModuleVisitor<Train> for ParameterReader {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.to_owned());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &burn::module::Param<burn::tensor::Tensor<Train, D>>) {
            self.1.insert(self.0.join("."), floats(&param.val().into_data()));
        }
    }
    let mut read = ParameterReader(Vec::new(), BTreeMap::new());
    burn::module::Module::<Train>::visit(model, &mut read);
    read.1
}

/// Returns the model after a few training steps, with dropout if the method has it.
fn trained(model: Llama<Train>) -> Llama<Train> {
    let (rows, layout) = (rows(), SequenceLayout::padded(&[12, 7]));
    let config = EngineConfig::new(AdamW::default()).with_max_grad_norm(1.0);
    let mut engine = config.with_checkpointing(Checkpointing::Full).init(model).unwrap();
    for step in 0..3 {
        let context = ForwardContext::training(DropoutKey { seed: 1, step, tokens: layout.dropout_tokens(0) });
        let batch = engine.model().batch(&rows, &layout, 0.1, context).unwrap();
        engine.train_step(&[batch], 2e-2).unwrap();
    }
    engine.into_model().unwrap()
}

/// Checks a property for every method on every model, with one trained adapter named `learned`.
fn for_every(law: impl Fn(&str, &str, &Method, Llama<Train>)) {
    let _lock = one_backward_at_a_time();
    for name in MODELS {
        for (what, method) in methods().into_iter().filter(|(_, method)| method.fits(name)) {
            let mut model = base::<Train>(name, DType::F32);
            method.attach(&mut model, "learned");
            law(&format!("{what} on {name}"), name, &method, trained(adapter::train_active(model).unwrap()));
        }
    }
}

#[test]
fn a_new_adapter_changes_nothing_and_a_prompt_does() {
    for name in MODELS {
        let plain = logits(&base::<Flex>(name, DType::F32));
        for (what, method) in methods().into_iter().filter(|(_, method)| method.fits(name)) {
            let mut model = base::<Flex>(name, DType::F32);
            method.attach(&mut model, "new");
            let difference = max_diff(&logits(&model), &plain);
            assert_eq!(difference < 1e-4, method.starts_as_nothing(), "{what} on {name}: {difference:e}");
        }
    }
}

#[test]
fn what_a_method_names_learns_all_of_it_and_nothing_else() {
    for_every(|what, name, method, model| {
        let mut fresh = base::<Train>(name, DType::F32);
        method.attach(&mut fresh, "learned");
        let fresh = adapter::train_active(fresh).unwrap();
        let learned: BTreeSet<String> = param::named_parameters::<Train, _>(&fresh)
            .into_iter()
            .filter(|param| param.requires_grad)
            .map(|param| param.path)
            .collect();
        assert!(learned.iter().all(|path| adapter::is_adapter(path)) || method.changes_base(), "{what}: {learned:?}");
        let before = values(&fresh);
        for (path, after) in values(&model) {
            let difference = max_diff(&after, &before[&path]);
            let fits = if learned.contains(&path) { difference > 1e-6 } else { difference == 0.0 };
            assert!(fits, "{what}: {path} moved by {difference:e}");
        }
        let gradients = driven_rows(&model, &rows(), true, Checkpointing::Full);
        assert!(gradients.keys().eq(&learned), "{what}: {:?}", gradients.keys());
        assert!(gradients.values().all(|gradient| max_abs(gradient) > 0.0), "{what}");
    });
}

#[test]
fn a_saved_adapter_is_the_adapter_whatever_it_is_called() {
    let folder = tempfile::tempdir().unwrap();
    for_every(|what, name, method, model| {
        let model = model.valid();
        let out = folder.path().join(what);
        model.save_adapter("learned", &out).unwrap();
        let expected = logits(&model);
        assert!(max_diff(&expected, &logits(&base::<Flex>(name, DType::F32))) > 1e-3, "{what}: it must matter");
        for new in ["default", "weight", "learned"] {
            let mut again = base::<Flex>(name, DType::F32);
            method.load(&mut again, new, &out);
            assert_eq!(adapter::names(&again), [new]);
            let difference = max_diff(&logits(&again), &expected);
            // PiSSA's initial factors are recomputed from the weights, with differences in the last digits.
            let limit = if method.changes_base() { 1e-4 } else { 1e-6 };
            assert!(difference <= limit, "{what} as {new}: {difference:e}");
        }
    });
}

#[test]
fn merged_twice_is_merged_and_off_is_the_base() {
    let folder = tempfile::tempdir().unwrap();
    for_every(|what, name, method, model| {
        let (mut model, plain) = (model.valid(), logits(&base::<Flex>(name, DType::F32)));
        let with = logits(&model);
        if method.is_prompt() || name == PACKED {
            assert!(adapter::merge(&mut model, "learned").is_err(), "{what}");
        } else {
            adapter::safe_merge(&mut model, "learned").unwrap();
            let once = logits(&model);
            adapter::merge(&mut model, "learned").unwrap();
            assert_eq!(logits(&model), once, "{what}: merging twice");
            assert!(max_diff(&once, &with) < 1e-4, "{what}: merged");
            let out = folder.path().join(what);
            checkpoint::save_as(&model, DType::F32, &out).unwrap();
            let again: Llama<Flex> = Checkpoint::open(&out).unwrap().load(DType::F32, &Default::default()).unwrap();
            assert!(adapter::names(&again).is_empty() && max_diff(&logits(&again), &with) < 1e-4, "{what}: saved");
            adapter::unmerge(&mut model, "learned");
            assert!(max_diff(&logits(&model), &with) < 1e-4, "{what}: unmerged");
            adapter::merge(&mut model, "learned").unwrap();
        }
        if method.changes_base() {
            assert!(adapter::activate(&mut model, &[]).is_err(), "{what}: its base is not kept");
            return;
        }
        adapter::activate(&mut model, &[]).unwrap();
        assert!(max_diff(&logits(&model), &plain) < 1e-4, "{what}: off, from its merged state");
        adapter::activate(&mut model, &["learned"]).unwrap();
        assert!(max_diff(&logits(&model), &with) < 1e-4, "{what}: on again");
        adapter::delete(&mut model, "learned").unwrap();
        assert!(adapter::names(&model).is_empty() && max_diff(&logits(&model), &plain) < 1e-4, "{what}: gone");
    });
}

/// Both orders of the two adapter names.
const ORDERS: [[&str; 2]; 2] = [["learned", "second"], ["second", "learned"]];

#[test]
fn two_merge_and_unmerge_in_any_order() {
    for_every(|what, name, method, mut model| {
        if method.is_prompt() || method.changes_base() || name == PACKED {
            return;
        }
        method.attach(&mut model, "second");
        adapter::activate(&mut model, &["second"]).unwrap();
        let mut model = trained(adapter::train_active(model).unwrap()).valid();
        let alone = logits(&model);
        adapter::activate(&mut model, &ORDERS[0]).unwrap();
        let both = logits(&model);
        assert!(max_diff(&alone, &both) > 1e-3, "{what}: two are not one");
        // A DoRA magnitude scales the whole weight, including what another adapter has added to it.
        let adds_up = !method.config().is_some_and(|config| config.use_dora);
        for (order, back) in ORDERS.into_iter().flat_map(|order| ORDERS.map(|back| (order, back))) {
            let mut model = model.clone();
            for name in order {
                adapter::merge(&mut model, name).unwrap();
                assert!(!adds_up || max_diff(&logits(&model), &both) < 1e-4, "{what}: {name} merged");
            }
            for name in back {
                adapter::unmerge(&mut model, name);
                assert!(!adds_up || max_diff(&logits(&model), &both) < 1e-4, "{what}: {name} unmerged");
            }
            let difference = max_diff(&logits(&model), &both);
            assert!(difference < 1e-4, "{what}, merged {order:?}, unmerged {back:?}: {difference:e}");
        }
    });
}

#[test]
fn an_adapter_that_is_off_does_not_learn() {
    let _lock = one_backward_at_a_time();
    for name in MODELS {
        let shares = |method: &Method| !method.changes_base() && method.fits(name);
        for (what, method) in methods().into_iter().filter(|(_, method)| shares(method)) {
            let mut model = base::<Train>(name, DType::F32);
            for (adapter, part) in [("off", &method), ("other", &lora(|_| {})), ("on", &method)] {
                part.attach(&mut model, adapter);
            }
            adapter::activate(&mut model, &["on"]).unwrap();
            let before = values(&model);
            let model = trained(adapter::train_active(model).unwrap());
            let (mut still, mut moved) = (0, 0);
            for (path, after) in values(&model).into_iter().filter(|(path, _)| adapter::is_adapter(path)) {
                let same = after == before[&path];
                if same {
                    still += 1
                } else {
                    moved += 1
                }
                let idle = path.contains("prompts.0.") || path.contains("ia3.0.");
                assert!(!idle || same, "{what} on {name}: {path}");
            }
            assert!(moved > 0 && still >= moved, "{what} on {name}: {moved} moved, {still} did not");
            assert_eq!(param::count_trainable::<Train, _>(&model), trained_values(&model, "on"), "{what} on {name}");
        }
    }
}

/// Returns the number of trainable values of the named adapter.
fn trained_values(model: &Llama<Train>, name: &str) -> usize {
    let mut n = 0;
    model.linears(&mut |_, linear| {
        for lora in linear.adapters.iter().filter(|lora| lora.name == name) {
            n += lora.lora_a.shape().num_elements() + lora.lora_b.shape().num_elements();
            n += lora.dora.as_ref().map_or(0, |dora| dora.magnitude.shape().num_elements());
        }
        n +=
            linear.ia3.iter().filter(|ia3| ia3.name == name).map(|ia3| ia3.ia3_l.shape().num_elements()).sum::<usize>();
    });
    let prompts = model.prompts.iter().filter(|prompt| prompt.name == name);
    n + prompts.map(|prompt| prompt.config().count_trainable(&model.config().base_shape())).sum::<usize>()
}

#[test]
fn half_precision_weights_carry_every_method() {
    let folder = tempfile::tempdir().unwrap();
    for_every(|what, name, method, model| {
        let out = folder.path().join(what);
        model.save_adapter("learned", &out).unwrap();
        let expected = logits(&model.valid());
        for (dtype, limit) in [(DType::BF16, 0.05), (DType::F16, 0.01)] {
            let mut half = base::<Flex>(name, dtype);
            method.load(&mut half, "learned", &out);
            let difference = max_diff(&logits(&half), &expected) / max_abs(&expected);
            assert!(difference < limit, "{what} in {dtype:?}: {difference}");
            if let Some(prompt) = half.prompts.first() {
                assert_eq!(prompt.encoder.embedding.val().dtype(), DType::F32, "{what}");
            }
        }
    });
}

#[test]
fn what_is_generated_is_what_the_logits_say() {
    let settings = GenerationConfig { max_new_tokens: 6, ..GenerationConfig::default() };
    for_every(|what, _, _, model| {
        let model = model.valid();
        let prompt: Vec<u32> = vec![4, 9, 2, 3];
        let said = Generation::new(&model, std::slice::from_ref(&prompt), &settings).unwrap().finish().unwrap();
        let mut all = prompt;
        for token in &said[0] {
            let logits = floats(&generate::logits(&model, &all).unwrap().into_data());
            let last = &logits[logits.len() - model.config().vocab_size..];
            let best = (1..last.len()).fold(0, |best, i| if last[i] > last[best] { i } else { best });
            assert!(last[best] - last[*token as usize] < 1e-4, "{what}: {token} against {best}");
            all.push(*token);
        }
    });
}
