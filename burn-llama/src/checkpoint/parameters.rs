//! A model's parameters, each copied from its device only when it is written.

use crate::{Error, Llama, kernel::Kernels};
use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{DType, Tensor, TensorData, backend::Backend},
};
use burn_peft::Linears;

/// One parameter of the base model.
pub(super) struct Parameter<B: Backend> {
    /// The parameter's key in the checkpoint.
    pub path: String,
    /// The parameter's shape in the checkpoint.
    pub shape: Vec<usize>,
    values: Tensor<B, 1>,
}

impl<B: Backend> Parameter<B> {
    /// Copies the values from the device, in row-major order, as the float type `dtype`.
    pub(super) fn data(&self, dtype: DType) -> TensorData {
        self.values.clone().into_data().convert_dtype(dtype)
    }
}

/// Returns an error if any weight of the model is packed: only float parameters can be written.
pub(super) fn require_dense<B: Kernels>(model: &Llama<B>) -> Result<(), Error> {
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

/// Returns the model's parameters without its adapters, in the order in which the module visitor meets them.
pub(super) fn parameters<B: Kernels>(model: &Llama<B>) -> Vec<Parameter<B>> {
    let mut collect = ParameterCollector { path: Vec::new(), parameters: Vec::new() };
    model.visit(&mut collect);
    collect.parameters
}

/// A module visitor that collects the parameters of the base model.
struct ParameterCollector<B: Backend> {
    path: Vec<String>,
    parameters: Vec<Parameter<B>>,
}

impl<B: Backend> ModuleVisitor<B> for ParameterCollector<B> {
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
        self.parameters.push(Parameter { path, shape, values: value.reshape([size]) });
    }
}
