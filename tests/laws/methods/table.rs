//! The fine-tuning methods, one per row.

use super::PACKED;
use burn_llama::{Llama, kernel::Kernels};
use burn_peft::{
    Ia3Config, LoraConfig, Prompt, PromptConfig, TargetModules, adapter,
    config::{Bias, InitLoraWeights, OneOrMany},
    prompt::{PromptMethod, PromptTuningInit},
};
use serde_json::{Map, Value, json};
use std::path::Path;

/// A method with its configuration.
pub enum Method {
    Lora(Box<LoraConfig>),
    Ia3,
    Prompt(PromptConfig),
    /// A prompt method initialized from a text.
    From(PromptConfig),
}

pub fn lora(change: impl FnOnce(&mut LoraConfig)) -> Method {
    let mut config = LoraConfig { r: 4, lora_alpha: 6.0, ..LoraConfig::default() };
    change(&mut config);
    Method::Lora(Box::new(config))
}

fn prefix(prefix_projection: bool, init_weights: Option<&str>, dropout: f64) -> PromptConfig {
    let (encoder_hidden_size, init_weights) = (prefix_projection.then_some(7), init_weights.map(str::to_owned));
    let method = PromptMethod::Prefix { prefix_projection, encoder_hidden_size, init_weights, dropout };
    PromptConfig { method, ..PromptConfig::prefix(3) }
}

fn prompt(prompt_tuning_init: PromptTuningInit) -> PromptConfig {
    let text = (prompt_tuning_init == PromptTuningInit::Text).then(|| "a text".to_owned());
    let method = PromptMethod::Prompt {
        prompt_tuning_init,
        prompt_tuning_init_text: text.clone(),
        tokenizer_name_or_path: text,
    };
    PromptConfig { method, ..PromptConfig::prompt(3) }
}

/// The tokens of the text from which a prompt is initialized.
const TEXT: [u32; 4] = [9, 4, 7, 5];

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn all_linear() -> TargetModules {
    TargetModules::Pattern("all-linear".into())
}

fn map(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn low_rank() -> Vec<(&'static str, Method)> {
    let start = |init: InitLoraWeights| lora(|config| config.init_lora_weights = init);
    vec![
        ("lora", lora(|_| {})),
        (
            "rslora on all",
            lora(|config| {
                config.use_rslora = true;
                config.target_modules = all_linear();
            }),
        ),
        ("gaussian", start(InitLoraWeights::Gaussian)),
        ("false", start(InitLoraWeights::False)),
        ("orthogonal", start(InitLoraWeights::Orthogonal)),
        ("pissa", start(InitLoraWeights::Pissa { niter: None })),
        ("olora", start(InitLoraWeights::Olora)),
        (
            "patterns",
            lora(|config| {
                config.rank_pattern = map(json!({ "v_proj": 2 }));
                config.alpha_pattern = map(json!({ r"layers\.0\..*": 3.0 }));
            }),
        ),
        ("one block", lora(|config| config.layers_to_transform = Some(OneOrMany::One(0)))),
        (
            "all but",
            lora(|config| {
                config.target_modules = all_linear();
                config.exclude_modules = Some(TargetModules::Suffixes(names(&["q_proj", "down_proj"])));
            }),
        ),
        ("bias", lora(|config| config.bias = Bias::All)),
        ("whole modules", lora(|config| config.modules_to_save = Some(names(&["lm_head", "embed_tokens"])))),
        (
            "head",
            lora(|config| {
                config.target_modules = TargetModules::Suffixes(names(&["lm_head"]));
                config.lora_dropout = 0.1;
            }),
        ),
        ("dropout", lora(|config| config.lora_dropout = 0.2)),
        ("dora", lora(|config| config.use_dora = true)),
        (
            "dora with dropout",
            lora(|config| {
                config.use_dora = true;
                config.lora_dropout = 0.2;
            }),
        ),
    ]
}

pub fn methods() -> Vec<(&'static str, Method)> {
    let mut all = low_rank();
    all.extend([
        ("ia3", Method::Ia3),
        ("prefix", Method::Prompt(PromptConfig::prefix(3))),
        ("prefix with MLP", Method::Prompt(prefix(true, None, 0.0))),
        ("prefix of zeros", Method::Prompt(prefix(false, Some("zero"), 0.0))),
        ("prefix with dropout", Method::Prompt(prefix(false, None, 0.2))),
        ("prefix from text", Method::From(PromptConfig::prefix(3))),
        ("prompt", Method::Prompt(PromptConfig::prompt(3))),
        ("prompt from text", Method::From(prompt(PromptTuningInit::Text))),
        ("prompt from the vocabulary", Method::Prompt(prompt(PromptTuningInit::SampleVocab))),
        ("p-tuning", Method::Prompt(PromptConfig::p_tuning(3))),
    ]);
    all
}

impl Method {
    pub fn attach<B: Kernels>(&self, model: &mut Llama<B>, name: &str) {
        match self {
            Self::Lora(config) => adapter::attach(model, name, config, 7).unwrap(),
            Self::Ia3 => adapter::attach_ia3(model, name, &Ia3Config::default()).unwrap(),
            Self::Prompt(config) | Self::From(config) => {
                let text = matches!(self, Self::From(_)).then_some(&TEXT[..]);
                let prompt = model.new_prompt(config, text, 7).unwrap().named(name);
                model.prompts.push(prompt);
            }
        }
    }

    pub fn load<B: Kernels>(&self, model: &mut Llama<B>, name: &str, from: &Path) {
        match self {
            Self::Lora(_) => drop(adapter::load(model, name, from).unwrap()),
            Self::Ia3 => drop(adapter::load_ia3(model, name, from).unwrap()),
            Self::Prompt(_) | Self::From(_) => {
                let read = Prompt::load(from, model.config().base_shape(), &model.device()).unwrap();
                model.prompts.push(read.value.named(name));
            }
        }
    }

    pub fn is_prompt(&self) -> bool {
        matches!(self, Self::Prompt(_) | Self::From(_))
    }

    pub fn config(&self) -> Option<&LoraConfig> {
        match self {
            Self::Lora(config) => Some(config),
            _ => None,
        }
    }

    pub fn changes_base(&self) -> bool {
        self.config().is_some_and(LoraConfig::changes_base)
    }

    /// Returns whether a new adapter leaves the model's outputs unchanged.
    pub fn starts_as_nothing(&self) -> bool {
        !self.is_prompt() && self.config().is_none_or(|config| config.init_lora_weights != InitLoraWeights::False)
    }

    /// Returns whether the method is possible on that model: packed weights can be neither changed nor trained.
    pub fn fits(&self, model: &str) -> bool {
        let writes =
            |config: &LoraConfig| config.init_lora_weights.mutates_base_weights() || config.modules_to_save.is_some();
        model != PACKED || !self.config().is_some_and(writes)
    }
}
