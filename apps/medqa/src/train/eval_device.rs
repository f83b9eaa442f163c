//! Validation on another device than the training device (`train.eval_device`), with any backend.

use super::method::apply_method;
use crate::{
    backend::with_backend,
    eval::{EvalBatching, TotalLoss, total_loss},
    model,
    recipe::{Recipe, WeightDtype},
};
use anyhow::Result;
use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{DType, Tensor, TensorData, backend::Backend},
};
use burn_llama::{Example, Llama, Storage, kernel::Kernels};
use std::collections::HashMap;

/// Values of parameters in host memory, by path.
pub(super) type ParamValues = HashMap<String, TensorData>;

/// A copy of the run's model on another device.
pub(super) trait Evaluator: Send {
    /// Computes [`total_loss`] over `rows` after copying the `trained` parameters into the model.
    fn loss(&mut self, trained: ParamValues, rows: &[Example], batching: EvalBatching) -> Result<TotalLoss>;
}

/// Loads the recipe's model on its `train.eval_device`, if that is given.
pub(super) fn open(recipe: &Recipe) -> Result<Option<Box<dyn Evaluator>>> {
    let Some(device) = &recipe.train.eval_save.eval_device else { return Ok(None) };
    with_backend!(device.ensure_ready()?, |B, device| Ok(Some(Box::new(EvalModel(Some(load::<B>(recipe, device)?))))))
}

/// Loads the model with its matrices in f32, whatever they are in training, because not every backend has shorter
/// types. With nf4 they hold the dequantized values.
fn load<B: Kernels>(recipe: &Recipe, device: &B::Device) -> Result<Llama<B>> {
    let storage = if recipe.model.dtype == Some(WeightDtype::Nf4) { Storage::Nf4 } else { DType::F32.into() };
    let loaded = model::load_recipe_base::<B>(recipe, storage, device)?;
    Ok(apply_method(loaded.model, &loaded.tokenizer, recipe)?.model.unpacked())
}

/// The model on its device; `None` only during a call.
struct EvalModel<B: Kernels>(Option<Llama<B>>);

impl<B: Kernels> Evaluator for EvalModel<B> {
    fn loss(&mut self, trained: ParamValues, rows: &[Example], batching: EvalBatching) -> Result<TotalLoss> {
        let Some(model) = self.0.take() else { return Ok(TotalLoss { sum: f64::NAN, target_tokens: 0 }) };
        let model = self.0.insert(model.map(&mut ParamReplacer { path: Vec::new(), values: trained }));
        total_loss(model, rows, batching)
    }
}

/// Returns the values of the trainable parameters of `model`.
pub(super) fn trainable_values<B: Backend, M: Module<B>>(model: &M) -> ParamValues {
    let mut read = TrainableCollector { path: Vec::new(), values: ParamValues::new() };
    model.visit(&mut read);
    read.values
}

/// Collects the values of trainable parameters.
struct TrainableCollector {
    path: Vec<String>,
    values: ParamValues,
}

impl<B: Backend> ModuleVisitor<B> for TrainableCollector {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if param.is_require_grad() {
            self.values.insert(self.path.join("."), param.val().into_data());
        }
    }
}

/// Replaces the values of parameters.
struct ParamReplacer {
    path: Vec<String>,
    values: ParamValues,
}

impl<B: Backend> ModuleMapper<B> for ParamReplacer {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let Some(values) = self.values.remove(&self.path.join(".")) else { return param };
        let (id, tensor, mapper) = param.consume();
        let place = (&tensor.device(), tensor.dtype());
        Param::from_mapped_value(id, Tensor::from_data(values, place), mapper)
    }
}
