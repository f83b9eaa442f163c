//! Weight gradients whose products are put off, for pipelines that run the two halves of a backward pass apart.

use super::LinearKernels;
use crate::MatmulPrecision;
use burn::{
    backend::autodiff::NodeId,
    module::ParamId,
    tensor::{TensorMetadata, ops::FloatTensor},
};
use std::{any::Any, cell::RefCell, collections::HashSet};

thread_local! {
    /// The products put off by the backward pass that this thread runs; none if nothing is put off.
    static DEFERRED: RefCell<Option<Vec<Box<dyn Any>>>> = const { RefCell::new(None) };
}

/// The gradient of a weight, still to be computed: `dW = dyᵀ·x`.
pub struct DeferredWeightGradient<B: LinearKernels> {
    /// The parameter that the weight is.
    pub id: ParamId,
    /// The bytes of `x` and `dy` that no earlier gradient of the same backward pass keeps too.
    pub bytes: usize,
    x: FloatTensor<B>,
    /// The node of `x`, if other products may share it.
    x_node: Option<NodeId>,
    dy: FloatTensor<B>,
    precision: MatmulPrecision,
}

impl<B: LinearKernels> DeferredWeightGradient<B> {
    /// Computes the gradient, `[out, in]`.
    pub fn compute(self) -> FloatTensor<B> {
        B::linear_backward_weight(self.x, self.dy, self.precision)
    }
}

/// The factors of a weight gradient.
pub(super) struct WeightGradient<B: LinearKernels> {
    pub x: FloatTensor<B>,
    pub x_node: Option<NodeId>,
    pub dy: FloatTensor<B>,
    pub precision: MatmulPrecision,
}

impl<B: LinearKernels> WeightGradient<B> {
    /// Computes the gradient, or puts it off if the weight is a parameter and this thread defers; then returns none.
    pub(super) fn compute_or_defer(self, id: Option<ParamId>) -> Option<FloatTensor<B>> {
        let Self { x, x_node, dy, precision } = self;
        DEFERRED.with_borrow_mut(|deferred| match (deferred, id) {
            (Some(deferred), Some(id)) => {
                deferred.push(Box::new(DeferredWeightGradient::<B> { id, bytes: 0, x, x_node, dy, precision }));
                None
            }
            _ => Some(B::linear_backward_weight(x, dy, precision)),
        })
    }
}

/// Runs `backward`, a backward pass on this thread, without the weight gradients of dense parameters (those that
/// [`linear_param`](super::linear_param) multiplies with); returns them to be computed later, in the order of the pass.
pub fn defer_weight_gradients<B: LinearKernels, R>(
    backward: impl FnOnce() -> R,
) -> (R, Vec<DeferredWeightGradient<B>>) {
    DEFERRED.set(Some(Vec::new()));
    let result = backward();
    let deferred = DEFERRED.take().unwrap_or_default().into_iter().filter_map(|any| any.downcast().ok());
    let mut seen = HashSet::new();
    let count = |mut gradient: Box<DeferredWeightGradient<B>>| {
        let bytes = |tensor: &FloatTensor<B>| tensor.shape().num_elements() * tensor.dtype().size();
        let x_is_new = gradient.x_node.is_none_or(|node| seen.insert(node));
        gradient.bytes = bytes(&gradient.dy) + if x_is_new { bytes(&gradient.x) } else { 0 };
        *gradient
    };
    (result, deferred.map(count).collect())
}
