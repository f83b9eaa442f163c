//! The search for values that are not finite, once a result has shown that there are some.

use super::linears::Linears;
use crate::param::{self, ParamVisitor};
use burn::{
    module::{Module, Param},
    tensor::{DType, Tensor, backend::Backend},
};
use burn_peft_kernels::LinearKernels;

/// Names the first tensor of the model that holds NaN or an infinity, with its adapter if it belongs to one; `None` if
/// there is none. Packed weights are not searched. Every tensor is copied from its device, so this is for use after a
/// failure.
pub fn find_not_finite<B: LinearKernels, M: Linears<B> + Module<B>>(model: &M) -> Option<String> {
    search(model, Search { found: None, trained_only: false })
}

/// Names the first trained tensor of the model that holds NaN or an infinity, like [`find_not_finite`]. Frozen tensors
/// are not read, so this is for use before a result is saved.
pub fn find_trained_not_finite<B: LinearKernels, M: Linears<B> + Module<B>>(model: &M) -> Option<String> {
    search(model, Search { found: None, trained_only: true })
}

fn search<B: LinearKernels, M: Linears<B> + Module<B>>(model: &M, mut search: Search) -> Option<String> {
    param::visit_params(model, &mut search);
    search.found.map(|path| describe(model, &path))
}

/// Replaces the number of an adapter in the path of a parameter by the adapter's name.
fn describe<B: LinearKernels, M: Linears<B>>(model: &M, path: &str) -> String {
    let mut name = None;
    model.linears(&mut |layer, linear| {
        let Some(rest) = path.strip_prefix(layer).and_then(|rest| rest.strip_prefix('.')) else { return };
        let mut parts = rest.split('.');
        let (list, index) = (parts.next(), parts.next().and_then(|index| index.parse::<usize>().ok()));
        let adapter = match (list, index) {
            (Some("adapters"), Some(index)) => linear.adapters.get(index).map(|adapter| &adapter.name),
            (Some("ia3"), Some(index)) => linear.ia3.get(index).map(|ia3| &ia3.name),
            _ => None,
        };
        if let Some(adapter) = adapter {
            name = Some(format!("adapter `{adapter}`: {layer}.{}", parts.collect::<Vec<_>>().join(".")));
        }
    });
    let prompt = path.strip_prefix("prompts.").and_then(|rest| rest.split_once('.'));
    if let Some((index, rest)) = prompt
        && let Some(prompt) = index.parse::<usize>().ok().and_then(|index| model.prompts().get(index))
    {
        name = Some(format!("adapter `{}`: {rest}", prompt.name));
    }
    name.unwrap_or_else(|| path.to_owned())
}

/// A search for a value that is not finite.
struct Search {
    /// The path of the first parameter with such a value.
    found: Option<String>,
    trained_only: bool,
}

impl<B: Backend> ParamVisitor<B> for Search {
    fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<B, D>>) {
        if self.found.is_some() || self.trained_only && !param.is_require_grad() {
            return;
        }
        if !param.val().cast(DType::F32).into_data().iter::<f32>().all(f32::is_finite) {
            self.found = Some(path.to_owned());
        }
    }
}
