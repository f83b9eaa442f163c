//! The fine-tuning method of a recipe, applied to the whole model or to a part of it.

use super::freeze::freeze;
use crate::{
    method_adapter::{self, ADAPTER_NAME, AttachedAdapter},
    recipe::{MethodKind, Recipe},
};
use anyhow::{Result, bail};
use burn_llama::{Llama, Tokenizer, kernel::Kernels};
use burn_peft::Loaded;
use std::path::Path;

/// A model with the fine-tuning method applied; everything else is frozen.
pub(crate) struct FittedModel<B: Kernels> {
    pub model: Llama<B>,
    /// The adapter; none if only the model's own weights are trained.
    pub adapter: Option<AttachedAdapter>,
    /// Warnings about an adapter that the recipe starts from.
    warnings: Vec<String>,
}

impl<B: Kernels> FittedModel<B> {
    /// Prints the warnings.
    fn reported(self) -> Self {
        self.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
        self
    }
}

/// Applies the fine-tuning method to the model and freezes the rest, with warnings for the user.
pub(crate) fn apply_method<B: Kernels>(
    model: Llama<B>,
    tokenizer: &Tokenizer,
    recipe: &Recipe,
) -> Result<FittedModel<B>> {
    Ok(fit(model, tokenizer, recipe)?.reported())
}

/// Applies the fine-tuning method to a model, or to the part of it that is held.
pub(super) fn fit<B: Kernels>(mut model: Llama<B>, tokenizer: &Tokenizer, recipe: &Recipe) -> Result<FittedModel<B>> {
    let (choice, warnings) = (&recipe.method.common, Vec::new());
    match choice.kind {
        MethodKind::Full => return Ok(FittedModel { model, adapter: None, warnings }),
        MethodKind::Freeze => {
            let model = freeze(model, &choice.layers.clone().unwrap_or_default())?;
            return Ok(FittedModel { model, adapter: None, warnings });
        }
        _ => {}
    }
    let (adapter, warnings) = match choice.init.as_deref().map(Path::new).filter(|init| !init.is_file()) {
        Some(directory) => load_init(&mut model, tokenizer, recipe, directory)?,
        None => (method_adapter::attach(&mut model, tokenizer, recipe)?, warnings),
    };
    Ok(FittedModel { model: burn_peft::adapter::train_active(model)?, adapter: Some(adapter), warnings })
}

/// Loads the adapter of `method.init`; also returns warnings.
fn load_init<B: Kernels>(
    model: &mut Llama<B>,
    tokenizer: &Tokenizer,
    recipe: &Recipe,
    directory: &Path,
) -> Result<(AttachedAdapter, Vec<String>)> {
    let (kind, rows, at) = (recipe.method.common.kind, model.config().vocab_size, directory.display());
    let Loaded { value: adapter, unknown_fields } = method_adapter::read(model, ADAPTER_NAME, directory)?;
    let mut warnings = Vec::new();
    if !unknown_fields.is_empty() {
        warnings.push(format!("{at}: unknown fields are ignored: {}", unknown_fields.join(", ")));
    }
    if model.config().vocab_size != rows {
        warnings.push(format!(
            "`method.init`: {at}: the adapter brings an embedding with {} rows, the model has {rows}; the data is encoded \
             with the model's tokenizer",
            model.config().vocab_size
        ));
    }
    let fits = match &adapter {
        AttachedAdapter::Lora(config, _) if config.use_dora => kind == MethodKind::Dora,
        AttachedAdapter::Lora(..) => matches!(kind, MethodKind::Lora | MethodKind::QLora),
        AttachedAdapter::Ia3 => kind == MethodKind::Ia3,
        AttachedAdapter::Prompt => kind.is_prompt(),
    };
    if !fits {
        bail!("`method.init`: {at}: expected an adapter of `method.kind`, found another kind");
    }
    let known = tokenizer.vocab_size();
    if let Some(last) = adapter.last_token().filter(|&last| last as usize >= known) {
        bail!(
            "`method.init`: {at}: the adapter has rows for tokens up to {last}, but the tokenizer has {known}: name the \
             tokens that were added for it, in their order, in `method.new_tokens`"
        );
    }
    Ok((adapter, warnings))
}
