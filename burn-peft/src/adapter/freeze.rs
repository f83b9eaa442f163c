//! Freezing a model except for its adapters.

use super::{
    base::{TrainableBase, is_adapter},
    linears::Linears,
};
use crate::{Error, param};
use burn::module::Module;
use burn_peft_kernels::LinearKernels;
use std::sync::Arc;

/// Makes only the active adapters trainable, and the parameters of the base model that are trained along with one of
/// them (`bias`, `modules_to_save`). Every parameter becomes a leaf of the autodiff graph.
///
/// # Errors
/// If the configuration of an active adapter does not fit the model.
pub fn train_active<B: LinearKernels, M: Linears<B> + Module<B>>(model: M) -> Result<M, Error> {
    // An adapter that changes the base model is the only one of the model.
    let mut changes = None;
    model.linears(&mut |_, linear| {
        let mut active = linear.adapters.iter().filter(|adapter| adapter.active);
        changes = changes.take().or_else(|| Some(active.find(|lora| lora.config.changes_base())?.config.clone()));
    });
    let mut on_embedding = model.embedding().into_iter().flat_map(|(_, embedding)| &embedding.adapters);
    let changes = changes.or_else(|| {
        let active = on_embedding.find(|adapter| adapter.active && adapter.config.changes_base())?;
        Some(Arc::clone(&active.config))
    });
    let base = changes.map(|config| TrainableBase::new(&model, &config)).transpose()?;
    let idle = InactiveAdapters::new(&model);
    Ok(param::train_only(model, |path| {
        (is_adapter(path) && !idle.contains(path)) || base.as_ref().is_some_and(|base| base.is_trained(path))
    }))
}

/// The path prefixes of the parameters of inactive adapters.
struct InactiveAdapters(Vec<String>);

impl InactiveAdapters {
    fn new<B: LinearKernels, M: Linears<B>>(model: &M) -> Self {
        let mut idle = Vec::new();
        model.linears(&mut |path, linear| {
            let low_rank = linear.adapters.iter().map(|adapter| adapter.active).enumerate();
            let factors = linear.ia3.iter().map(|ia3| ia3.active).enumerate();
            let off =
                |(index, active): (usize, bool), field: &str| (!active).then(|| format!("{path}.{field}.{index}."));
            idle.extend(low_rank.filter_map(|at| off(at, "adapters")));
            idle.extend(factors.filter_map(|at| off(at, "ia3")));
        });
        if let Some((path, embedding)) = model.embedding() {
            let inactive = embedding.adapters.iter().enumerate().filter(|(_, adapter)| !adapter.active);
            idle.extend(inactive.map(|(index, _)| format!("{path}.adapters.{index}.")));
        }
        let first = model.prompts().iter().position(|prompt| prompt.active);
        let others = (0..model.prompts().len()).filter(|&index| Some(index) != first);
        idle.extend(others.map(|index| format!("prompts.{index}.")));
        Self(idle)
    }

    fn contains(&self, path: &str) -> bool {
        self.0.iter().any(|start| path.starts_with(start))
    }
}
