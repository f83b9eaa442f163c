//! Automatic differentiation of the kernels: the state that each operation keeps, and its backward pass.

use super::{
    AttentionMask, AttentionOutput, CrossEntropyGradients, CrossEntropyInputs, CrossEntropyOptions, F, Kernels, Losses,
    RmsNormGradient,
};
use burn::{
    backend::autodiff::{
        Autodiff, NodeId,
        checkpoint::{
            base::Checkpointer,
            retro_forward::RetroForward,
            state::BackwardStates,
            strategy::{BalancedCheckpointing, CheckpointStrategy},
        },
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    tensor::{
        TensorMetadata,
        backend::{AutodiffBackend, Backend},
        ops::IntTensor,
    },
};
use burn_peft_kernels::{MatmulPrecision, WeightMatrix, take_accumulated_gradient};

/// Registers the gradient of a parent if the parent is tracked.
fn register<B: Backend>(grads: &mut Gradients, node: Option<NodeId>, gradient: F<B>) {
    if let Some(id) = node {
        grads.register::<B>(id, gradient);
    }
}

/// An input of an operation whose output is recomputed in the backward pass.
#[derive(Debug)]
enum RecomputeInput<B: Backend> {
    /// A tensor that the graph holds or recomputes.
    Node(NodeId),
    /// A tensor outside the graph.
    Constant(F<B>),
}

impl<B: Backend> RecomputeInput<B> {
    fn of(x: &F<Autodiff<B>>) -> Self {
        if x.is_tracked() { Self::Node(x.node.id) } else { Self::Constant(x.primitive.clone()) }
    }

    fn value(&self, states: &mut BackwardStates) -> F<B> {
        match self {
            Self::Node(id) => states.get_state::<F<B>>(id),
            Self::Constant(x) => x.clone(),
        }
    }
}

/// Returns the tracked parents, which the graph must keep so that the output can be recomputed.
fn tracked_parents<B: Backend>(parents: [&F<Autodiff<B>>; 2]) -> impl Iterator<Item = &F<Autodiff<B>>> {
    parents.into_iter().filter(|parent| parent.is_tracked())
}

/// Recomputes the output of RMSNorm, which is cheap, for the gradient of the trainable weights that it is multiplied
/// with.
#[derive(Debug)]
struct RecomputeRmsNorm<B: Backend> {
    x: RecomputeInput<B>,
    weight: RecomputeInput<B>,
    epsilon: f64,
}

impl<B: Kernels> RetroForward for RecomputeRmsNorm<B> {
    fn forward(&self, states: &mut BackwardStates, out: NodeId) {
        let (x, weight) = (self.x.value(states), self.weight.value(states));
        states.save(out, B::rms_norm(x, weight, self.epsilon));
    }
}

/// Recomputes the output of SwiGLU, for the same reason.
#[derive(Debug)]
struct RecomputeSwiGlu<B: Backend> {
    gate: RecomputeInput<B>,
    up: RecomputeInput<B>,
}

impl<B: Kernels> RetroForward for RecomputeSwiGlu<B> {
    fn forward(&self, states: &mut BackwardStates, out: NodeId) {
        let (gate, up) = (self.gate.value(states), self.up.value(states));
        states.save(out, B::swiglu(gate, up, MatmulPrecision::F32));
    }
}

/// The state that the backward pass of RMSNorm needs.
#[derive(Debug, Clone)]
struct RmsNormState<B: Backend> {
    x: F<B>,
    weight: F<B>,
    epsilon: f64,
}

/// The backward pass of RMSNorm.
#[derive(Debug)]
struct RmsNormBackward;

impl<B: Kernels> Backward<B, 2> for RmsNormBackward {
    type State = RmsNormState<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([x_node, w_node], RmsNormState { x, weight, epsilon }) = (ops.parents, ops.state);
        let accumulated =
            x_node.as_ref().and_then(|x| take_accumulated_gradient::<B>(grads, &dy, |place| place.node = x.clone()));
        let gradient = RmsNormGradient { dy, accumulated, epsilon, weight_trained: w_node.is_some() };
        let (dx, dw) = B::rms_norm_backward(x, weight, gradient);
        register::<B>(grads, x_node.map(|n| n.id), dx);
        if let Some(dw) = dw {
            register::<B>(grads, w_node.map(|n| n.id), dw);
        }
    }
}

/// The state that the backward pass of the embedding needs.
#[derive(Debug, Clone)]
struct EmbedState<B: Backend> {
    /// The number of rows of the table.
    rows: usize,
    /// The ids of the rows that were selected.
    ids: IntTensor<B>,
}

/// The backward pass of the embedding.
#[derive(Debug)]
struct EmbedBackward;

impl<B: Kernels> Backward<B, 1> for EmbedBackward {
    type State = EmbedState<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([node], EmbedState { rows, ids }) = (ops.parents, ops.state);
        register::<B>(grads, node.map(|n| n.id), B::embed_backward(rows, ids, dy));
    }
}

/// The state that the backward pass of rotary position embedding needs.
#[derive(Debug, Clone)]
struct RopeState<B: Backend> {
    cos: F<B>,
    sin: F<B>,
}

/// The backward pass of rotary position embedding.
#[derive(Debug)]
struct RopeBackward;

impl<B: Kernels> Backward<B, 1> for RopeBackward {
    type State = RopeState<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([node], RopeState { cos, sin }) = (ops.parents, ops.state);
        register::<B>(grads, node.map(|n| n.id), B::rope(dy, cos, B::float_neg(sin)));
    }
}

/// The state that the backward pass of SwiGLU needs, in bf16 if gate and up are results of bf16 matrix products. This
/// halves the memory of the largest activations and adds an error no larger than the one that they have already.
#[derive(Debug, Clone)]
struct SwiGluState<B: Backend> {
    gate: F<B>,
    up: F<B>,
}

/// The backward pass of SwiGLU.
#[derive(Debug)]
struct SwiGluBackward;

impl<B: Kernels> Backward<B, 2> for SwiGluBackward {
    type State = SwiGluState<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([gate_node, up_node], SwiGluState { gate, up }) = (ops.parents, ops.state);
        let (d_gate, d_up) = B::swiglu_backward(gate, up, dy);
        register::<B>(grads, gate_node.map(|n| n.id), d_gate);
        register::<B>(grads, up_node.map(|n| n.id), d_up);
    }
}

/// The state that the backward pass of attention needs.
#[derive(Debug, Clone)]
struct AttentionState<B: Backend> {
    /// The queries, keys and values.
    qkv: [F<B>; 3],
    mask: AttentionMask<B>,
    /// The log-sum-exp of the scores.
    lse: F<B>,
}

/// The backward pass of attention.
#[derive(Debug)]
struct AttentionBackward;

impl<B: Kernels> Backward<B, 3> for AttentionBackward {
    type State = AttentionState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let AttentionState { qkv, mask, lse } = ops.state;
        let gradients = B::flash_attention_backward(qkv, &mask, lse, dy);
        for (node, gradient) in ops.parents.into_iter().zip(gradients) {
            register::<B>(grads, node.map(|n| n.id), gradient);
        }
    }
}

/// The state that the backward pass of the cross-entropy needs.
#[derive(Debug, Clone)]
struct CrossEntropyState<B: Backend> {
    inputs: CrossEntropyInputs<B>,
    /// The result of the forward pass.
    forward: Losses<B>,
    /// The precision of the matrix products.
    precision: MatmulPrecision,
}

/// The backward pass of the cross-entropy.
#[derive(Debug)]
struct CrossEntropyBackward;

impl<B: Kernels> Backward<B, 2> for CrossEntropyBackward {
    type State = CrossEntropyState<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([hidden_node, head_node], CrossEntropyState { inputs, forward, precision }) = (ops.parents, ops.state);
        let options = CrossEntropyOptions {
            hidden_gradient: hidden_node.is_some(),
            head_gradient: head_node.is_some(),
            precision,
        };
        let gradients = B::linear_cross_entropy_backward(inputs, forward, dy, options);
        for (node, gradient) in [(hidden_node, gradients.hidden), (head_node, gradients.head)] {
            if let Some(gradient) = gradient {
                register::<B>(grads, node.map(|n| n.id), gradient);
            }
        }
    }
}

impl<B: Kernels, C: CheckpointStrategy> Kernels for Autodiff<B, C> {
    fn rms_norm(x: F<Self>, weight: F<Self>, epsilon: f64) -> F<Self> {
        let output = B::rms_norm(x.primitive.clone(), weight.primitive.clone(), epsilon);
        let again = RecomputeRmsNorm { x: RecomputeInput::of(&x), weight: RecomputeInput::of(&weight), epsilon };
        let prep = RmsNormBackward.prepare::<BalancedCheckpointing>([x.node.clone(), weight.node.clone()]);
        match prep.memory_bound().retro_forward(again).parents(tracked_parents([&x, &weight])).stateful() {
            OpsKind::Tracked(prep) => {
                prep.finish(RmsNormState { x: x.primitive, weight: weight.primitive, epsilon }, output)
            }
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn embed(table: F<Self>, ids: IntTensor<Self>) -> F<Self> {
        let [rows, _] = table.primitive.shape().dims();
        let output = B::embed(table.primitive, ids.clone());
        match EmbedBackward.prepare::<C>([table.node.clone()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(EmbedState { rows, ids }, output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn rope(x: F<Self>, cos: F<Self>, sin: F<Self>) -> F<Self> {
        let output = B::rope(x.primitive, cos.primitive.clone(), sin.primitive.clone());
        match RopeBackward.prepare::<C>([x.node.clone()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(RopeState { cos: cos.primitive, sin: sin.primitive }, output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn swiglu(gate: F<Self>, up: F<Self>, kept: MatmulPrecision) -> F<Self> {
        let output = B::swiglu(gate.primitive.clone(), up.primitive.clone(), kept);
        let keep = |x| if kept == MatmulPrecision::Bf16 { B::to_bf16(x) } else { x };
        let prep = SwiGluBackward.prepare::<BalancedCheckpointing>([gate.node.clone(), up.node.clone()]);
        let prep = match kept {
            MatmulPrecision::F32 | MatmulPrecision::F16 => {
                let again = RecomputeSwiGlu { gate: RecomputeInput::of(&gate), up: RecomputeInput::of(&up) };
                prep.memory_bound().retro_forward(again).parents(tracked_parents([&gate, &up]))
            }
            // To recompute, the graph would have to keep both in f32.
            MatmulPrecision::Bf16 => prep.compute_bound(),
        };
        match prep.stateful() {
            OpsKind::Tracked(prep) => {
                prep.finish(SwiGluState { gate: keep(gate.primitive), up: keep(up.primitive) }, output)
            }
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn flash_attention([q, k, v]: [F<Self>; 3], mask: &AttentionMask<Self>) -> AttentionOutput<Self> {
        let mask = mask.inner();
        let nodes = [q.node.clone(), k.node.clone(), v.node.clone()];
        let qkv = [q.primitive, k.primitive, v.primitive];
        let AttentionOutput { output, lse } = B::flash_attention(qkv.clone(), &mask);
        let output = match AttentionBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(AttentionState { qkv, mask, lse: lse.clone() }, output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        };
        AttentionOutput { output, lse: <Self as AutodiffBackend>::from_inner(lse) }
    }

    fn linear_cross_entropy(inputs: CrossEntropyInputs<Self>, options: CrossEntropyOptions) -> Losses<Self> {
        let CrossEntropyInputs { hidden, head, targets } = inputs;
        let (head_tracked, head_node, head) = match head {
            WeightMatrix::Dense(head) => (head.is_tracked(), head.node.clone(), WeightMatrix::Dense(head.primitive)),
            WeightMatrix::Packed(rows) => {
                // Packed rows have no node, so the node of a constant takes its place.
                let constant = <Self as AutodiffBackend>::from_inner(hidden.primitive.clone());
                (false, constant.node, WeightMatrix::Packed(rows.inner()))
            }
        };
        let precision = options.precision;
        let options =
            CrossEntropyOptions { hidden_gradient: hidden.is_tracked(), head_gradient: head_tracked, precision };
        let nodes = [hidden.node.clone(), head_node];
        let inputs = CrossEntropyInputs { hidden: hidden.primitive, head, targets: targets.inner() };
        let forward = B::linear_cross_entropy(inputs.clone(), options);
        let (losses, lse) = (forward.losses.clone(), forward.lse.clone());
        let losses = match CrossEntropyBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(CrossEntropyState { inputs, forward, precision }, losses),
            OpsKind::UnTracked(prep) => prep.finish(losses),
        };
        let lse = <Self as AutodiffBackend>::from_inner(lse);
        Losses { losses, lse, sum_gradients: CrossEntropyGradients::NONE }
    }
}
