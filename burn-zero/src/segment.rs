//! A model as a list of segments, and the driver that runs forward and backward passes segment by segment.
//!
//! [`forward_backward`] runs each segment on autodiff leaves detached from its inputs, and then runs the backward pass
//! from the loss. The graph of a segment is kept or recomputed according to [`Checkpointing`] (activation
//! checkpointing); its gradients are handed over and freed before those of the next segment are computed.

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
mod weight_provider;

use plan::BackwardPlan;
use weight_provider::ResidentModel;
pub(crate) use weight_provider::{Direction, WeightProvider, detach_parameters};

/// A float tensor whose rank is known only at run time; segments exchange such tensors.
#[derive(Clone, Debug)]
pub struct DynTensor<B: Backend>(FloatTensor<B>);

impl<B: Backend> DynTensor<B> {
    /// Wraps a tensor of any rank.
    pub fn new<const D: usize>(tensor: Tensor<B, D>) -> Self {
        Self(tensor.into_primitive().tensor())
    }

    /// Returns the tensor with rank `D`.
    ///
    /// # Panics
    /// Panics if the tensor has another rank.
    pub fn tensor<const D: usize>(self) -> Tensor<B, D> {
        let shape = self.0.shape();
        assert_eq!(shape.num_dims(), D, "a tensor of shape {shape:?} does not have rank {D}");
        Tensor::from_primitive(TensorPrimitive::Float(self.0))
    }

    /// Returns the backend's tensor.
    pub fn primitive(self) -> FloatTensor<B> {
        self.0
    }

    /// Wraps the backend's tensor.
    pub fn from_primitive(primitive: FloatTensor<B>) -> Self {
        Self(primitive)
    }

    /// Returns the elements in row-major order, `[elements]`.
    pub fn flatten(self) -> Tensor<B, 1> {
        let elements = self.0.shape().num_elements();
        Self(B::float_reshape(self.0, Shape::new([elements]))).tensor()
    }

    /// Adds a tensor of the same shape.
    pub(crate) fn add(self, other: Self) -> Self {
        Self(B::float_add(self.0, other.0))
    }

    /// Returns the same elements in another shape.
    pub(crate) fn reshape(self, dims: &[usize]) -> Self {
        Self(B::float_reshape(self.0, Shape::from(dims.to_vec())))
    }

    /// Returns the size of every dimension.
    pub(crate) fn dims(&self) -> Vec<usize> {
        self.0.shape().to_vec()
    }

    /// Returns the number of elements.
    pub(crate) fn elements(&self) -> usize {
        self.0.shape().num_elements()
    }

    /// Returns the dtype of the elements.
    pub(crate) fn dtype(&self) -> DType {
        self.0.dtype()
    }

    /// Returns the bytes of the elements.
    pub(crate) fn bytes(&self) -> usize {
        self.elements() * self.0.dtype().size()
    }

    /// Converts to f32; a tensor in f32 is returned unchanged.
    pub(crate) fn into_f32(self) -> Self {
        self.into_dtype(DType::F32)
    }

    /// Converts to another dtype; a tensor that has the dtype already is returned unchanged.
    pub(crate) fn into_dtype(self, dtype: DType) -> Self {
        if self.0.dtype() == dtype { self } else { Self(B::float_cast(self.0, FloatDType::from(dtype))) }
    }
}

impl<B: AutodiffBackend> DynTensor<B> {
    /// Returns the tensor without its graph.
    fn inner(self) -> DynTensor<B::InnerBackend> {
        DynTensor(B::inner(self.0))
    }

    /// Creates a leaf of a new graph.
    fn leaf(inner: DynTensor<B::InnerBackend>, require_grad: bool) -> Self {
        Self(B::float_set_require_grad(B::from_inner(inner.0), require_grad))
    }
}

/// A model as a list of segments. Segment 0 takes no inputs; each later segment takes the outputs of the one before.
///
/// The last segment returns one tensor: the loss, of any shape. Its sum is differentiated.
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
    let mut each = |_: &mut ResidentModel<M>, _, found: Vec<_>| {
        if !found.is_empty() {
            sink(found);
        }
        Ok(())
    };
    let trace = Trace::default();
    match forward_backward_with(&mut ResidentModel::new(model), batch, checkpointing, &trace, &mut each) {
        Ok(loss) => loss,
        Err(error) => unreachable!("neither a resident model nor this hook can fail: {error}"),
    }
}

/// A hook that receives the gradients of a segment, with its index, after the segment's weights have been released.
pub(crate) type PostBackwardHook<'a, B, S> =
    dyn FnMut(&mut S, usize, Vec<Gradient<<B as AutodiffBackend>::InnerBackend>>) -> Result<(), Error> + 'a;

/// Runs [`forward_backward`] with weights from a provider. The hook is called for every segment of the backward pass,
/// with or without gradients.
pub(crate) fn forward_backward_with<B: AutodiffBackend, M: TrainSegments<B>, S: WeightProvider<M>>(
    source: &mut S,
    batch: &<M as Segments<B>>::Batch,
    checkpointing: Checkpointing,
    trace: &Trace,
    hook: &mut PostBackwardHook<B, S>,
) -> Result<DynTensor<B::InnerBackend>, Error> {
    let (plan, segments) = (BackwardPlan::new(source.model()), source.model().segments());
    let (loss, mut saved) = forward(source, batch, checkpointing, trace, &plan)?;
    let mut pending = HashMap::new();
    let mut upstream = None; // None stands for a gradient of ones: the loss.
    for segment in (plan.first_trainable..segments).rev() {
        source.fetch_segment(Direction::Backward, segment)?;
        let saved = saved.pop().expect("one entry was saved for each segment with a graph");
        let run = || backward(source.model(), batch, segment, saved, upstream);
        let (grads, inputs) = trace.numbered_span("backward", segment, Lane::Compute, run);
        let mut collect = SegmentGradientCollector {
            plan: &plan,
            segment,
            path: vec![],
            grads,
            partial_sums: &mut pending,
            gradients: vec![],
        };
        source.model().visit_segment(segment, &mut collect);
        let SegmentGradientCollector { gradients: found, grads, .. } = collect;
        drop(grads);
        source.release_segment(Direction::Backward, segment);
        hook(source, segment, found)?;
        upstream = Some(inputs);
    }
    Ok(loss)
}

/// The data saved in the forward pass of a segment for its backward pass.
enum SavedForBackward<B: AutodiffBackend> {
    Graph { leaves: Vec<DynTensor<B>>, outputs: Vec<DynTensor<B>> },
    Inputs { inputs: Vec<DynTensor<B::InnerBackend>>, require_grad: bool },
}

/// The loss, and the saved data of each segment with a graph.
type ForwardOutput<B> = (DynTensor<<B as AutodiffBackend>::InnerBackend>, Vec<SavedForBackward<B>>);

/// Runs the forward pass; returns the loss and the saved data of each segment from the first trainable one on.
fn forward<B: AutodiffBackend, M: TrainSegments<B>, S: WeightProvider<M>>(
    source: &mut S,
    batch: &<M as Segments<B>>::Batch,
    checkpointing: Checkpointing,
    trace: &Trace,
    plan: &BackwardPlan,
) -> Result<ForwardOutput<B>, Error> {
    let segments = source.model().segments();
    let (mut saved, mut values) = (vec![], vec![]);
    let mut inner = None;
    for segment in 0..segments {
        source.fetch_segment(Direction::Forward, segment)?;
        let model = source.model();
        let (tracked, require_grad) = (segment >= plan.first_trainable, segment > plan.first_trainable);
        if tracked && checkpointing.keeps_graph(segment, segments) {
            let leaves = leaves(values, require_grad);
            let run = || model.forward_segment(segment, batch, leaves.clone());
            let outputs = trace.numbered_span("forward", segment, Lane::Compute, run);
            values = outputs.iter().cloned().map(DynTensor::inner).collect();
            saved.push(SavedForBackward::Graph { leaves, outputs });
        } else {
            if tracked {
                saved.push(SavedForBackward::Inputs { inputs: values.clone(), require_grad });
            }
            let (model, batch) = inner.get_or_insert_with(|| (model.valid(), M::inner_batch(batch)));
            let run = || model.forward_segment(segment, batch, values);
            values = trace.numbered_span("forward", segment, Lane::Compute, run);
        }
        if !S::ALWAYS_RESIDENT {
            inner = None;
        }
        source.release_segment(Direction::Forward, segment);
    }
    assert_eq!(values.len(), 1, "the last of {segments} segments must return one tensor, the loss");
    Ok((values.remove(0), saved))
}

fn leaves<B: AutodiffBackend>(values: Vec<DynTensor<B::InnerBackend>>, require_grad: bool) -> Vec<DynTensor<B>> {
    values.into_iter().map(|value| DynTensor::leaf(value, require_grad)).collect()
}

/// The gradients of a segment's outputs or inputs; none for a tensor without gradient.
type ActivationGradients<B> = Vec<Option<DynTensor<<B as AutodiffBackend>::InnerBackend>>>;

/// Runs the backward pass of one segment from the gradients of its outputs; returns the gradients of its parameters
/// (none if no output has a gradient) and of its inputs.
fn backward<B: AutodiffBackend, M: TrainSegments<B>>(
    model: &M,
    batch: &<M as Segments<B>>::Batch,
    segment: usize,
    saved: SavedForBackward<B>,
    upstream: Option<ActivationGradients<B>>,
) -> (Option<B::Gradients>, ActivationGradients<B>) {
    if upstream.as_ref().is_some_and(|gradients| gradients.iter().all(Option::is_none)) {
        let inputs = match saved {
            SavedForBackward::Graph { leaves, .. } => leaves.len(),
            SavedForBackward::Inputs { inputs, .. } => inputs.len(),
        };
        return (None, vec![None; inputs]);
    }
    let (leaves, outputs) = match saved {
        SavedForBackward::Graph { leaves, outputs } => (leaves, outputs),
        SavedForBackward::Inputs { inputs, require_grad } => {
            let leaves = leaves(inputs, require_grad);
            let outputs = model.forward_segment(segment, batch, leaves.clone());
            (leaves, outputs)
        }
    };
    let mut grads = B::backward(surrogate_loss(outputs, upstream));
    let inputs = leaves.iter().map(|leaf| B::grad_remove(&leaf.0, &mut grads).map(DynTensor)).collect();
    (Some(grads), inputs)
}

/// Returns a scalar whose gradient with respect to each output is that output's upstream gradient (ones for the loss),
/// so that its backward pass computes the vector-Jacobian product; multiplication by 1 is exact in every dtype. The
/// scalar itself is not used and may overflow.
fn surrogate_loss<B: AutodiffBackend>(
    outputs: Vec<DynTensor<B>>,
    upstream: Option<ActivationGradients<B>>,
) -> FloatTensor<B> {
    let weighted: Vec<DynTensor<B>> = match upstream {
        None => outputs,
        Some(gradients) => {
            assert_eq!(gradients.len(), outputs.len(), "the outputs of a segment are the inputs of the next");
            let pairs = outputs.into_iter().zip(gradients);
            let weigh = |(y, dy): (DynTensor<B>, Option<_>)| {
                Some(DynTensor(B::float_mul(y.0, DynTensor::<B>::leaf(dy?, false).0)))
            };
            pairs.filter_map(weigh).collect()
        }
    };
    // Outputs may have no graph, but a backward pass needs a scalar with one: add a zero leaf to the sum.
    let device = weighted.first().map(|value| B::float_device(&value.0)).unwrap_or_default();
    let zero = B::float_zeros(Shape::new([1]), &device, FloatDType::F32);
    let zero = DynTensor::<B>(B::float_set_require_grad(zero, true));
    weighted.into_iter().map(|value| DynTensor(B::float_sum(value.0)).into_f32()).fold(zero, DynTensor::add).0
}

/// Collects the gradients of one segment's parameters; returns those to which no earlier segment will add.
struct SegmentGradientCollector<'a, B: AutodiffBackend> {
    plan: &'a BackwardPlan,
    segment: usize,
    path: Vec<String>,
    grads: Option<B::Gradients>,
    partial_sums: &'a mut HashMap<ParamId, DynTensor<B::InnerBackend>>,
    gradients: Vec<Gradient<B::InnerBackend>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for SegmentGradientCollector<'_, B> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let Some(&first_use) = self.plan.first_use.get(&param.id) else { return };
        let new = self.grads.as_mut().and_then(|grads| param.val().grad_remove(grads)).map(DynTensor::new);
        let value = match (self.partial_sums.remove(&param.id), new) {
            (Some(sum), Some(new)) => sum.add(new),
            (sum, new) => match sum.or(new) {
                Some(value) => value,
                None => return,
            },
        };
        if first_use == self.segment {
            self.gradients.push(Gradient { path: self.path.join("."), id: param.id, value });
        } else {
            self.partial_sums.insert(param.id, value);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
