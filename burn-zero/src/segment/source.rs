//! Where the driver finds the weights of a segment.

use crate::Error;
use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{Tensor, backend::AutodiffBackend},
};

/// One of the two ways through the segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sweep {
    /// First to last.
    Forward,
    /// Last to first.
    Backward,
}

/// A model whose weights are in place at least while their segment runs.
pub(crate) trait Source<M> {
    /// Whether the weights of all segments are always in place.
    const STAYS: bool;

    /// The model, with the weights of the segments that have been entered and not left.
    fn model(&self) -> &M;

    /// Puts the weights of a segment in place. Weights whose graph is kept stay until the backward pass has left them.
    fn enter(&mut self, sweep: Sweep, segment: usize) -> Result<(), Error>;

    /// Lets go of the weights of a segment.
    fn leave(&mut self, sweep: Sweep, segment: usize);
}

/// A model that has all its weights.
pub(crate) struct Resident<M>(M);

impl<M> Resident<M> {
    /// The same weights, see [`fresh`].
    pub fn new<B: AutodiffBackend>(model: &M) -> Self
    where
        M: Module<B>,
    {
        Self(fresh(model.clone()))
    }
}

impl<M> Source<M> for Resident<M> {
    const STAYS: bool = true;

    fn model(&self) -> &M {
        &self.0
    }

    fn enter(&mut self, _: Sweep, _: usize) -> Result<(), Error> {
        Ok(())
    }

    fn leave(&mut self, _: Sweep, _: usize) {}
}

/// The same weights as leaves that no graph has used: Burn 0.21 loses gradients of a leaf that several graphs share (a tied
/// embedding) once an earlier backward pass has used it.
pub(crate) fn fresh<B: AutodiffBackend, M: Module<B>>(model: M) -> M {
    model.map(&mut Fresh)
}

struct Fresh;

impl<B: AutodiffBackend> ModuleMapper<B> for Fresh {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let (id, tensor, mapper) = param.consume();
        let require_grad = tensor.is_require_grad();
        Param::from_mapped_value(id, Tensor::from_inner(tensor.inner()).set_require_grad(require_grad), mapper)
    }
}
