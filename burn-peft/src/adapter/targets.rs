//! The layers that a configuration selects.

use super::{
    embedding::EmbeddingTarget,
    linears::{Linears, select_layers},
};
use crate::{Error, LoraConfig, config::Selection};
use burn_peft_kernels::LinearKernels;

/// Returns the paths of the linear layers that `config` selects; none if it selects the embedding alone.
///
/// # Errors
/// If nothing is selected, or the configuration is invalid.
pub fn targeted_module_names<B: LinearKernels, M: Linears<B>>(
    model: &M,
    config: &LoraConfig,
) -> Result<Vec<String>, Error> {
    config.check()?;
    let selection = Selection::new(config)?;
    let selected = match select_layers(model, &config.target_modules, |path| selection.selects(path)) {
        Err(Error::NoTarget { .. }) if EmbeddingTarget::new(model, config)?.is_some() => Vec::new(),
        selected => selected?,
    };
    Ok(selected.into_iter().map(|layer| layer.path).collect())
}
