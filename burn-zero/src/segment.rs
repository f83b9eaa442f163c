//! A model as a list of segments, and the driver that runs forward and backward passes segment by segment.
//!
//! [`forward_backward`] runs each segment on autodiff leaves detached from its inputs, and then runs the backward pass
//! from the loss. The graph of a segment is kept or recomputed according to [`Checkpointing`] (activation
//! checkpointing); its gradients are handed over and freed before those of the next segment are computed.

use crate::comm::Trace;
use burn::{
    module::{AutodiffModule, Module, ModuleVisitor, ParamId},
    tensor::backend::{AutodiffBackend, Backend},
};

mod driver;
mod dyn_tensor;
mod plan;
mod weight_provider;

pub(crate) use driver::{
    AfterBackward, BackwardEnd, BackwardStart, Driver, ForwardEnd, PendingGradient, PostBackwardHook, Saved,
    SegmentPass,
};
pub use dyn_tensor::DynTensor;
pub(crate) use plan::BackwardPlan;
use weight_provider::ResidentModel;
pub(crate) use weight_provider::{Direction, PassId, WeightProvider, detach_parameters};

/// A model as a list of segments. Segment 0 takes no inputs; each later segment takes the outputs of the one before.
///
/// The first tensor that the last segment returns is the loss, of any shape. Its sum is differentiated; further tensors
/// are not.
pub trait Segments<B: Backend>: Module<B> {
    /// The data that every segment can read: tokens, positions, targets, loss weights.
    type Batch: Clone;

    /// Returns the number of segments, at least 1.
    fn segments(&self) -> usize;

    /// Runs one segment. Called twice on the same inputs, it must return the same outputs.
    fn forward_segment(&self, segment: usize, batch: &Self::Batch, inputs: Vec<DynTensor<B>>) -> Vec<DynTensor<B>>;
}

/// The additional methods of [`Segments`] that training needs.
pub trait TrainSegments<B: AutodiffBackend>:
    AutodiffModule<B, InnerModule: Segments<B::InnerBackend>> + Segments<B>
{
    /// Returns the same batch for the inner module (handles only, no copies).
    fn inner_batch(
        batch: &<Self as Segments<B>>::Batch,
    ) -> <<Self as AutodiffModule<B>>::InnerModule as Segments<B::InnerBackend>>::Batch;

    /// Visits the parameters that one segment uses, with full paths: `enter_module` for each part of the path, as
    /// `Module::visit` of the whole model would.
    fn visit_segment<V: ModuleVisitor<B>>(&self, segment: usize, visitor: &mut V);

    /// Runs `backward`, a backward pass, and puts off the products of weight gradients that its result does not need.
    /// A pipeline computes them when its rank would otherwise wait. The default puts nothing off.
    fn defer_weight_gradients<R>(backward: impl FnOnce() -> R) -> (R, Vec<DeferredGradient<B::InnerBackend>>) {
        (backward(), Vec::new())
    }
}

/// The gradient of one weight, still to be computed; see [`TrainSegments::defer_weight_gradients`].
pub struct DeferredGradient<B: Backend> {
    /// The parameter's id.
    pub id: ParamId,
    /// The bytes of the tensors that are kept for the product.
    pub bytes: usize,
    /// Computes the gradient, of the parameter's shape.
    pub compute: Box<dyn FnOnce() -> DynTensor<B>>,
}

/// Activation checkpointing: which segments' graphs are recomputed in the backward pass instead of being kept. The
/// graph of the last segment is kept except with [`Checkpointing::All`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checkpointing {
    /// Keep every graph: the most memory, and no recomputation.
    #[default]
    None,
    /// Recompute the graph of every `k`-th segment, those whose index is divisible by `k`; 0 is
    /// [`Checkpointing::None`].
    Every(usize),
    /// Recompute every graph but the last: memory for the segments' inputs and one segment's graph.
    Full,
    /// As [`Checkpointing::Full`], and the last segment is recomputed as well. The extra run of the head pays off only
    /// in ZeRO stage 3, where its weights then do not stay gathered between the forward and the backward pass.
    All,
}

impl Checkpointing {
    /// Returns whether the graph of a segment is kept for the backward pass.
    pub(crate) fn keeps_graph(self, segment: usize, segments: usize) -> bool {
        let last = segment + 1 == segments;
        match self {
            Self::None => true,
            Self::Every(k) => last || k == 0 || !segment.is_multiple_of(k),
            Self::Full => last,
            Self::All => false,
        }
    }
}

/// The gradient of one parameter, on the inner backend.
#[derive(Clone, Debug)]
pub struct Gradient<B: Backend> {
    /// The parameter's path in the model, joined by dots.
    pub path: String,
    /// The parameter's id.
    pub id: ParamId,
    /// The gradient, of the parameter's shape.
    pub value: DynTensor<B>,
}

/// Runs the forward and backward pass of a batch; returns the detached loss of the last segment.
///
/// `sink` receives the gradients of each segment right after the backward pass of that segment, last segment first. A
/// parameter that several segments use is passed once, with the summed gradient, together with the first of them.
/// Frozen parameters get no gradient, and the backward pass ends at the first segment with a trainable parameter. The
/// segments before it run without a graph.
pub fn forward_backward<B: AutodiffBackend, M: TrainSegments<B>>(
    model: &M,
    batch: &<M as Segments<B>>::Batch,
    checkpointing: Checkpointing,
    sink: &mut dyn FnMut(Vec<Gradient<B::InnerBackend>>),
) -> DynTensor<B::InnerBackend> {
    let mut each = |_: &mut ResidentModel<M>, _: AfterBackward, found: Vec<_>| {
        if !found.is_empty() {
            sink(found);
        }
        Ok(())
    };
    let (plan, trace) = (BackwardPlan::new(model), Trace::default());
    let driver = Driver { plan: &plan, checkpointing, trace: &trace };
    match driver.forward_backward(&mut ResidentModel::new(model), batch, &mut each) {
        Ok(loss) => loss,
        Err(error) => unreachable!("neither a resident model nor this hook can fail: {error}"),
    }
}

#[cfg(test)]
pub(crate) mod tests;
