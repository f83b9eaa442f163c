//! The backward pass of a linear layer.

use super::{LinearKernels, deferred::WeightGradient};
use crate::{MatmulPrecision, PackedWeight};
use burn::{
    backend::autodiff::{
        Autodiff, NodeId,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    module::ParamId,
    tensor::{
        TensorMetadata,
        backend::{AutodiffBackend, Backend},
        ops::FloatTensor,
    },
};

/// The activation that a backward pass needs.
#[derive(Debug, Clone)]
enum SavedActivation<X> {
    NotNeeded,
    Saved(X),
    /// An activation that the autodiff graph holds or recomputes.
    Checkpointed(NodeId),
}

/// Takes the gradient accumulated so far for a node out of `grads`. The caller adds to it and registers the sum.
/// `template` is any tensor; `set_node` assigns the node to it, because the type of a node cannot be named here.
#[doc(hidden)]
pub fn take_accumulated_gradient<B: Backend>(
    grads: &mut Gradients,
    template: &FloatTensor<B>,
    set_node: impl FnOnce(&mut FloatTensor<Autodiff<B>>),
) -> Option<FloatTensor<B>> {
    let mut key = <Autodiff<B> as AutodiffBackend>::from_inner(template.clone());
    set_node(&mut key);
    grads.remove(&key)
}

/// The tensors that the backward pass of a dense linear layer needs.
#[derive(Debug, Clone)]
struct LinearState<X> {
    /// The activations, if the weight is trained.
    x: SavedActivation<X>,
    /// The weight, if `x` needs a gradient.
    weight: Option<X>,
    weight_id: Option<ParamId>,
    precision: MatmulPrecision,
}

/// Backward pass of a dense linear layer.
#[derive(Debug)]
struct LinearBackward;

impl<B: LinearKernels> Backward<B, 2> for LinearBackward {
    type State = LinearState<FloatTensor<B>>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let [x_node, weight_node] = ops.parents;
        let LinearState { x, weight, weight_id, precision } = ops.state;
        if let (Some(node), Some(weight)) = (x_node, weight) {
            let accumulate_into = take_accumulated_gradient::<B>(grads, &dy, |place| place.node = node.clone());
            grads.register::<B>(node.id, B::linear_backward_input(dy.clone(), weight, accumulate_into, precision));
        }
        let (x, x_node) = match x {
            SavedActivation::NotNeeded => return,
            SavedActivation::Saved(x) => (x, None),
            SavedActivation::Checkpointed(id) => (checkpointer.retrieve_node_output(id), Some(id)),
        };
        if let Some(node) = weight_node {
            let gradient = WeightGradient::<B> { x, x_node, dy, precision }.compute_or_defer(weight_id);
            gradient.into_iter().for_each(|gradient| grads.register::<B>(node.id, gradient));
        }
    }
}

/// The weight that the backward pass of a packed linear layer needs.
#[derive(Debug, Clone)]
struct PackedState<B: Backend> {
    weight: PackedWeight<B>,
    precision: MatmulPrecision,
}

/// Backward pass of a packed linear layer.
#[derive(Debug)]
struct PackedBackward;

impl<B: LinearKernels> Backward<B, 1> for PackedBackward {
    type State = PackedState<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let [node] = ops.parents;
        if let Some(node) = node {
            let PackedState { weight, precision } = ops.state;
            let accumulate_into = take_accumulated_gradient::<B>(grads, &dy, |place| place.node = node.clone());
            grads.register::<B>(node.id, B::packed_backward_input(dy, &weight, accumulate_into, precision));
        }
    }
}

/// Backward pass of an addition: both inputs receive the gradient of the sum.
#[derive(Debug)]
struct AddBackward;

impl<B: Backend> Backward<B, 2> for AddBackward {
    type State = ();

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        for node in ops.parents.into_iter().flatten() {
            grads.register::<B>(node.id, dy.clone());
        }
    }
}

impl<B: LinearKernels, C: CheckpointStrategy> LinearKernels for Autodiff<B, C> {
    fn linear_forward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        weight_id: Option<ParamId>,
        precision: MatmulPrecision,
    ) -> FloatTensor<Self> {
        let (x_tracked, weight_tracked) = (x.is_tracked(), weight.is_tracked());
        assert!(
            !weight_tracked || weight.primitive.dtype() == x.primitive.dtype(),
            "a trained weight must have the type of the activations: {:?} against {:?}",
            weight.primitive.dtype(),
            x.primitive.dtype(),
        );
        match LinearBackward.prepare::<C>([x.node.clone(), weight.node.clone()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let saved_x = match (weight_tracked, x_tracked) {
                    (false, _) => SavedActivation::NotNeeded,
                    (true, false) => SavedActivation::Saved(x.primitive.clone()),
                    (true, true) => SavedActivation::Checkpointed(prep.checkpoint(&x)),
                };
                let saved_weight = x_tracked.then(|| weight.primitive.clone());
                let state = LinearState { x: saved_x, weight: saved_weight, weight_id, precision };
                prep.finish(state, B::linear_forward(x.primitive, weight.primitive, weight_id, precision))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::linear_forward(x.primitive, weight.primitive, weight_id, precision))
            }
        }
    }

    fn add(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        let prep = AddBackward.prepare::<C>([x.node, y.node]).compute_bound();
        let sum = B::add(x.primitive, y.primitive);
        match prep.stateful() {
            OpsKind::Tracked(prep) => prep.finish((), sum),
            OpsKind::UnTracked(prep) => prep.finish(sum),
        }
    }

    fn with_spinning_pool<R>(work: impl FnOnce() -> R) -> R {
        B::with_spinning_pool(work)
    }

    fn overwrite(target: FloatTensor<Self>, values: FloatTensor<Self>) -> FloatTensor<Self> {
        <Self as AutodiffBackend>::from_inner(B::overwrite(target.primitive, values.primitive))
    }

    fn unpack(weight: &PackedWeight<Self>) -> FloatTensor<Self> {
        <Self as AutodiffBackend>::from_inner(B::unpack(&weight.inner()))
    }

    fn packed_forward(
        x: FloatTensor<Self>,
        weight: &PackedWeight<Self>,
        precision: MatmulPrecision,
    ) -> FloatTensor<Self> {
        let weight: PackedWeight<B> = weight.inner();
        let y = B::packed_forward(x.primitive, &weight, precision);
        match PackedBackward.prepare::<C>([x.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(PackedState { weight, precision }, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}
