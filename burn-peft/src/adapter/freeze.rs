//! Freezing a model except for its adapters.

use super::{
    base::{TrainableBase, is_adapter},
    linears::Linears,
};
use crate::{Error, LoraConfig, kernel::LinearKernels, param};
use burn::module::Module;

/// Makes only the active adapters trainable, and the parameters of the base model that `config` trains along with them.
/// Every parameter becomes a leaf of the autodiff graph.
///
/// # Errors
/// If the configuration selects nothing.
pub fn train_only<B: LinearKernels, M: Linears<B> + Module<B>>(model: M, config: &LoraConfig) -> Result<M, Error> {
    let (base, idle) = (TrainableBase::new(&model, config)?, InactiveAdapters::new(&model));
    Ok(param::train_only(model, |path| (is_adapter(path) && !idle.contains(path)) || base.is_trained(path)))
}

/// Makes only the active adapters trainable. Every parameter becomes a leaf of the autodiff graph.
pub fn train_active<B: LinearKernels, M: Linears<B> + Module<B>>(model: M) -> M {
    let idle = InactiveAdapters::new(&model);
    param::train_only(model, |path| is_adapter(path) && !idle.contains(path))
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
        let first = model.prompts().iter().position(|prompt| prompt.active);
        let others = (0..model.prompts().len()).filter(|&index| Some(index) != first);
        idle.extend(others.map(|index| format!("prompts.{index}.")));
        Self(idle)
    }

    fn contains(&self, path: &str) -> bool {
        self.0.iter().any(|start| path.starts_with(start))
    }
}
