//! What a method puts on a model, of whatever kind: read, made, written.

use crate::{
    model,
    recipe::{MethodKind, Recipe, TargetModules as Targets, VirtualTokens},
};
use anyhow::{Context, Result};
use burn_llama::{Llama, Tokenizer, kernel::Kernels};
use burn_peft::{Ia3Config, LoraConfig, PromptConfig, TargetModules, adapter, format, ia3, prompt};
use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    str::FromStr,
};
use tempfile::TempDir;

/// The adapter's name on the model that is trained, as PEFT has it.
pub const NAME: &str = "default";

/// An adapter directory as the user names it: `[NAME=]DIR`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// What it is called.
    pub name: String,
    /// Where it is.
    pub directory: PathBuf,
}

impl From<PathBuf> for Source {
    /// Called as its folder is; as that one's folder for the `adapter` of a run.
    fn from(directory: PathBuf) -> Self {
        let part = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
        let own = part(&directory).filter(|name| name != "adapter");
        let name = own.or_else(|| directory.parent().and_then(part)).unwrap_or_else(|| NAME.to_owned());
        Self { name, directory }
    }
}

impl FromStr for Source {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text.split_once('=') {
            Some((name, directory)) if !name.is_empty() && !name.contains('/') && !Path::new(text).exists() => {
                Self { name: name.to_owned(), directory: directory.into() }
            }
            _ => PathBuf::from(text).into(),
        })
    }
}

/// An adapter directory and its weight: `DIR=WEIGHT`.
#[derive(Debug, Clone, PartialEq)]
pub struct Weighted {
    /// Where it is.
    pub directory: PathBuf,
    /// What it is multiplied by.
    pub weight: f64,
}

impl FromStr for Weighted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.rsplit_once('=').and_then(|(directory, weight)| Some((directory, weight.parse().ok()?)));
        match parts.filter(|(_, weight): &(_, f64)| weight.is_finite()) {
            Some((directory, weight)) => Ok(Self { directory: directory.into(), weight }),
            None => Err("expected DIR=WEIGHT with a finite number, such as runs/a/adapter=0.7".to_owned()),
        }
    }
}

/// What is on a model.
pub enum Adapter {
    /// LoRA and its family; where it started by changing the weights, the folder of what it started as.
    Lora(Box<LoraConfig>, Option<TempDir>),
    /// Factors.
    Ia3(Ia3Config),
    /// Virtual tokens, which the model holds with their configuration.
    Prompt,
}

/// Reads PEFT's directory of an adapter onto the model, under a name.
///
/// # Errors
/// If it cannot be read, is of a kind that is not known here, or was made for another model.
pub fn load<B: Kernels>(model: &mut Llama<B>, name: &str, directory: &Path) -> Result<Adapter> {
    let json = format::read_config(directory)?;
    if PromptConfig::is_prompt(&json) {
        let (prompt, unknown) = prompt::Prompt::load(directory, model.config().base_shape(), &model.device())?;
        model::warn_unknown(directory, &unknown);
        burn_peft::adapter::admit(model, name, false)?;
        model.prompts.push(prompt.named(name));
        return Ok(Adapter::Prompt);
    }
    if json["peft_type"] == "IA3" {
        let (config, unknown) = ia3::load(model, name, directory)?;
        model::warn_unknown(directory, &unknown);
        return Ok(Adapter::Ia3(config));
    }
    let (config, unknown) = adapter::load(model, name, directory)?;
    model::warn_unknown(directory, &unknown);
    Ok(Adapter::Lora(Box::new(config), None))
}

/// Puts a new adapter onto the model, as the recipe says.
pub fn attach<B: Kernels>(model: &mut Llama<B>, tokenizer: &Tokenizer, recipe: &Recipe) -> Result<Adapter> {
    let (method, seed) = (&recipe.method, recipe.train.steps.seed);
    match method.choice.kind {
        MethodKind::Ia3 => {
            let config = ia3_config(recipe);
            ia3::attach(model, NAME, &config)?;
            Ok(Adapter::Ia3(config))
        }
        kind if kind.is_prompt() => {
            let text = method.tokens.init_text.as_ref().map(|text| tokenizer.encode(text, true)).transpose()?;
            let mut prompt = model.new_prompt(&prompt_config(recipe, tokenizer), text.as_deref(), seed)?;
            if let Some(file) = &method.choice.init {
                prompt.read_encoder(Path::new(file))?;
            }
            model.prompts.push(prompt);
            Ok(Adapter::Prompt)
        }
        _ => {
            let config = lora_config(recipe);
            adapter::attach(model, NAME, &config, seed)?;
            let mut start = None;
            if config.init_lora_weights.splits_weight() {
                let folder = tempfile::tempdir().context("a folder for the adapter's start cannot be made")?;
                adapter::save(model, NAME, &config, folder.path())?;
                start = Some(folder);
            }
            Ok(Adapter::Lora(Box::new(config), start))
        }
    }
}

impl Adapter {
    /// Writes PEFT's directory. An adapter that started by changing the weights is written as plain LoRA of the unchanged ones.
    pub fn save<B: Kernels>(&self, model: &Llama<B>, directory: &Path) -> Result<()> {
        match (self, model.prompts.iter().find(|prompt| prompt.name == NAME)) {
            (Self::Lora(config, None), _) => adapter::save(model, NAME, config, directory)?,
            (Self::Lora(config, Some(start)), _) => {
                adapter::save_as_lora(model, NAME, config, (start.path(), directory))?;
            }
            (Self::Ia3(config), _) => ia3::save(model, NAME, config, directory)?,
            (Self::Prompt, Some(prompt)) => prompt.save(directory)?,
            (Self::Prompt, None) => {}
        }
        Ok(())
    }
}

fn targets(targets: &Targets) -> TargetModules {
    match targets {
        Targets::Names(names) => TargetModules::Suffixes(names.clone()),
        Targets::Pattern(pattern) => TargetModules::Pattern(pattern.clone()),
    }
}

/// LoRA's configuration, as the recipe says.
pub fn lora_config(recipe: &Recipe) -> LoraConfig {
    let (lora, scope, choice) = (&recipe.method.lora, &recipe.method.scope, &recipe.method.choice);
    LoraConfig {
        r: lora.r,
        lora_alpha: lora.alpha,
        lora_dropout: choice.dropout,
        use_rslora: lora.use_rslora,
        target_modules: scope.target_modules.as_ref().map(targets).unwrap_or_default(),
        exclude_modules: scope.exclude_modules.as_ref().map(targets),
        layers_to_transform: scope.layers_to_transform.clone(),
        layers_pattern: scope.layers_pattern.clone(),
        rank_pattern: lora.rank_pattern.clone(),
        alpha_pattern: lora.alpha_pattern.clone(),
        use_dora: choice.kind == MethodKind::Dora,
        init_lora_weights: lora.init_lora_weights.clone(),
        bias: scope.bias,
        modules_to_save: scope.modules_to_save.clone(),
        base_model_name_or_path: Some(recipe.model.path.clone()),
    }
}

fn ia3_config(recipe: &Recipe) -> Ia3Config {
    let scope = &recipe.method.scope;
    let mut config = Ia3Config {
        exclude_modules: scope.exclude_modules.as_ref().map(targets),
        base_model_name_or_path: Some(recipe.model.path.clone()),
        ..Ia3Config::default()
    };
    if let Some(chosen) = &scope.target_modules {
        config.target_modules = targets(chosen);
    }
    if let Some(chosen) = &scope.feedforward_modules {
        config.feedforward_modules = targets(chosen);
    }
    config
}

fn prompt_config(recipe: &Recipe, tokenizer: &Tokenizer) -> PromptConfig {
    let VirtualTokens {
        num_virtual_tokens,
        prefix_projection,
        encoder_hidden_size,
        init_weights,
        init_text,
        init_from_vocabulary,
    } = recipe.method.tokens.clone();
    let method = match recipe.method.choice.kind {
        MethodKind::Prompt => prompt::Method::Prompt {
            prompt_tuning_init: match (&init_text, init_from_vocabulary) {
                (Some(_), _) => prompt::PromptTuningInit::Text,
                (None, true) => prompt::PromptTuningInit::SampleVocab,
                (None, false) => prompt::PromptTuningInit::Random,
            },
            tokenizer_name_or_path: init_text.as_ref().map(|_| tokenizer.path().display().to_string()),
            prompt_tuning_init_text: init_text,
        },
        MethodKind::PTuning => prompt::Method::PTuning { encoder_hidden_size },
        _ => prompt::Method::Prefix {
            prefix_projection,
            encoder_hidden_size,
            init_weights,
            dropout: recipe.method.choice.dropout,
        },
    };
    PromptConfig { num_virtual_tokens, method, base_model_name_or_path: Some(recipe.model.path.clone()) }
}
