//! Providers of the weights that the segment driver needs.

use crate::Error;
use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{Tensor, backend::AutodiffBackend},
};

/// The direction of a pass through the segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the first segment to the last.
    Forward,
    /// From the last segment to the first.
    Backward,
}

/// A micro-batch in a stage, from the start of its forward pass to the end of its backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PassId {
    /// The first segment of the stage.
    pub first_segment: usize,
    /// The index of the micro-batch in the step.
    pub micro_batch: usize,
}

/// Provides a model whose weights are present at least while their segment runs.
pub(crate) trait WeightProvider<M> {
    /// True if the weights of all segments are always present.
    const ALWAYS_RESIDENT: bool;

    /// Gives the weights new autodiff leaves for a micro-batch that starts its forward pass; passes that have not finished keep
    /// theirs.
    fn start_pass(&mut self, pass: PassId);

    /// Drops the leaves of a micro-batch after its backward pass.
    fn finish_pass(&mut self, pass: PassId);

    /// Returns the model with the leaves of a micro-batch that has started, and with the weights of the segments that
    /// have been fetched and not released.
    fn model(&self, pass: PassId) -> &M;

    /// Fetches the weights of a segment. Weights of a kept graph stay until the backward pass has left them.
    fn fetch_segment(&mut self, direction: Direction, segment: usize) -> Result<(), Error>;

    /// Releases the weights of a segment.
    fn release_segment(&mut self, direction: Direction, segment: usize);
}

/// A model that always has all its weights, for one pass.
pub(crate) struct ResidentModel<M>(M);

impl<M> ResidentModel<M> {
    /// Wraps the model with detached weights, see [`detach_parameters`].
    pub(super) fn new<B: AutodiffBackend>(model: &M) -> Self
    where
        M: Module<B>,
    {
        Self(detach_parameters(model.clone()))
    }
}

impl<M> WeightProvider<M> for ResidentModel<M> {
    const ALWAYS_RESIDENT: bool = true;

    fn start_pass(&mut self, _: PassId) {}

    fn finish_pass(&mut self, _: PassId) {}

    fn model(&self, _: PassId) -> &M {
        &self.0
    }

    fn fetch_segment(&mut self, _: Direction, _: usize) -> Result<(), Error> {
        Ok(())
    }

    fn release_segment(&mut self, _: Direction, _: usize) {}
}

/// Returns the model with its weights as new autodiff leaves, because Burn 0.21 loses gradients of a leaf that several
/// graphs share (a tied embedding) once an earlier backward pass has used it.
pub(crate) fn detach_parameters<B: AutodiffBackend, M: Module<B>>(model: M) -> M {
    model.map(&mut DetachParameters)
}

struct DetachParameters;

impl<B: AutodiffBackend> ModuleMapper<B> for DetachParameters {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let (id, tensor, mapper) = param.consume();
        let require_grad = tensor.is_require_grad();
        Param::from_mapped_value(id, Tensor::from_inner(tensor.inner()).set_require_grad(require_grad), mapper)
    }
}
