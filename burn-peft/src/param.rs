//! Parameters by path: their ids, freezing, listing and counting.
//!
//! A parameter's path is the key of its tensor in the checkpoint (`model.layers.0.self_attn.q_proj.weight`).

use crate::random;
use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    tensor::{Tensor, backend::Backend},
};

/// Returns the id of the parameter at `path`. It is the same in every process and after every restart, so that
/// optimizer states and the shards of several process ranks can be matched.
pub fn id(path: &str) -> ParamId {
    ParamId::from(random::key_from_str(path))
}

/// Returns the last segment of a path: the name of the module or parameter itself.
pub(crate) fn last_segment(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// Makes only the parameters whose path `trained` accepts require gradients. Every parameter becomes a leaf of the
/// autodiff graph.
pub fn train_only<B: Backend, M: Module<B>>(module: M, trained: impl Fn(&str) -> bool) -> M {
    module.map(&mut TrainOnly { path: Vec::new(), trained })
}

struct TrainOnly<F> {
    path: Vec<String>,
    trained: F,
}

impl<B: Backend, F: Fn(&str) -> bool> ModuleMapper<B> for TrainOnly<F> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let on = (self.trained)(&self.path.join("."));
        let (id, tensor, mapper) = param.consume();
        // Detach first, because only leaves keep their gradients.
        Param::from_mapped_value(id, tensor.detach().set_require_grad(on), mapper)
    }
}

/// A float parameter of a module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamInfo {
    /// The path in the module.
    pub path: String,
    /// The shape.
    pub shape: Vec<usize>,
    /// True if the parameter requires gradients.
    pub requires_grad: bool,
}

/// Returns every float parameter in declaration order.
pub fn named_parameters<B: Backend, M: Module<B>>(module: &M) -> Vec<ParamInfo> {
    let mut list = NamedParameters { path: Vec::new(), parameters: Vec::new() };
    module.visit(&mut list);
    list.parameters
}

/// Returns the number of values in the parameters that require gradients.
pub fn count_trainable<B: Backend, M: Module<B>>(module: &M) -> usize {
    let trained = named_parameters::<B, M>(module).into_iter().filter(|param| param.requires_grad);
    trained.map(|param| param.shape.iter().product::<usize>()).sum()
}

struct NamedParameters {
    path: Vec<String>,
    parameters: Vec<ParamInfo>,
}

impl<B: Backend> ModuleVisitor<B> for NamedParameters {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let (path, shape) = (self.path.join("."), param.lazy_shape().to_vec());
        self.parameters.push(ParamInfo { path, shape, requires_grad: param.val().is_require_grad() });
    }
}
