//! Parameters by path: identities, freezing, counting.
//!
//! A parameter's path is the key of its tensor in the checkpoint (`model.layers.0.self_attn.q_proj.weight`).

use crate::random;
use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    tensor::{Tensor, backend::Backend},
};

/// The identity of the parameter at `path`: the same in every process and after every restart, so that optimizer states
/// and shards of several ranks belong together.
pub fn id(path: &str) -> ParamId {
    ParamId::from(random::text(path))
}

/// Lets only the parameters whose path `trained` accepts carry gradients. Every parameter becomes a leaf.
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
        // Detached first: a leaf is the only tensor whose gradient is kept.
        Param::from_mapped_value(id, tensor.detach().set_require_grad(on), mapper)
    }
}

/// Path, shape and whether it is trained, for every float parameter in declaration order.
pub fn list<B: Backend, M: Module<B>>(module: &M) -> Vec<(String, Vec<usize>, bool)> {
    let mut list = List { path: Vec::new(), found: Vec::new() };
    module.visit(&mut list);
    list.found
}

/// The number of values in parameters that carry gradients.
pub fn count_trainable<B: Backend, M: Module<B>>(module: &M) -> usize {
    list::<B, M>(module).iter().filter(|(_, _, on)| *on).map(|(_, shape, _)| shape.iter().product::<usize>()).sum()
}

struct List {
    path: Vec<String>,
    found: Vec<(String, Vec<usize>, bool)>,
}

impl<B: Backend> ModuleVisitor<B> for List {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let shape = param.lazy_shape().to_vec();
        self.found.push((self.path.join("."), shape, param.val().is_require_grad()));
    }
}
