//! The backward passes of the kernels: what each keeps, and what it registers.

use super::{F, Kernels, Losses, Targets, Visibility};
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
use burn_peft::kernel::{Compute, Stored, found_before};

/// Registers the gradient of a parent that carries one.
fn register<B: Backend>(grads: &mut Gradients, node: Option<NodeId>, gradient: F<B>) {
    if let Some(id) = node {
        grads.register::<B>(id, gradient);
    }
}

/// What an operation whose output is made again, not kept, takes for it.
#[derive(Debug)]
enum Input<B: Backend> {
    /// What the graph holds.
    Node(NodeId),
    /// What no gradient reaches.
    Constant(F<B>),
}

impl<B: Backend> Input<B> {
    fn of(x: &F<Autodiff<B>>) -> Self {
        if x.is_tracked() { Self::Node(x.node.id) } else { Self::Constant(x.primitive.clone()) }
    }

    fn take(&self, states: &mut BackwardStates) -> F<B> {
        match self {
            Self::Node(id) => states.get_state::<F<B>>(id),
            Self::Constant(x) => x.clone(),
        }
    }
}

/// The parents that the graph must hold for an output to be made again.
fn held<B: Backend>(parents: [&F<Autodiff<B>>; 2]) -> impl Iterator<Item = &F<Autodiff<B>>> {
    parents.into_iter().filter(|parent| parent.is_tracked())
}

/// The output of the normalisation is cheap to make, and a product with weights that learn needs it again.
#[derive(Debug)]
struct Renorm<B: Backend>([Input<B>; 2], f64);

impl<B: Kernels> RetroForward for Renorm<B> {
    fn forward(&self, states: &mut BackwardStates, out: NodeId) {
        let [x, weight] = self.0.each_ref().map(|input| input.take(states));
        states.save(out, B::rms_norm(x, weight, self.1));
    }
}

/// So is that of the activation.
#[derive(Debug)]
struct Reactivate<B: Backend>([Input<B>; 2]);

impl<B: Kernels> RetroForward for Reactivate<B> {
    fn forward(&self, states: &mut BackwardStates, out: NodeId) {
        let [gate, up] = self.0.each_ref().map(|input| input.take(states));
        states.save(out, B::swiglu(gate, up, Compute::F32));
    }
}

#[derive(Debug)]
struct RmsNorm;

impl<B: Kernels> Backward<B, 2> for RmsNorm {
    type State = (F<B>, F<B>, f64);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([x_node, w_node], (x, weight, epsilon)) = (ops.parents, ops.state);
        let found = x_node.as_ref().and_then(|x| found_before::<B>(grads, &dy, |place| place.node = x.clone()));
        let (dx, dw) = B::rms_norm_backward(x, weight, (dy, found), (epsilon, w_node.is_some()));
        register::<B>(grads, x_node.map(|n| n.id), dx);
        if let Some(dw) = dw {
            register::<B>(grads, w_node.map(|n| n.id), dw);
        }
    }
}

/// State: the number of the table's rows, and which were taken.
#[derive(Debug)]
struct Embed;

impl<B: Kernels> Backward<B, 1> for Embed {
    type State = (usize, IntTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([node], (rows, ids)) = (ops.parents, ops.state);
        register::<B>(grads, node.map(|n| n.id), B::embed_backward(rows, ids, dy));
    }
}

/// State: cosines and negated sines.
#[derive(Debug)]
struct Rope;

impl<B: Kernels> Backward<B, 1> for Rope {
    type State = (F<B>, F<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([node], (cos, sin)) = (ops.parents, ops.state);
        register::<B>(grads, node.map(|n| n.id), B::rope(dy, cos, B::float_neg(sin)));
    }
}

/// State: gate and up, in bf16 if products of bf16 made them: halves what the largest activations take, at an error of the size
/// that they carry already.
#[derive(Debug)]
struct SwiGlu;

impl<B: Kernels> Backward<B, 2> for SwiGlu {
    type State = (F<B>, F<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([gate_node, up_node], (gate, up)) = (ops.parents, ops.state);
        let (d_gate, d_up) = B::swiglu_backward(gate, up, dy);
        register::<B>(grads, gate_node.map(|n| n.id), d_gate);
        register::<B>(grads, up_node.map(|n| n.id), d_up);
    }
}

/// State: queries, keys, values; visibility; log-sum-exp.
#[derive(Debug)]
struct Attention;

impl<B: Kernels> Backward<B, 3> for Attention {
    type State = ([F<B>; 3], Visibility<B>, F<B>);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (qkv, visibility, lse) = ops.state;
        let gradients = B::flash_attention_backward(qkv, &visibility, [lse, dy]);
        for (node, gradient) in ops.parents.into_iter().zip(gradients) {
            register::<B>(grads, node.map(|n| n.id), gradient);
        }
    }
}

/// State: hidden states and head, targets, what the forward pass gave.
#[derive(Debug)]
struct CrossEntropy;

impl<B: Kernels> Backward<B, 2> for CrossEntropy {
    type State = ((F<B>, Stored<B>), Targets<B>, Losses<B>, Compute);

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

fn inner_visibility<B: Backend, C: CheckpointStrategy>(outer: &Visibility<Autodiff<B, C>>) -> Visibility<B> {
    Visibility {
        query_segments: outer.query_segments.clone().inner(),
        query_positions: outer.query_positions.clone().inner(),
        key_segments: outer.key_segments.clone().inner(),
        key_positions: outer.key_positions.clone().inner(),
        window: outer.window,
    }
}

impl<B: Kernels, C: CheckpointStrategy> Kernels for Autodiff<B, C> {
    fn rms_norm(x: F<Self>, weight: F<Self>, epsilon: f64) -> F<Self> {
        let output = B::rms_norm(x.primitive.clone(), weight.primitive.clone(), epsilon);
        let again = Renorm([Input::of(&x), Input::of(&weight)], epsilon);
        let prep = RmsNorm.prepare::<BalancedCheckpointing>([x.node.clone(), weight.node.clone()]);
        match prep.memory_bound().retro_forward(again).parents(held([&x, &weight])).stateful() {
            OpsKind::Tracked(prep) => prep.finish((x.primitive, weight.primitive, epsilon), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn embed(table: F<Self>, ids: IntTensor<Self>) -> F<Self> {
        let [rows, _] = table.primitive.shape().dims();
        let output = B::embed(table.primitive, ids.clone());
        match Embed.prepare::<C>([table.node.clone()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((rows, ids), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn rope(x: F<Self>, cos: F<Self>, sin: F<Self>) -> F<Self> {
        let output = B::rope(x.primitive, cos.primitive.clone(), sin.primitive.clone());
        match Rope.prepare::<C>([x.node.clone()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((cos.primitive, sin.primitive), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn swiglu(gate: F<Self>, up: F<Self>, kept: Compute) -> F<Self> {
        let output = B::swiglu(gate.primitive.clone(), up.primitive.clone(), kept);
        let keep = |x| if kept == Compute::Bf16 { B::halved(x) } else { x };
        let prep = SwiGlu.prepare::<BalancedCheckpointing>([gate.node.clone(), up.node.clone()]);
        let prep = match kept {
            Compute::F32 | Compute::F16 => {
                let again = Reactivate([Input::of(&gate), Input::of(&up)]);
                prep.memory_bound().retro_forward(again).parents(held([&gate, &up]))
            }
            // The graph would hold both in f32.
            Compute::Bf16 => prep.compute_bound(),
        };
        match prep.stateful() {
            OpsKind::Tracked(prep) => prep.finish((keep(gate.primitive), keep(up.primitive)), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn flash_attention([q, k, v]: [F<Self>; 3], visibility: &Visibility<Self>) -> (F<Self>, F<Self>) {
        let visibility = inner_visibility(visibility);
        let nodes = [q.node.clone(), k.node.clone(), v.node.clone()];
        let qkv = [q.primitive, k.primitive, v.primitive];
        let (output, lse) = B::flash_attention(qkv.clone(), &visibility);
        let tracked = match Attention.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((qkv, visibility, lse.clone()), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        };
        (tracked, <Self as AutodiffBackend>::from_inner(lse))
    }

    fn linear_cross_entropy(
        hidden: F<Self>,
        head: Stored<Self>,
        targets: &Targets<Self>,
        (_, compute): ([bool; 2], Compute),
    ) -> Losses<Self> {
        let targets = Targets { ids: targets.ids.clone().inner(), weights: targets.weights.clone().inner() };
        let (head_tracked, head_node, head) = match head {
            Stored::Dense(head) => (head.is_tracked(), head.node.clone(), Stored::Dense(head.primitive)),
            Stored::Packed(rows) => {
                // Packed rows have no node; that of a constant stands in.
                let constant = <Self as AutodiffBackend>::from_inner(hidden.primitive.clone());
                (false, constant.node, Stored::Packed(rows.inner()))
            }
        };
        let wanted = [hidden.is_tracked(), head_tracked];
        let nodes = [hidden.node.clone(), head_node];
        let inputs = (hidden.primitive, head);
        let kept = B::linear_cross_entropy(inputs.0.clone(), inputs.1.clone(), &targets, (wanted, compute));
        let (losses, lse) = (kept.losses.clone(), kept.lse.clone());
        let losses = match CrossEntropy.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((inputs, targets, kept, compute), losses),
            OpsKind::UnTracked(prep) => prep.finish(losses),
        };
        Losses { losses, lse: <Self as AutodiffBackend>::from_inner(lse), unit: [None, None] }
    }
}
