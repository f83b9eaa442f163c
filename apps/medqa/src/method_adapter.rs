//! Adapters of every fine-tuning method: attaching a new one to a model, loading and saving.

use crate::{
    identify,
    recipe::{MethodKind, Recipe, TargetModules as Targets, VirtualTokens},
};
use anyhow::{Context, Result};
use burn_llama::{Llama, Tokenizer, kernel::Kernels};
use burn_peft::{
    AdapterModel, Ia3Config, Loaded, LoraConfig, PromptConfig, TargetModules, adapter, config::TokenIndices, format,
    prompt,
};
use std::path::Path;
use tempfile::TempDir;

/// Name of the adapter that a run trains, PEFT's default.
pub(crate) const ADAPTER_NAME: &str = "default";

/// The adapter on a model, with its configuration.
pub(crate) enum AttachedAdapter {
    /// LoRA or one of its variants. If its initialization changed the base weights (as PiSSA does), the temporary
    /// directory holds the adapter as it was initialized.
    Lora(Box<LoraConfig>, Option<TempDir>),
    /// IA3: learned factors that scale activations.
    Ia3,
    /// Virtual tokens; the model holds them together with their configuration.
    Prompt,
}

/// Loads an adapter onto the model, under the given name: from PEFT's directory, a run directory or a checkpoint.
///
/// # Errors
/// If the adapter cannot be read, has an unsupported PEFT type, or does not fit the model.
pub(crate) fn load<B: Kernels>(model: &mut Llama<B>, name: &str, path: &Path) -> Result<AttachedAdapter> {
    let Loaded { value, unknown_fields } = read(model, name, path)?;
    warn_unknown_fields(&identify::adapter_directory(path)?, &unknown_fields);
    Ok(value)
}

/// Loads an adapter as [`load`] does, without a warning of unknown fields.
pub(crate) fn read<B: Kernels>(model: &mut Llama<B>, name: &str, path: &Path) -> Result<Loaded<AttachedAdapter>> {
    let directory = &identify::adapter_directory(path)?;
    let json = format::read_config(directory)?;
    if PromptConfig::is_prompt(&json) {
        let Loaded { value: prompt, unknown_fields } =
            prompt::Prompt::load(directory, model.config().base_shape(), &model.device())?;
        burn_peft::adapter::check_new_adapter(model, name, false)?;
        model.add_prompt(prompt.named(name));
        return Ok(Loaded { value: AttachedAdapter::Prompt, unknown_fields });
    }
    if json["peft_type"] == "IA3" {
        let unknown_fields = adapter::load_ia3(model, name, directory)?.unknown_fields;
        return Ok(Loaded { value: AttachedAdapter::Ia3, unknown_fields });
    }
    let Loaded { value: config, unknown_fields } = adapter::load(model, name, directory)?;
    Ok(Loaded { value: AttachedAdapter::Lora(Box::new(config), None), unknown_fields })
}

/// Warns of fields in an adapter's configuration that are unknown here and have no effect.
pub(crate) fn warn_unknown_fields(directory: &Path, unknown: &[String]) {
    if !unknown.is_empty() {
        eprintln!("warning: {}: unknown fields are ignored: {}", directory.display(), unknown.join(", "));
    }
}

/// Attaches a new adapter to the model, as the recipe says.
pub(crate) fn attach<B: Kernels>(
    model: &mut Llama<B>,
    tokenizer: &Tokenizer,
    recipe: &Recipe,
) -> Result<AttachedAdapter> {
    let (method, seed) = (&recipe.method, recipe.train.steps.seed);
    match method.common.kind {
        MethodKind::Ia3 => {
            adapter::attach_ia3(model, ADAPTER_NAME, &ia3_config(recipe))?;
            Ok(AttachedAdapter::Ia3)
        }
        kind if kind.is_prompt() => {
            let text = method.virtual_tokens.init_text.as_ref().map(|text| tokenizer.encode(text, true)).transpose()?;
            let mut prompt = model.new_prompt(&prompt_config(recipe, tokenizer), text.as_deref(), seed)?;
            if let Some(file) = &method.common.init {
                prompt.read_encoder(Path::new(file))?;
            }
            model.prompts.push(prompt);
            Ok(AttachedAdapter::Prompt)
        }
        _ => {
            let mut config = lora_config(recipe);
            if !method.targets.new_tokens.is_empty() {
                let ids = method.targets.new_tokens.iter().filter_map(|token| tokenizer.token_to_id(token));
                config.trainable_token_indices = Some(TokenIndices::Embedding(ids.collect()));
            }
            adapter::attach(model, ADAPTER_NAME, &config, seed)?;
            adapter::init_tokens_by_mean(model, ADAPTER_NAME);
            let mut initial = None;
            if config.init_lora_weights.mutates_base_weights() {
                let folder = tempfile::tempdir().context("the initial adapter's folder cannot be created")?;
                model.save_adapter(ADAPTER_NAME, folder.path())?;
                initial = Some(folder);
            }
            Ok(AttachedAdapter::Lora(Box::new(config), initial))
        }
    }
}

impl AttachedAdapter {
    /// Returns true if the adapter has rows for single tokens, which only its own tokenizer may know.
    pub(crate) fn has_tokens(&self) -> bool {
        self.last_token().is_some()
    }

    /// Returns the last of the tokens for which the adapter has rows of their own.
    pub(crate) fn last_token(&self) -> Option<u32> {
        let Self::Lora(config, _) = self else { return None };
        match config.trainable_token_indices.as_ref()? {
            TokenIndices::Embedding(indices) => indices.iter().max().copied(),
            TokenIndices::ByModule(modules) => modules.values().flatten().max().copied(),
        }
    }

    /// Saves the adapter as PEFT's directory. If its initialization changed the base weights, it is converted to plain
    /// LoRA on the original weights.
    pub(crate) fn save<B: Kernels>(&self, model: &Llama<B>, directory: &Path) -> Result<()> {
        match (self, model.prompts.iter().find(|prompt| prompt.name == ADAPTER_NAME)) {
            (Self::Lora(_, None) | Self::Ia3, _) => model.save_adapter(ADAPTER_NAME, directory)?,
            (Self::Lora(_, Some(start)), _) => {
                adapter::save_mutated_as_lora(model, ADAPTER_NAME, start.path(), directory)?;
            }
            (Self::Prompt, Some(prompt)) => prompt.save(directory)?,
            (Self::Prompt, None) => {}
        }
        Ok(())
    }
}

fn to_target_modules(targets: &Targets) -> TargetModules {
    match targets {
        Targets::Names(names) => TargetModules::Suffixes(names.clone()),
        Targets::Pattern(pattern) => TargetModules::Pattern(pattern.clone()),
    }
}

/// Returns PEFT's LoRA configuration for a recipe.
pub(crate) fn lora_config(recipe: &Recipe) -> LoraConfig {
    let (lora, scope, choice) = (&recipe.method.lora, &recipe.method.targets, &recipe.method.common);
    let adalora = (choice.kind == MethodKind::AdaLora).then_some(&recipe.method.adalora);
    // Only the trainer knows the number of steps of a run in epochs, see `setup::with_max_steps`.
    let steps = recipe.train.steps.max_steps.unwrap_or(usize::MAX);
    LoraConfig {
        r: adalora.map_or(lora.r, |adalora| adalora.init_r),
        lora_alpha: lora.alpha,
        lora_dropout: choice.dropout,
        use_rslora: lora.use_rslora,
        target_modules: scope.target_modules.as_ref().map(to_target_modules).unwrap_or_default(),
        exclude_modules: scope.exclude_modules.as_ref().map(to_target_modules),
        layers_to_transform: scope.layers_to_transform.clone(),
        layers_pattern: scope.layers_pattern.clone(),
        rank_pattern: lora.rank_pattern.clone(),
        alpha_pattern: lora.alpha_pattern.clone(),
        use_dora: choice.kind == MethodKind::Dora,
        init_lora_weights: lora.init_lora_weights.clone(),
        bias: scope.bias,
        modules_to_save: scope.modules_to_save.clone(),
        trainable_token_indices: None,
        ensure_weight_tying: false,
        save_embedding_layers: false,
        adalora: adalora.map(|adalora| adalora.schedule(steps)),
        base_model_name_or_path: Some(recipe.model.path.clone()),
    }
}

fn ia3_config(recipe: &Recipe) -> Ia3Config {
    let scope = &recipe.method.targets;
    let mut config = Ia3Config {
        exclude_modules: scope.exclude_modules.as_ref().map(to_target_modules),
        base_model_name_or_path: Some(recipe.model.path.clone()),
        ..Ia3Config::default()
    };
    if let Some(chosen) = &scope.target_modules {
        config.target_modules = to_target_modules(chosen);
    }
    if let Some(chosen) = &scope.feedforward_modules {
        config.feedforward_modules = to_target_modules(chosen);
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
    } = recipe.method.virtual_tokens.clone();
    let method = match recipe.method.common.kind {
        MethodKind::Prompt => prompt::PromptMethod::Prompt {
            prompt_tuning_init: match (&init_text, init_from_vocabulary) {
                (Some(_), _) => prompt::PromptTuningInit::Text,
                (None, true) => prompt::PromptTuningInit::SampleVocab,
                (None, false) => prompt::PromptTuningInit::Random,
            },
            tokenizer_name_or_path: init_text.as_ref().map(|_| tokenizer.path().display().to_string()),
            prompt_tuning_init_text: init_text,
        },
        MethodKind::PTuning => prompt::PromptMethod::PTuning { encoder_hidden_size },
        _ => prompt::PromptMethod::Prefix {
            prefix_projection,
            encoder_hidden_size,
            init_weights,
            dropout: recipe.method.common.dropout,
        },
    };
    PromptConfig { num_virtual_tokens, method, base_model_name_or_path: Some(recipe.model.path.clone()) }
}
