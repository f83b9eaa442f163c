//! Training of some blocks only, as LLaMA-Factory's `freeze`.

use crate::recipe::TrainableLayers;
use anyhow::{Result, bail};
use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Tensor, backend::Backend},
};
use burn_llama::{Llama, kernel::Kernels};
use burn_peft::param;
use std::ops::Range;

/// Makes the chosen blocks trainable, norms and biases included, and stores their weights as f32; everything else is
/// frozen. A count of more blocks than the model has means all of them, as in LLaMA-Factory.
///
/// # Errors
/// If an extra module is not one of the model's.
pub(super) fn freeze<B: Kernels>(model: Llama<B>, layers: &TrainableLayers) -> Result<Llama<B>> {
    let paths: Vec<String> = param::named_parameters::<B, _>(&model).into_iter().map(|param| param.path).collect();
    let extras: Vec<&str> = paths.iter().filter_map(|path| module_outside_blocks(path)).collect();
    if let Some(unknown) = layers.extra_modules.iter().find(|name| !extras.contains(&name.as_str())) {
        bail!("`method.layers`: expected extra_modules among {}, found {unknown:?}", extras.join(", "));
    }
    let learning = trainable_blocks(layers.count, model.config().num_hidden_layers);
    let is_selected = |path: &str| match (block_index(path), module_outside_blocks(path)) {
        (Some(block), _) => learning.contains(&block),
        (None, Some(module)) => layers.extra_modules.iter().any(|name| name == module),
        (None, None) => false,
    };
    let model = model.map(&mut CastToF32 { path: Vec::new(), is_selected });
    Ok(param::train_only(model, is_selected))
}

/// Returns the trainable blocks: the last `count`, or the first `-count`.
fn trainable_blocks(count: i64, all: usize) -> Range<usize> {
    let number = usize::try_from(count.unsigned_abs()).unwrap_or(usize::MAX).min(all);
    if count > 0 { all - number..all } else { 0..number }
}

/// Returns the index of the block that a parameter belongs to.
fn block_index(path: &str) -> Option<usize> {
    path.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

/// Returns the module of a parameter outside the blocks: `embed_tokens`, `norm` or `lm_head`.
fn module_outside_blocks(path: &str) -> Option<&str> {
    if block_index(path).is_some() { None } else { path.rsplit('.').nth(1) }
}

/// Casts the chosen parameters to f32, the type that weights are trained in.
struct CastToF32<F> {
    path: Vec<String>,
    is_selected: F,
}

impl<B: Backend, F: Fn(&str) -> bool> ModuleMapper<B> for CastToF32<F> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if !(self.is_selected)(&self.path.join(".")) {
            return param;
        }
        param.map(|tensor| tensor.cast(DType::F32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_or_the_first_blocks_learn() {
        for (count, expected) in [(2, 28..30), (-2, 0..2), (1, 29..30), (99, 0..30), (i64::MIN, 0..30)] {
            assert_eq!(trainable_blocks(count, 30), expected, "{count}");
        }
    }

    #[test]
    fn a_path_is_in_a_block_or_in_a_module_beside_them() {
        assert_eq!(block_index("model.layers.12.self_attn.q_proj.weight"), Some(12));
        assert_eq!(module_outside_blocks("model.layers.12.input_layernorm.weight"), None);
        for (path, module) in [
            ("model.embed_tokens.weight", "embed_tokens"),
            ("model.norm.weight", "norm"),
            ("lm_head.weight", "lm_head"),
        ] {
            assert_eq!((block_index(path), module_outside_blocks(path)), (None, Some(module)));
        }
    }
}
