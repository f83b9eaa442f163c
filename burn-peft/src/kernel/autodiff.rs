//! The backward pass of a linear layer.

use super::{Compute, LinearKernels};
use crate::packed::Packed;
use burn::{
    backend::autodiff::{
        Autodiff, NodeId,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    tensor::{
        TensorMetadata,
        backend::{AutodiffBackend, Backend},
        ops::FloatTensor,
    },
};

/// What a backward pass needs of the activations.
#[derive(Debug, Clone)]
enum Kept<X> {
    Nothing,
    Value(X),
    /// What the graph holds or makes again.
    Node(NodeId),
}

/// What operations that were walked before found of the gradient of a node, taken out of the others: whoever adds to it registers
/// the sum. `any` is any tensor; `aim` gives it the node, whose type has no name.
#[doc(hidden)]
pub fn found_before<B: Backend>(
    grads: &mut Gradients,
    any: &FloatTensor<B>,
    aim: impl FnOnce(&mut FloatTensor<Autodiff<B>>),
) -> Option<FloatTensor<B>> {
    let mut place = <Autodiff<B> as AutodiffBackend>::from_inner(any.clone());
    aim(&mut place);
    grads.remove(&place)
}

/// State: `x` if the weight is trained, the weight if `x` carries gradient.
#[derive(Debug)]
struct LinearBackward;

impl<B: LinearKernels> Backward<B, 2> for LinearBackward {
    type State = (Kept<FloatTensor<B>>, Option<FloatTensor<B>>, Compute);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let [x_node, weight_node] = ops.parents;
        let (x, weight, compute) = ops.state;
        if let (Some(node), Some(weight)) = (x_node, weight) {
            let found = found_before::<B>(grads, &dy, |place| place.node = node.clone());
            grads.register::<B>(node.id, B::linear_backward_input(dy.clone(), weight, found, compute));
        }
        let x = match x {
            Kept::Nothing => None,
            Kept::Value(x) => Some(x),
            Kept::Node(id) => Some(checkpointer.retrieve_node_output(id)),
        };
        if let (Some(node), Some(x)) = (weight_node, x) {
            grads.register::<B>(node.id, B::linear_backward_weight(x, dy, compute));
        }
    }
}

/// State: the weight, packed.
#[derive(Debug)]
struct PackedBackward;

impl<B: LinearKernels> Backward<B, 1> for PackedBackward {
    type State = (Packed<B>, Compute);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let [node] = ops.parents;
        if let Some(node) = node {
            let (weight, compute) = ops.state;
            let found = found_before::<B>(grads, &dy, |place| place.node = node.clone());
            grads.register::<B>(node.id, B::packed_backward_input(dy, &weight, found, compute));
        }
    }
}

/// Both have the gradient of the sum.
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
    fn linear_forward(x: FloatTensor<Self>, weight: FloatTensor<Self>, compute: Compute) -> FloatTensor<Self> {
        let (x_tracked, weight_tracked) = (x.is_tracked(), weight.is_tracked());
        assert!(
            !weight_tracked || weight.primitive.dtype() == x.primitive.dtype(),
            "a trained weight must have the type of the activations: {:?} against {:?}",
            weight.primitive.dtype(),
            x.primitive.dtype(),
        );
        match LinearBackward.prepare::<C>([x.node.clone(), weight.node.clone()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let kept_x = match (weight_tracked, x_tracked) {
                    (false, _) => Kept::Nothing,
                    (true, false) => Kept::Value(x.primitive.clone()),
                    (true, true) => Kept::Node(prep.checkpoint(&x)),
                };
                let kept = x_tracked.then(|| weight.primitive.clone());
                prep.finish((kept_x, kept, compute), B::linear_forward(x.primitive, weight.primitive, compute))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::linear_forward(x.primitive, weight.primitive, compute)),
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

    fn at_work<R>(work: impl FnOnce() -> R) -> R {
        B::at_work(work)
    }

    fn overwrite(target: FloatTensor<Self>, values: FloatTensor<Self>) -> FloatTensor<Self> {
        <Self as AutodiffBackend>::from_inner(B::overwrite(target.primitive, values.primitive))
    }

    fn unpack(weight: &Packed<Self>) -> FloatTensor<Self> {
        <Self as AutodiffBackend>::from_inner(B::unpack(&weight.inner()))
    }

    fn packed_forward(x: FloatTensor<Self>, weight: &Packed<Self>, compute: Compute) -> FloatTensor<Self> {
        let weight: Packed<B> = weight.inner();
        let y = B::packed_forward(x.primitive, &weight, compute);
        match PackedBackward.prepare::<C>([x.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((weight, compute), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}
