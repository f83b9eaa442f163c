//! Autodiff for the kernels: the state that each operation keeps and its backward pass.

use super::{AttentionMask, F, Kernels, Losses, Targets};
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
use burn_peft::kernel::{MatmulPrecision, WeightMatrix, take_accumulated_gradient};

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
struct RecomputeRmsNorm<B: Backend>([RecomputeInput<B>; 2], f64);

impl<B: Kernels> RetroForward for RecomputeRmsNorm<B> {
    fn forward(&self, states: &mut BackwardStates, out: NodeId) {
        let [x, weight] = self.0.each_ref().map(|input| input.value(states));
        states.save(out, B::rms_norm(x, weight, self.1));
    }
}

/// Recomputes the output of SwiGLU, for the same reason.
#[derive(Debug)]
struct RecomputeSwiGlu<B: Backend>([RecomputeInput<B>; 2]);

impl<B: Kernels> RetroForward for RecomputeSwiGlu<B> {
    fn forward(&self, states: &mut BackwardStates, out: NodeId) {
        let [gate, up] = self.0.each_ref().map(|input| input.value(states));
        states.save(out, B::swiglu(gate, up, MatmulPrecision::F32));
    }
}

/// The backward pass of RMSNorm. State: input, weight, epsilon.
#[derive(Debug)]
struct RmsNormBackward;

impl<B: Kernels> Backward<B, 2> for RmsNormBackward {
    type State = (F<B>, F<B>, f64);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([x_node, w_node], (x, weight, epsilon)) = (ops.parents, ops.state);
        let found =
            x_node.as_ref().and_then(|x| take_accumulated_gradient::<B>(grads, &dy, |place| place.node = x.clone()));
        let (dx, dw) = B::rms_norm_backward(x, weight, (dy, found), (epsilon, w_node.is_some()));
        register::<B>(grads, x_node.map(|n| n.id), dx);
        if let Some(dw) = dw {
            register::<B>(grads, w_node.map(|n| n.id), dw);
        }
    }
}

/// The backward pass of the embedding. State: the number of rows of the table, and the ids of those that were selected.
#[derive(Debug)]
struct EmbedBackward;

impl<B: Kernels> Backward<B, 1> for EmbedBackward {
    type State = (usize, IntTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([node], (rows, ids)) = (ops.parents, ops.state);
        register::<B>(grads, node.map(|n| n.id), B::embed_backward(rows, ids, dy));
    }
}

/// The backward pass of rotary position embedding. State: cosines and sines.
#[derive(Debug)]
struct RopeBackward;

impl<B: Kernels> Backward<B, 1> for RopeBackward {
    type State = (F<B>, F<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([node], (cos, sin)) = (ops.parents, ops.state);
        register::<B>(grads, node.map(|n| n.id), B::rope(dy, cos, B::float_neg(sin)));
    }
}

/// The backward pass of SwiGLU. State: gate and up, in bf16 if they are results of bf16 matrix products. This halves
/// the memory of the largest activations and adds an error no larger than the one that they have already.
#[derive(Debug)]
struct SwiGluBackward;

impl<B: Kernels> Backward<B, 2> for SwiGluBackward {
    type State = (F<B>, F<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([gate_node, up_node], (gate, up)) = (ops.parents, ops.state);
        let (d_gate, d_up) = B::swiglu_backward(gate, up, dy);
        register::<B>(grads, gate_node.map(|n| n.id), d_gate);
        register::<B>(grads, up_node.map(|n| n.id), d_up);
    }
}

/// The backward pass of attention. State: queries, keys and values; attention mask; log-sum-exp.
#[derive(Debug)]
struct AttentionBackward;

impl<B: Kernels> Backward<B, 3> for AttentionBackward {
    type State = ([F<B>; 3], AttentionMask<B>, F<B>);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (qkv, visibility, lse) = ops.state;
        let gradients = B::flash_attention_backward(qkv, &visibility, [lse, dy]);
        for (node, gradient) in ops.parents.into_iter().zip(gradients) {
            register::<B>(grads, node.map(|n| n.id), gradient);
        }
    }
}

/// The backward pass of the cross-entropy. State: hidden states and head, targets, result of the forward pass,
/// precision of the matrix products.
#[derive(Debug)]
struct CrossEntropyBackward;

impl<B: Kernels> Backward<B, 2> for CrossEntropyBackward {
    type State = ((F<B>, WeightMatrix<B>), Targets<B>, Losses<B>, MatmulPrecision);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (inputs, targets, kept, compute) = ops.state;
        let wanted = [ops.parents[0].is_some(), ops.parents[1].is_some()];
        let gradients = B::linear_cross_entropy_backward(inputs, &targets, (kept, dy), (wanted, compute));
        for (node, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(gradient) = gradient {
                register::<B>(grads, node.map(|n| n.id), gradient);
            }
        }
    }
}

impl<B: Kernels, C: CheckpointStrategy> Kernels for Autodiff<B, C> {
    fn rms_norm(x: F<Self>, weight: F<Self>, epsilon: f64) -> F<Self> {
        let output = B::rms_norm(x.primitive.clone(), weight.primitive.clone(), epsilon);
        let again = RecomputeRmsNorm([RecomputeInput::of(&x), RecomputeInput::of(&weight)], epsilon);
        let prep = RmsNormBackward.prepare::<BalancedCheckpointing>([x.node.clone(), weight.node.clone()]);
        match prep.memory_bound().retro_forward(again).parents(tracked_parents([&x, &weight])).stateful() {
            OpsKind::Tracked(prep) => prep.finish((x.primitive, weight.primitive, epsilon), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn embed(table: F<Self>, ids: IntTensor<Self>) -> F<Self> {
        let [rows, _] = table.primitive.shape().dims();
        let output = B::embed(table.primitive, ids.clone());
        match EmbedBackward.prepare::<C>([table.node.clone()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((rows, ids), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn rope(x: F<Self>, cos: F<Self>, sin: F<Self>) -> F<Self> {
        let output = B::rope(x.primitive, cos.primitive.clone(), sin.primitive.clone());
        match RopeBackward.prepare::<C>([x.node.clone()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((cos.primitive, sin.primitive), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn swiglu(gate: F<Self>, up: F<Self>, kept: MatmulPrecision) -> F<Self> {
        let output = B::swiglu(gate.primitive.clone(), up.primitive.clone(), kept);
        let keep = |x| if kept == MatmulPrecision::Bf16 { B::to_bf16(x) } else { x };
        let prep = SwiGluBackward.prepare::<BalancedCheckpointing>([gate.node.clone(), up.node.clone()]);
        let prep = match kept {
            MatmulPrecision::F32 | MatmulPrecision::F16 => {
                let again = RecomputeSwiGlu([RecomputeInput::of(&gate), RecomputeInput::of(&up)]);
                prep.memory_bound().retro_forward(again).parents(tracked_parents([&gate, &up]))
            }
            // To recompute, the graph would have to keep both in f32.
            MatmulPrecision::Bf16 => prep.compute_bound(),
        };
        match prep.stateful() {
            OpsKind::Tracked(prep) => prep.finish((keep(gate.primitive), keep(up.primitive)), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn flash_attention([q, k, v]: [F<Self>; 3], visibility: &AttentionMask<Self>) -> (F<Self>, F<Self>) {
        let visibility = visibility.inner();
        let nodes = [q.node.clone(), k.node.clone(), v.node.clone()];
        let qkv = [q.primitive, k.primitive, v.primitive];
        let (output, lse) = B::flash_attention(qkv.clone(), &visibility);
        let tracked = match AttentionBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((qkv, visibility, lse.clone()), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        };
        (tracked, <Self as AutodiffBackend>::from_inner(lse))
    }

    fn linear_cross_entropy(
        hidden: F<Self>,
        head: WeightMatrix<Self>,
        targets: &Targets<Self>,
        (_, compute): ([bool; 2], MatmulPrecision),
    ) -> Losses<Self> {
        let targets = targets.inner();
        let (head_tracked, head_node, head) = match head {
            WeightMatrix::Dense(head) => (head.is_tracked(), head.node.clone(), WeightMatrix::Dense(head.primitive)),
            WeightMatrix::Packed(rows) => {
                // Packed rows have no node, so the node of a constant takes its place.
                let constant = <Self as AutodiffBackend>::from_inner(hidden.primitive.clone());
                (false, constant.node, WeightMatrix::Packed(rows.inner()))
            }
        };
        let wanted = [hidden.is_tracked(), head_tracked];
        let nodes = [hidden.node.clone(), head_node];
        let inputs = (hidden.primitive, head);
        let kept = B::linear_cross_entropy(inputs.0.clone(), inputs.1.clone(), &targets, (wanted, compute));
        let (losses, lse) = (kept.losses.clone(), kept.lse.clone());
        let losses = match CrossEntropyBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((inputs, targets, kept, compute), losses),
            OpsKind::UnTracked(prep) => prep.finish(losses),
        };
        Losses { losses, lse: <Self as AutodiffBackend>::from_inner(lse), sum_gradients: [None, None] }
    }
}
