//! The linear layers and prompts of a model, which is all that adapters need to know about it.

use crate::{Embedding, Error, Linear, Prompt, TargetModules, param::last_segment};
use burn_peft_kernels::LinearKernels;
use std::collections::BTreeSet;

/// A model that exposes its linear layers, each with its path in the checkpoint.
pub trait Linears<B: LinearKernels> {
    /// Calls `visit` with every linear layer and its path, such as `model.layers.0.self_attn.q_proj`.
    fn linears(&self, visit: &mut dyn FnMut(&str, &Linear<B>));

    /// Calls `visit` with every linear layer and its path, for modification.
    fn linears_mut(&mut self, visit: &mut dyn FnMut(&str, &mut Linear<B>));

    /// Returns the token embedding and its path; `None` if no adapter can act on it.
    fn embedding(&self) -> Option<(&str, &Embedding<B>)> {
        None
    }

    /// Returns the token embedding and its path, for modification.
    fn embedding_mut(&mut self) -> Option<(&str, &mut Embedding<B>)> {
        None
    }

    /// Gives the embedding and the output head the given number of rows, as the method of that name in `transformers`
    /// does: cuts off the last ones, or adds rows with the mean of the others. Does nothing by default.
    fn resize_token_embeddings(&mut self, _rows: usize) {}

    /// Returns the whole shape of the base model's parameter at `path` if another rank holds it, and this model has a
    /// placeholder of one element; `None` if this model holds it.
    fn shape_elsewhere(&self, _path: &str) -> Option<Vec<usize>> {
        None
    }

    /// Returns the model's prompts; empty if it has none or does not support them.
    fn prompts(&self) -> &[Prompt<B>] {
        &[]
    }

    /// Returns the model's prompts for modification; `None` if the model does not support prompts.
    fn prompts_mut(&mut self) -> Option<&mut Vec<Prompt<B>>> {
        None
    }

    /// Returns the paths of the embedding and of the output head if they share one weight.
    fn tied(&self) -> Option<[&str; 2]> {
        None
    }

    /// Gives a tied head its own copy of the weight, so that head and embedding can change independently; PEFT trains a
    /// copy as well.
    fn untie(&mut self) {}
}

/// The path of a linear layer and the shape `[out, in]` of its weight.
pub(super) struct SelectedLayer {
    pub path: String,
    pub shape: [usize; 2],
}

/// Returns the layers that `selects` accepts, or an error that names `target`, the configured `target_modules`, if
/// there are none.
pub(super) fn select_layers<B: LinearKernels, M: Linears<B>>(
    model: &M,
    target: &TargetModules,
    selects: impl Fn(&str) -> bool,
) -> Result<Vec<SelectedLayer>, Error> {
    let (mut selected, mut names) = (Vec::new(), BTreeSet::new());
    model.linears(&mut |path, linear| {
        if selects(path) {
            selected.push(SelectedLayer { path: path.to_owned(), shape: linear.shape() });
        }
        names.insert(last_segment(path).to_owned());
    });
    if selected.is_empty() {
        let available = names.into_iter().collect::<Vec<_>>().join(", ");
        return Err(Error::NoTarget { target: target.to_string(), available });
    }
    Ok(selected)
}

/// Runs `check` on every linear layer and returns the first error.
pub(super) fn check_layers<B: LinearKernels, M: Linears<B>>(
    model: &M,
    check: impl Fn(&str, &Linear<B>) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut result = Ok(());
    model.linears(&mut |path, linear| {
        if result.is_ok() {
            result = check(path, linear);
        }
    });
    result
}
