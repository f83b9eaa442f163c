//! A model whose segments sleep: a chain of products with one weight each, whose times are known.

use burn::{
    backend::{
        Autodiff, Flex,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
    },
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::{
        Tensor,
        backend::Backend,
        ops::{FloatTensor, FloatTensorOps},
    },
};
use burn_zero::segment::{DeferredGradient, DynTensor, Segments, TrainSegments};
use std::{cell::RefCell, thread::sleep, time::Duration};

/// The time of the forward pass of a segment, of the gradient of its input, and of the gradient of its weight.
pub(crate) const PASS: Duration = Duration::from_millis(20);
const SIZE: usize = 16;

pub(crate) type TrainBackend = Autodiff<Flex>;

thread_local! {
    /// The weight gradients put off by the backward pass that this thread runs; none if nothing is put off.
    static DEFERRED: RefCell<Option<Vec<WeightGradient>>> = const { RefCell::new(None) };
}

/// The factors of the gradient of a weight.
struct WeightGradient {
    id: ParamId,
    x: FloatTensor<Flex>,
    dy: FloatTensor<Flex>,
}

impl WeightGradient {
    fn compute(self) -> FloatTensor<Flex> {
        sleep(PASS);
        Flex::float_mul(self.x, self.dy)
    }

    /// Computes the gradient, or puts it off if this thread defers; then returns none.
    fn compute_or_defer(self) -> Option<FloatTensor<Flex>> {
        DEFERRED.with_borrow_mut(|deferred| match deferred {
            Some(deferred) => {
                deferred.push(self);
                None
            }
            None => Some(self.compute()),
        })
    }
}

/// A backend with the product that sleeps.
pub(crate) trait Sleep: Backend {
    /// Multiplies the elements of two vectors, in the time [`PASS`].
    fn multiply(x: FloatTensor<Self>, weight: FloatTensor<Self>, id: ParamId) -> FloatTensor<Self>;
}

impl Sleep for Flex {
    fn multiply(x: FloatTensor<Self>, weight: FloatTensor<Self>, _: ParamId) -> FloatTensor<Self> {
        sleep(PASS);
        Self::float_mul(x, weight)
    }
}

#[derive(Debug, Clone)]
struct ProductState {
    x: FloatTensor<Flex>,
    weight: FloatTensor<Flex>,
    id: ParamId,
}

#[derive(Debug)]
struct ProductBackward;

impl Backward<Flex, 2> for ProductBackward {
    type State = ProductState;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<Flex>(&ops.node);
        let [x_node, weight_node] = ops.parents;
        let ProductState { x, weight, id } = ops.state;
        // The first segment has no gradient of an input, but takes the time of the others.
        sleep(PASS);
        if let Some(node) = x_node {
            grads.register::<Flex>(node.id, Flex::float_mul(dy.clone(), weight));
        }
        if let Some(node) = weight_node
            && let Some(gradient) = (WeightGradient { id, x, dy }).compute_or_defer()
        {
            grads.register::<Flex>(node.id, gradient);
        }
    }
}

impl<C: CheckpointStrategy> Sleep for Autodiff<Flex, C> {
    fn multiply(x: FloatTensor<Self>, weight: FloatTensor<Self>, id: ParamId) -> FloatTensor<Self> {
        let y = Flex::multiply(x.primitive.clone(), weight.primitive.clone(), id);
        let state = ProductState { x: x.primitive, weight: weight.primitive, id };
        match ProductBackward.prepare::<C>([x.node, weight.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(state, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

/// A segment for each weight `[SIZE]`.
#[derive(Module, Debug)]
pub(crate) struct Sleeper<B: Backend> {
    weights: Vec<Param<Tensor<B, 1>>>,
}

impl Sleeper<TrainBackend> {
    pub(crate) fn new(segments: usize) -> Self {
        let weight = |segment| Tensor::full([SIZE], 1.0 + segment as f32 / 16.0, &Default::default());
        Self { weights: (0..segments).map(|segment| Param::from_tensor(weight(segment))).collect() }
    }
}

/// Returns the input of a micro-batch.
pub(crate) fn input(micro_batch: usize) -> Tensor<TrainBackend, 1> {
    Tensor::full([SIZE], 1.0 / (1.0 + micro_batch as f32), &Default::default())
}

impl<B: Sleep> Segments<B> for Sleeper<B> {
    type Batch = Tensor<B, 1>;

    fn segments(&self) -> usize {
        self.weights.len()
    }

    fn forward_segment(&self, segment: usize, batch: &Self::Batch, inputs: Vec<DynTensor<B>>) -> Vec<DynTensor<B>> {
        let x = inputs.into_iter().next().unwrap_or_else(|| DynTensor::new(batch.clone())).primitive();
        let weight = &self.weights[segment];
        vec![DynTensor::from_primitive(B::multiply(x, weight.val().into_primitive().tensor(), weight.id))]
    }
}

impl TrainSegments<TrainBackend> for Sleeper<TrainBackend> {
    fn inner_batch(batch: &Self::Batch) -> Tensor<Flex, 1> {
        batch.clone().inner()
    }

    fn visit_segment<V: ModuleVisitor<TrainBackend>>(&self, segment: usize, visitor: &mut V) {
        let name = segment.to_string();
        for part in ["weights", &name] {
            visitor.enter_module(part, "");
        }
        visitor.visit_float(&self.weights[segment]);
        for part in [&name, "weights"] {
            visitor.exit_module(part, "");
        }
    }

    fn defer_weight_gradients<R>(backward: impl FnOnce() -> R) -> (R, Vec<DeferredGradient<Flex>>) {
        DEFERRED.set(Some(Vec::new()));
        let result = backward();
        let deferred = DEFERRED.take().unwrap_or_default().into_iter();
        let gradient = |gradient: WeightGradient| DeferredGradient {
            id: gradient.id,
            bytes: 2 * SIZE * size_of::<f32>(),
            compute: Box::new(|| DynTensor::from_primitive(gradient.compute())),
        };
        (result, deferred.map(gradient).collect())
    }
}
