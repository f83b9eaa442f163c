//! A model's parameters, each fetched from its device when it is written and not before.

use crate::{Error, Llama, kernel::Kernels};
use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{DType, Tensor, TensorData, backend::Backend},
};
use burn_peft::Linears;

/// One parameter of the base model.
pub(super) struct Parameter<B: Backend> {
    /// Its key in the checkpoint.
    pub path: String,
    /// Its shape there.
    pub shape: Vec<usize>,
    values: Tensor<B, 1>,
}

impl<B: Backend> Parameter<B> {
    /// The values in row-major order, in the given float type.
    pub fn data(&self, dtype: DType) -> TensorData {
        self.values.clone().into_data().convert_dtype(dtype)
    }
}

/// Refuses a model whose weights are packed: what is written are float parameters.
pub(super) fn all_floats<B: Kernels>(model: &Llama<B>) -> Result<(), Error> {
    let mut packed = model.model.embed_tokens.weight.is_packed().then(|| "model.embed_tokens".to_owned());
    model.linears(&mut |path, linear| {
        if packed.is_none() && linear.weight.is_packed() {
            packed = Some(path.to_owned());
        }
    });
    match packed {
        Some(path) => {
            let found = "packed rows (load the model with a float type to write it)";
            Err(Error::config(format!("{path}.weight"), "a float parameter", found))
        }
        None => Ok(()),
    }
}

/// The parameters of the model without its adapters, in the order in which the model visits them.
pub(super) fn parameters<B: Kernels>(model: &Llama<B>) -> Vec<Parameter<B>> {
    let mut collect = Collect { path: Vec::new(), found: Vec::new() };
    model.visit(&mut collect);
    collect.found
}

struct Collect<B: Backend> {
    path: Vec<String>,
    found: Vec<Parameter<B>>,
}

impl<B: Backend> ModuleVisitor<B> for Collect<B> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let path = self.path.join(".");
        if burn_peft::adapter::is_adapter(&path) {
            return;
        }
        let value = param.val();
        let (shape, size) = (value.dims().to_vec(), value.shape().num_elements());
        self.found.push(Parameter { path, shape, values: value.reshape([size]) });
    }
}
