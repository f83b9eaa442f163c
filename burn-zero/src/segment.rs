//! A model as a list of segments, and the driver that differentiates them one at a time.
//!
//! [`run`] runs each segment on autodiff leaves cut from its inputs and walks backward from the loss. What a segment's graph
//! needs is kept or made again as [`Checkpointing`] says; its gradients are handed over and freed before the next segment's
//! are made.

use crate::{
    Error,
    comm::{Lane, Trace},
};
use burn::{
    module::{AutodiffModule, Module, ModuleVisitor, Param, ParamId},
    tensor::{
        DType, FloatDType, Shape, Tensor, TensorMetadata, TensorPrimitive,
        backend::{AutodiffBackend, Backend},
        ops::FloatTensor,
    },
};
use std::collections::HashMap;

mod plan;
mod source;

use plan::Plan;
use source::Resident;
pub(crate) use source::{Source, Sweep, fresh};

/// A float tensor of any rank: what passes between segments.
#[derive(Clone, Debug)]
pub struct Value<B: Backend>(FloatTensor<B>);

impl<B: Backend> Value<B> {
    /// Forgets the rank of `tensor`.
    pub fn new<const D: usize>(tensor: Tensor<B, D>) -> Self {
        Self(tensor.into_primitive().tensor())
    }

    /// The tensor, of rank `D`.
    ///
    /// # Panics
    /// If the rank is another.
    pub fn tensor<const D: usize>(self) -> Tensor<B, D> {
        let shape = self.0.shape();
        assert_eq!(shape.num_dims(), D, "a value of shape {shape:?} was taken as a tensor of rank {D}");
        Tensor::from_primitive(TensorPrimitive::Float(self.0))
    }

    /// The backend's tensor.
    pub fn primitive(self) -> FloatTensor<B> {
        self.0
    }

    /// Wraps the backend's tensor.
    pub fn from_primitive(primitive: FloatTensor<B>) -> Self {
        Self(primitive)
    }

    /// The elements in row-major order, `[elements]`.
    pub fn flatten(self) -> Tensor<B, 1> {
        let elements = self.0.shape().num_elements();
        Self(B::float_reshape(self.0, Shape::new([elements]))).tensor()
    }

    /// The sum with a value of the same shape.
    pub(crate) fn add(self, other: Self) -> Self {
        Self(B::float_add(self.0, other.0))
    }

    /// The same elements in another shape.
    pub(crate) fn reshape(self, dims: &[usize]) -> Self {
        Self(B::float_reshape(self.0, Shape::from(dims.to_vec())))
    }

    /// The number of elements.
    pub(crate) fn elements(&self) -> usize {
        self.0.shape().num_elements()
    }

    /// The type of the elements.
    pub(crate) fn dtype(&self) -> DType {
        self.0.dtype()
    }

    /// The bytes of the elements.
    pub(crate) fn bytes(&self) -> usize {
        self.elements() * self.0.dtype().size()
    }

    /// The same value in f32; the value itself where it is f32 already.
    pub(crate) fn into_f32(self) -> Self {
        self.into_dtype(DType::F32)
    }

    /// The same value in another type; the value itself where it has that type already.
    pub(crate) fn into_dtype(self, dtype: DType) -> Self {
        if self.0.dtype() == dtype { self } else { Self(B::float_cast(self.0, FloatDType::from(dtype))) }
    }
}

impl<B: AutodiffBackend> Value<B> {
    /// The value without its graph.
    fn inner(self) -> Value<B::InnerBackend> {
        Value(B::inner(self.0))
    }

    /// A leaf of a new graph.
    fn leaf(inner: Value<B::InnerBackend>, require_grad: bool) -> Self {
        Self(B::float_set_require_grad(B::from_inner(inner.0), require_grad))
    }
}

/// A model as a list of segments. Segment 0 takes no values, each later one takes what the one before returned.
///
/// The last segment returns one value: the loss, of any shape; its sum is what is differentiated.
pub trait Segments<B: Backend>: Module<B> {
    /// What every segment may look at: tokens, positions, targets, weights of the loss.
    type Batch: Clone;

    /// The number of segments, at least 1.
    fn segments(&self) -> usize;

    /// Runs one segment. Called twice on the same inputs it must return the same values.
    fn forward_segment(&self, segment: usize, batch: &Self::Batch, inputs: Vec<Value<B>>) -> Vec<Value<B>>;
}

/// What training asks of [`Segments`] besides.
pub trait TrainSegments<B: AutodiffBackend>:
    AutodiffModule<B, InnerModule: Segments<B::InnerBackend>> + Segments<B>
{
    /// The same batch for the inner module (handles only, no copies).
    fn inner_batch(
        batch: &<Self as Segments<B>>::Batch,
    ) -> <<Self as AutodiffModule<B>>::InnerModule as Segments<B::InnerBackend>>::Batch;

    /// Visits the parameters that one segment uses, with full paths: `enter_module` for each part of the path, as
    /// `Module::visit` of the whole model would.
    fn visit_segment<V: ModuleVisitor<B>>(&self, segment: usize, visitor: &mut V);
}

/// Which segments' graphs are made again in the backward pass instead of being kept. The last segment's is kept except with
/// [`Checkpointing::All`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checkpointing {
    /// Keep every graph: the most memory, no work done twice.
    #[default]
    None,
    /// Make the graph of every `k`-th segment again, those whose number is divisible by `k`; 0 is [`Checkpointing::None`].
    Every(usize),
    /// Make every graph again: memory for the segments' inputs and one segment's graph.
    Full,
    /// As [`Checkpointing::Full`], and the last segment's too. That is one more run of the head for nothing but the weights of
    /// ZeRO stage 3, which then do not stay gathered over the turn.
    All,
}

impl Checkpointing {
    /// Whether the graph of a segment is kept for the backward pass.
    pub(crate) fn keeps(self, segment: usize, segments: usize) -> bool {
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
    /// The parameter's path in the model, parts joined by dots.
    pub path: String,
    /// The parameter's identity.
    pub id: ParamId,
    /// The gradient, of the parameter's shape.
    pub value: Value<B>,
}

/// Runs a batch forward and backward; returns the loss as the last segment did, detached.
///
/// `sink` gets a segment's gradients right after that segment's backward, last segment first. A parameter used by several
/// segments is handed over once, summed, with the earliest of them. Parameters that need no gradient get none, and the
/// backward pass ends at the first segment with one that does. Segments before it run without a graph.
pub fn run<B: AutodiffBackend, M: TrainSegments<B>>(
    model: &M,
    batch: &<M as Segments<B>>::Batch,
    checkpointing: Checkpointing,
    sink: &mut dyn FnMut(Vec<Gradient<B::InnerBackend>>),
) -> Value<B::InnerBackend> {
    let mut each = |_: &mut Resident<M>, _, found: Vec<_>| {
        if !found.is_empty() {
            sink(found);
        }
        Ok(())
    };
    let trace = Trace::default();
    match drive(&mut Resident::new(model), batch, (checkpointing, &trace), &mut each) {
        Ok(loss) => loss,
        Err(error) => unreachable!("neither a model at hand nor this sink can fail: {error}"),
    }
}

/// What takes the gradients of a segment, by its number, when the source has left it.
pub(crate) type Sink<'a, B, S> =
    dyn FnMut(&mut S, usize, Vec<Gradient<<B as AutodiffBackend>::InnerBackend>>) -> Result<(), Error> + 'a;

/// [`run`] with weights from a source. The sink is called for every segment of the backward pass, with or without gradients.
pub(crate) fn drive<B: AutodiffBackend, M: TrainSegments<B>, S: Source<M>>(
    source: &mut S,
    batch: &<M as Segments<B>>::Batch,
    (checkpointing, trace): (Checkpointing, &Trace),
    sink: &mut Sink<B, S>,
) -> Result<Value<B::InnerBackend>, Error> {
    let (plan, segments) = (Plan::new(source.model()), source.model().segments());
    let (loss, mut saved) = forward(source, batch, (checkpointing, trace), &plan)?;
    let mut pending = HashMap::new();
    let mut upstream = None; // the loss: a gradient of ones
    for segment in (plan.first..segments).rev() {
        source.enter(Sweep::Backward, segment)?;
        let saved = saved.pop().expect("one entry was saved for each segment with a graph");
        let walk = || backward(source.model(), batch, segment, (saved, upstream));
        let (grads, inputs) = trace.span_of(("backward", segment), Lane::Compute, walk);
        let mut collect = Collect { plan: &plan, segment, path: vec![], grads, pending: &mut pending, found: vec![] };
        source.model().visit_segment(segment, &mut collect);
        let Collect { found, grads, .. } = collect;
        drop(grads);
        source.leave(Sweep::Backward, segment);
        sink(source, segment, found)?;
        upstream = Some(inputs);
    }
    Ok(loss)
}

/// What the backward pass of a segment starts from.
enum Saved<B: AutodiffBackend> {
    Graph { leaves: Vec<Value<B>>, outputs: Vec<Value<B>> },
    Inputs { inputs: Vec<Value<B::InnerBackend>>, require_grad: bool },
}

/// The loss, and what was saved of each segment with a graph.
type Forward<B> = (Value<<B as AutodiffBackend>::InnerBackend>, Vec<Saved<B>>);

/// The loss, and what was saved of each segment from the plan's first on.
fn forward<B: AutodiffBackend, M: TrainSegments<B>, S: Source<M>>(
    source: &mut S,
    batch: &<M as Segments<B>>::Batch,
    (checkpointing, trace): (Checkpointing, &Trace),
    plan: &Plan,
) -> Result<Forward<B>, Error> {
    let segments = source.model().segments();
    let (mut saved, mut values) = (vec![], vec![]);
    let mut inner = None;
    for segment in 0..segments {
        source.enter(Sweep::Forward, segment)?;
        let model = source.model();
        let (tracked, require_grad) = (segment >= plan.first, segment > plan.first);
        if tracked && checkpointing.keeps(segment, segments) {
            let leaves = leaves(values, require_grad);
            let run = || model.forward_segment(segment, batch, leaves.clone());
            let outputs = trace.span_of(("forward", segment), Lane::Compute, run);
            values = outputs.iter().cloned().map(Value::inner).collect();
            saved.push(Saved::Graph { leaves, outputs });
        } else {
            if tracked {
                saved.push(Saved::Inputs { inputs: values.clone(), require_grad });
            }
            let (model, batch) = inner.get_or_insert_with(|| (model.valid(), M::inner_batch(batch)));
            let run = || model.forward_segment(segment, batch, values);
            values = trace.span_of(("forward", segment), Lane::Compute, run);
        }
        if !S::STAYS {
            inner = None;
        }
        source.leave(Sweep::Forward, segment);
    }
    assert_eq!(values.len(), 1, "the last of {segments} segments must return one value, the loss");
    Ok((values.remove(0), saved))
}

fn leaves<B: AutodiffBackend>(values: Vec<Value<B::InnerBackend>>, require_grad: bool) -> Vec<Value<B>> {
    values.into_iter().map(|value| Value::leaf(value, require_grad)).collect()
}

/// For each output of a segment, or input, its gradient if it has one.
type Gradients<B> = Vec<Option<Value<<B as AutodiffBackend>::InnerBackend>>>;

/// One segment's backward from the gradients of its outputs: the gradients of the parameters, none if no output has a
/// gradient, and of the inputs.
fn backward<B: AutodiffBackend, M: TrainSegments<B>>(
    model: &M,
    batch: &<M as Segments<B>>::Batch,
    segment: usize,
    (saved, upstream): (Saved<B>, Option<Gradients<B>>),
) -> (Option<B::Gradients>, Gradients<B>) {
    if upstream.as_ref().is_some_and(|gradients| gradients.iter().all(Option::is_none)) {
        let inputs = match saved {
            Saved::Graph { leaves, .. } => leaves.len(),
            Saved::Inputs { inputs, .. } => inputs.len(),
        };
        return (None, vec![None; inputs]);
    }
    let (leaves, outputs) = match saved {
        Saved::Graph { leaves, outputs } => (leaves, outputs),
        Saved::Inputs { inputs, require_grad } => {
            let leaves = leaves(inputs, require_grad);
            let outputs = model.forward_segment(segment, batch, leaves.clone());
            (leaves, outputs)
        }
    };
    let mut grads = B::backward(seed(outputs, upstream));
    let inputs = leaves.iter().map(|leaf| B::grad_remove(&leaf.0, &mut grads).map(Value)).collect();
    (Some(grads), inputs)
}

/// A scalar whose gradient with respect to each output is that output's upstream gradient, or ones for the loss: a product
/// with 1 is exact in every dtype. The value is of no use and may overflow.
fn seed<B: AutodiffBackend>(outputs: Vec<Value<B>>, upstream: Option<Gradients<B>>) -> FloatTensor<B> {
    let weighted: Vec<Value<B>> = match upstream {
        None => outputs,
        Some(gradients) => {
            assert_eq!(gradients.len(), outputs.len(), "the outputs of a segment are the inputs of the next");
            let pairs = outputs.into_iter().zip(gradients);
            let weigh = |(y, dy): (Value<B>, Option<_>)| Some(Value(B::float_mul(y.0, Value::<B>::leaf(dy?, false).0)));
            pairs.filter_map(weigh).collect()
        }
    };
    // Outputs without a graph are legal, a backward pass from a scalar without one is not: a leaf of zero joins the sum.
    let device = weighted.first().map(|value| B::float_device(&value.0)).unwrap_or_default();
    let zero = B::float_zeros(Shape::new([1]), &device, FloatDType::F32);
    let zero = Value::<B>(B::float_set_require_grad(zero, true));
    weighted.into_iter().map(|value| Value(B::float_sum(value.0)).into_f32()).fold(zero, Value::add).0
}

/// Takes the gradients of one segment's parameters, and hands out those that no earlier segment adds to.
struct Collect<'a, B: AutodiffBackend> {
    plan: &'a Plan,
    segment: usize,
    path: Vec<String>,
    grads: Option<B::Gradients>,
    pending: &'a mut HashMap<ParamId, Value<B::InnerBackend>>,
    found: Vec<Gradient<B::InnerBackend>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Collect<'_, B> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let Some(&first_use) = self.plan.first_use.get(&param.id) else { return };
        let new = self.grads.as_mut().and_then(|grads| param.val().grad_remove(grads)).map(Value::new);
        let value = match (self.pending.remove(&param.id), new) {
            (Some(sum), Some(new)) => sum.add(new),
            (sum, new) => match sum.or(new) {
                Some(value) => value,
                None => return,
            },
        };
        if first_use == self.segment {
            self.found.push(Gradient { path: self.path.join("."), id: param.id, value });
        } else {
            self.pending.insert(param.id, value);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
