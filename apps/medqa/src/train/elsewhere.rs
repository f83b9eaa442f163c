//! Validation on another device than training's (`train.eval_device`), on whatever backend that is.

use super::setup;
use crate::{
    backend::on,
    eval::loss,
    model,
    recipe::{Dtype, Recipe},
};
use anyhow::Result;
use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{DType, Tensor, TensorData, backend::Backend},
};
use burn_llama::{Example, Llama, Storage, kernel::Kernels};
use std::collections::HashMap;

/// The values of parameters, by path, on their way through host memory.
pub type Values = HashMap<String, TensorData>;

/// A model of the run's shape on a device of its own.
pub trait Elsewhere: Send {
    /// [`loss`] once what was `trained` has taken its place.
    fn loss(&mut self, trained: Values, rows: &[Example], batching: (usize, bool)) -> Result<(f64, usize)>;
}

/// The model of the recipe on its `train.eval_device`, if that is given.
pub fn open(recipe: &Recipe) -> Result<Option<Box<dyn Elsewhere>>> {
    let Some(device) = &recipe.train.saving.eval_device else { return Ok(None) };
    on!(device.ready()?, |B, place| Ok(Some(Box::new(There(Some(load::<B>(recipe, place)?))))))
}

/// Matrices are f32 there, whatever they are in training: not every backend has shorter types. With nf4 they are what that holds.
fn load<B: Kernels>(recipe: &Recipe, device: &B::Device) -> Result<Llama<B>> {
    let storage = if recipe.model.dtype == Some(Dtype::Nf4) { Storage::Nf4 } else { DType::F32.into() };
    let loaded = model::base::<B>(&recipe.model.path, storage, device)?;
    Ok(setup::adapt(loaded.model, &loaded.tokenizer, recipe)?.0.unpacked())
}

/// There is a model between two calls.
struct There<B: Kernels>(Option<Llama<B>>);

impl<B: Kernels> Elsewhere for There<B> {
    fn loss(&mut self, trained: Values, rows: &[Example], batching: (usize, bool)) -> Result<(f64, usize)> {
        let Some(model) = self.0.take() else { return Ok((f64::NAN, 0)) };
        let model = self.0.insert(model.map(&mut Replace { path: Vec::new(), values: trained }));
        loss(model, rows, batching)
    }
}

/// The parameters of `model` that learn.
pub fn trained<B: Backend, M: Module<B>>(model: &M) -> Values {
    let mut read = Read { path: Vec::new(), values: Values::new() };
    model.visit(&mut read);
    read.values
}

struct Read {
    path: Vec<String>,
    values: Values,
}

impl<B: Backend> ModuleVisitor<B> for Read {
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

struct Replace {
    path: Vec<String>,
    values: Values,
}

impl<B: Backend> ModuleMapper<B> for Replace {
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
