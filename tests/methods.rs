//! Laws that every method keeps, on two architectures: a method is a row, a law is a test.

use burn::{
    backend::{Autodiff, Flex},
    module::AutodiffModule,
    tensor::DType,
};
use burn_llama::{Checkpoint, Example, Generate, Layout, Llama, Settings, generate, kernel::Kernels};
use burn_peft::{
    Ia3Config, Linears, LoraConfig, Pass, Prompt, PromptConfig, TargetModules, adapter, config::InitLora, ia3, param,
    prompt::Method as PromptMethod,
};
use burn_zero::{Engine, optimizer::AdamW, segment::Checkpointing};
use laws::{fixture, floats, max_abs, max_diff, one_backward_at_a_time, reference::driven_rows};
use std::path::Path;

type Train = Autodiff<Flex>;

const MODELS: [&str; 2] = ["gqa_llama3", "qwen2"];

/// A method with its configuration.
enum Method {
    Lora(Box<LoraConfig>),
    Ia3,
    Prompt(PromptConfig),
}

fn lora(change: impl FnOnce(&mut LoraConfig)) -> Method {
    let mut config = LoraConfig { r: 4, lora_alpha: 6.0, ..LoraConfig::default() };
    change(&mut config);
    Method::Lora(Box::new(config))
}

fn with_mlp() -> PromptConfig {
    let encoder_hidden_size = Some(7);
    let method =
        PromptMethod::Prefix { prefix_projection: true, encoder_hidden_size, init_weights: None, dropout: 0.0 };
    PromptConfig { method, ..PromptConfig::prefix(3) }
}

fn methods() -> Vec<(&'static str, Method)> {
    vec![
        ("lora", lora(|_| {})),
        (
            "rslora on all",
            lora(|config| {
                config.use_rslora = true;
                config.target_modules = TargetModules::Pattern("all-linear".into());
            }),
        ),
        ("orthogonal", lora(|config| config.init_lora_weights = InitLora::Orthogonal)),
        ("pissa", lora(|config| config.init_lora_weights = InitLora::Pissa { niter: None })),
        ("dora", lora(|config| config.use_dora = true)),
        ("ia3", Method::Ia3),
        ("prefix", Method::Prompt(PromptConfig::prefix(3))),
        ("prefix with MLP", Method::Prompt(with_mlp())),
        ("prompt", Method::Prompt(PromptConfig::prompt(3))),
        ("p-tuning", Method::Prompt(PromptConfig::p_tuning(3))),
    ]
}

impl Method {
    fn attach<B: Kernels>(&self, model: &mut Llama<B>, name: &str) {
        match self {
            Self::Lora(config) => adapter::attach(model, name, config, 7).unwrap(),
            Self::Ia3 => ia3::attach(model, name, &Ia3Config::default()).unwrap(),
            Self::Prompt(config) => {
                let prompt = model.new_prompt(config, None, 7).unwrap().named(name);
                model.prompts.push(prompt);
            }
        }
    }

    fn save<B: Kernels>(&self, model: &Llama<B>, name: &str, out: &Path) {
        match self {
            Self::Lora(config) => adapter::save(model, name, config, out).unwrap(),
            Self::Ia3 => ia3::save(model, name, &Ia3Config::default(), out).unwrap(),
            Self::Prompt(_) => {
                model.prompts.iter().find(|prompt| prompt.name == name).unwrap().save(out).unwrap();
            }
        }
    }

    fn load<B: Kernels>(&self, model: &mut Llama<B>, name: &str, from: &Path) {
        match self {
            Self::Lora(_) => drop(adapter::load(model, name, from).unwrap()),
            Self::Ia3 => drop(ia3::load(model, name, from).unwrap()),
            Self::Prompt(_) => {
                let (prompt, _) = Prompt::load(from, model.config().base_shape(), &model.device()).unwrap();
                model.prompts.push(prompt.named(name));
            }
        }
    }

    fn is_prompt(&self) -> bool {
        matches!(self, Self::Prompt(_))
    }

    fn changes_base(&self) -> bool {
        matches!(self, Self::Lora(config) if config.changes_base())
    }
}

fn base<B: Kernels>(name: &str, dtype: DType) -> Llama<B> {
    Checkpoint::open(&fixture(&format!("models/{name}"))).unwrap().load(dtype, &Default::default()).unwrap()
}

fn logits<B: Kernels>(model: &Llama<B>) -> Vec<f32> {
    let ids: Vec<u32> = (0..11).map(|i| (i * 17 + 5) % 60).collect();
    floats(&generate::logits(model, &ids).unwrap().into_data())
}

fn rows() -> Vec<Example> {
    let row = |n: usize, prompt: usize| Example {
        ids: (0..n).map(|i| (i * 13 + prompt) as u32 % 60).collect(),
        learned: (0..n).map(|i| i >= prompt).collect(),
    };
    vec![row(12, 5), row(7, 2)]
}

/// Every parameter's values by path; those of the base model, or those of adapters.
fn values(model: &Llama<Train>, of_adapters: bool) -> Vec<(String, Vec<f32>)> {
    struct Read(Vec<String>, Vec<(String, Vec<f32>)>);
    impl burn::module::ModuleVisitor<Train> for Read {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.to_owned());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &burn::module::Param<burn::tensor::Tensor<Train, D>>) {
            self.1.push((self.0.join("."), floats(&param.val().into_data())));
        }
    }
    let mut read = Read(Vec::new(), Vec::new());
    burn::module::Module::<Train>::visit(model, &mut read);
    read.1.into_iter().filter(|(path, _)| adapter::is_adapter(path) == of_adapters).collect()
}

/// The model after a few steps in which the active adapters learn.
fn trained(model: Llama<Train>) -> Llama<Train> {
    let (mut model, rows) = (adapter::train_active(model), rows());
    let mut engine = Engine::<Train>::new(AdamW::default(), Some(1.0), Checkpointing::Full);
    for _ in 0..3 {
        let batch = model.batch(&rows, &Layout::padded(&[12, 7]), 0.1, Pass::default()).unwrap();
        engine.accumulate(&mut model, &batch).unwrap();
        engine.step(&mut model, 2e-2).unwrap();
    }
    model
}

/// Runs a law for every method on every model, with one trained adapter called `learned`.
fn for_every(law: impl Fn(&str, &str, &Method, Llama<Train>)) {
    let _lock = one_backward_at_a_time();
    for name in MODELS {
        for (what, method) in methods() {
            let mut model = base::<Train>(name, DType::F32);
            method.attach(&mut model, "learned");
            law(&format!("{what} on {name}"), name, &method, trained(model));
        }
    }
}

#[test]
fn a_new_adapter_changes_nothing_and_a_prompt_does() {
    for name in MODELS {
        let plain = logits(&base::<Flex>(name, DType::F32));
        for (what, method) in methods() {
            let mut model = base::<Flex>(name, DType::F32);
            method.attach(&mut model, "new");
            let difference = max_diff(&logits(&model), &plain);
            assert_eq!(difference < 1e-4, !method.is_prompt(), "{what} on {name}: {difference:e}");
        }
    }
}

#[test]
fn only_the_adapter_learns_and_all_of_it_does() {
    for_every(|what, name, method, model| {
        let mut fresh = base::<Train>(name, DType::F32);
        method.attach(&mut fresh, "learned");
        assert!(values(&model, false) == values(&fresh, false), "{what}: the base, bit for bit");
        for ((path, after), (_, before)) in values(&model, true).into_iter().zip(values(&fresh, true)) {
            assert!(max_diff(&after, &before) > 1e-6, "{what}: {path} has learned nothing");
        }
        let gradients = driven_rows(&model, &rows(), true, Checkpointing::Full);
        let paths: Vec<String> = values(&model, true).into_iter().map(|(path, _)| path).collect();
        assert!(
            gradients.keys().all(|path| adapter::is_adapter(path)) && gradients.len() == paths.len(),
            "{what}: {:?}",
            gradients.keys()
        );
        assert!(gradients.values().all(|gradient| max_abs(gradient) > 0.0), "{what}");
    });
}

#[test]
fn a_saved_adapter_is_the_adapter_whatever_it_is_called() {
    let folder = tempfile::tempdir().unwrap();
    for_every(|what, name, method, model| {
        let model = model.valid();
        let out = folder.path().join(what);
        method.save(&model, "learned", &out);
        let expected = logits(&model);
        assert!(max_diff(&expected, &logits(&base::<Flex>(name, DType::F32))) > 1e-3, "{what}: it must matter");
        for new in ["default", "weight", "learned"] {
            let mut again = base::<Flex>(name, DType::F32);
            method.load(&mut again, new, &out);
            assert_eq!(adapter::names(&again), [new]);
            let difference = max_diff(&logits(&again), &expected);
            // PiSSA's start is made again from the weights, to its last digits.
            let limit = if method.changes_base() { 1e-4 } else { 1e-6 };
            assert!(difference <= limit, "{what} as {new}: {difference:e}");
        }
    });
}

#[test]
fn merged_twice_is_merged_and_off_is_the_base() {
    for_every(|what, name, method, model| {
        let (mut model, plain) = (model.valid(), logits(&base::<Flex>(name, DType::F32)));
        let with = logits(&model);
        if method.is_prompt() {
            assert!(adapter::merge(&mut model, "learned").is_err(), "{what}");
        } else {
            adapter::safe_merge(&mut model, "learned").unwrap();
            let once = logits(&model);
            adapter::merge(&mut model, "learned").unwrap();
            assert_eq!(logits(&model), once, "{what}: merging twice");
            assert!(max_diff(&once, &with) < 1e-4, "{what}: merged");
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

#[test]
fn an_adapter_that_is_off_does_not_learn() {
    let _lock = one_backward_at_a_time();
    for name in MODELS {
        for (what, method) in methods().into_iter().filter(|(_, method)| !method.changes_base()) {
            let mut model = base::<Train>(name, DType::F32);
            for (adapter, part) in [("off", &method), ("other", &lora(|_| {})), ("on", &method)] {
                part.attach(&mut model, adapter);
            }
            adapter::activate(&mut model, &["on"]).unwrap();
            let before = values(&model, true);
            let model = trained(model);
            let (mut still, mut moved) = (0, 0);
            for ((path, after), (_, before)) in values(&model, true).into_iter().zip(before) {
                if after == before {
                    still += 1
                } else {
                    moved += 1
                }
                let idle = path.contains("prompts.0.") || path.contains("ia3.0.");
                assert!(!idle || after == before, "{what} on {name}: {path}");
            }
            assert!(moved > 0 && still >= moved, "{what} on {name}: {moved} moved, {still} did not");
            assert_eq!(param::count_trainable::<Train, _>(&model), trained_values(&model, "on"), "{what} on {name}");
        }
    }
}

/// The number of values of the named adapter.
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
        method.save(&model, "learned", &out);
        let expected = logits(&model.valid());
        let mut half = base::<Flex>(name, DType::BF16);
        method.load(&mut half, "learned", &out);
        let difference = max_diff(&logits(&half), &expected);
        assert!(difference < 0.05 * max_abs(&expected), "{what}: {difference}");
        if let Some(prompt) = half.prompts.first() {
            assert_eq!(prompt.encoder.embedding.val().dtype(), DType::F32, "{what}");
        }
    });
}

#[test]
fn what_is_generated_is_what_the_logits_say() {
    let settings = Settings { max_new_tokens: 6, ..Settings::default() };
    for_every(|what, _, _, model| {
        let model = model.valid();
        let prompt: Vec<u32> = vec![4, 9, 2, 33];
        let said = Generate::new(&model, std::slice::from_ref(&prompt), &settings).unwrap().finish().unwrap();
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
