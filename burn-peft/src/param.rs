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

/// Work on the float parameters of a module, for [`visit_params`].
pub(crate) trait ParamVisitor<B: Backend> {
    /// Visits the parameter at `path`.
    fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<B, D>>);
}

/// A change of the float parameters of a module, for [`map_params`].
pub(crate) trait ParamMapper<B: Backend> {
    /// Returns the new parameter at `path`.
    fn map<const D: usize>(&mut self, path: &str, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>>;
}

/// Visits the float parameters of a module in declaration order.
pub(crate) fn visit_params<B: Backend, M: Module<B>>(module: &M, visitor: &mut impl ParamVisitor<B>) {
    module.visit(&mut WithPath { path: Vec::new(), inner: visitor });
}

/// Replaces the float parameters of a module.
pub(crate) fn map_params<B: Backend, M: Module<B>>(module: M, mapper: &mut impl ParamMapper<B>) -> M {
    module.map(&mut WithPath { path: Vec::new(), inner: mapper })
}

/// Gives a visitor or mapper the path of each parameter.
struct WithPath<'a, T> {
    path: Vec<String>,
    inner: &'a mut T,
}

impl<B: Backend, T: ParamVisitor<B>> ModuleVisitor<B> for WithPath<'_, T> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.inner.visit(&self.path.join("."), param);
    }
}

impl<B: Backend, T: ParamMapper<B>> ModuleMapper<B> for WithPath<'_, T> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        self.inner.map(&self.path.join("."), param)
    }
}

/// Makes only the parameters whose path `trained` accepts require gradients. Every parameter becomes a leaf of the
/// autodiff graph.
pub fn train_only<B: Backend, M: Module<B>>(module: M, trained: impl Fn(&str) -> bool) -> M {
    map_params(module, &mut TrainOnly(trained))
}

struct TrainOnly<F>(F);

impl<B: Backend, F: Fn(&str) -> bool> ParamMapper<B> for TrainOnly<F> {
    fn map<const D: usize>(&mut self, path: &str, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let (id, tensor, mapper) = param.consume();
        // Detach first, because only leaves keep their gradients.
        Param::from_mapped_value(id, tensor.detach().set_require_grad((self.0)(path)), mapper)
    }
}

/// Replaces the value of a parameter by a placeholder of one element: another rank holds it. Id, data type and
/// trainability stay.
pub fn placeholder<B: Backend, const D: usize>(param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
    let (id, tensor, mapper) = param.consume();
    let zero = Tensor::zeros([1; D], (&tensor.device(), tensor.dtype()));
    Param::from_mapped_value(id, zero.set_require_grad(tensor.is_require_grad()), mapper)
}

/// A change of parameters to placeholders, see [`placeholder`].
pub(crate) struct IntoPlaceholders;

impl<B: Backend> ParamMapper<B> for IntoPlaceholders {
    fn map<const D: usize>(&mut self, _: &str, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        placeholder(param)
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
    let mut list = Vec::new();
    visit_params(module, &mut list);
    list
}

/// Returns the number of values in the parameters that require gradients.
pub fn count_trainable<B: Backend, M: Module<B>>(module: &M) -> usize {
    let trained = named_parameters::<B, M>(module).into_iter().filter(|param| param.requires_grad);
    trained.map(|param| param.shape.iter().product::<usize>()).sum()
}

impl<B: Backend> ParamVisitor<B> for Vec<ParamInfo> {
    fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<B, D>>) {
        let (path, shape) = (path.to_owned(), param.lazy_shape().to_vec());
        self.push(ParamInfo { path, shape, requires_grad: param.val().is_require_grad() });
    }
}
