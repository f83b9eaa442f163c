//! The driver: forward and backward passes over consecutive segments.
//!
//! ```text
//!  inputs ─► segment a ─► … ─► segment b ─► outputs          forward, which saves what backward needs
//!  their gradients ◄─ … ◄─────────────────── upstream        backward, or from the loss
//! ```
//!
//! A range that ends before the last segment is a stage of a pipeline. Several micro-batches may be between their two
//! passes; each has leaves of its own, because graphs that share leaves are one graph to Burn 0.21, which loses their
//! gradients once an earlier backward pass has used them.

use super::{
    BackwardPlan, Checkpointing, DeferredGradient, Direction, DynTensor, Gradient, PassId, Segments, TrainSegments,
    WeightProvider,
};
use crate::{
    Error,
    comm::{Lane, Trace},
};
use burn::{
    module::{ModuleVisitor, Param, ParamId},
    tensor::{FloatDType, Shape, Tensor, backend::AutodiffBackend, ops::FloatTensor},
};
use std::{collections::HashMap, ops::Range};

/// A segment whose backward pass has ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AfterBackward {
    pub segment: usize,
    /// The index of the micro-batch in the step.
    pub micro_batch: usize,
    /// False if gradients of weights of this segment may still come, because they were put off.
    pub complete: bool,
}

/// A hook that receives the gradients of a segment after the segment's weights have been released.
pub(crate) type PostBackwardHook<'a, B, S> =
    dyn FnMut(&mut S, AfterBackward, Vec<Gradient<<B as AutodiffBackend>::InnerBackend>>) -> Result<(), Error> + 'a;

/// The gradients of a segment's outputs or inputs; none for a tensor without gradient.
pub(crate) type ActivationGradients<B> = Vec<Option<DynTensor<<B as AutodiffBackend>::InnerBackend>>>;

/// A micro-batch on its way through consecutive segments.
pub(crate) struct SegmentPass<'a, Batch> {
    pub batch: &'a Batch,
    /// The index of the micro-batch in the step.
    pub micro_batch: usize,
    pub segments: Range<usize>,
}

impl<Batch> SegmentPass<'_, Batch> {
    pub(crate) fn id(&self) -> PassId {
        PassId { first_segment: self.segments.start, micro_batch: self.micro_batch }
    }
}

/// The data that a forward pass saves for its backward pass, of each segment with a graph.
pub(crate) struct Saved<B: AutodiffBackend>(Vec<SavedForBackward<B>>);

/// The data saved in the forward pass of a segment for its backward pass.
enum SavedForBackward<B: AutodiffBackend> {
    Graph { leaves: Vec<DynTensor<B>>, outputs: Vec<DynTensor<B>> },
    Inputs { inputs: Vec<DynTensor<B::InnerBackend>>, require_grad: bool },
}

/// The end of a forward pass.
pub(crate) struct ForwardEnd<B: AutodiffBackend> {
    /// The outputs of the last segment of the pass.
    pub outputs: Vec<DynTensor<B::InnerBackend>>,
    pub saved: Saved<B>,
}

/// The start of a backward pass.
pub(crate) struct BackwardStart<B: AutodiffBackend> {
    pub saved: Saved<B>,
    /// The gradients of the outputs; none stands for a gradient of ones of the loss.
    pub upstream: Option<ActivationGradients<B>>,
    /// True if gradients of weights are put off where the model can do that.
    pub defer: bool,
}

/// The gradient of a parameter, still to be computed, with the segment that uses the parameter.
pub(crate) struct PendingGradient<B: AutodiffBackend> {
    pub segment: usize,
    path: String,
    pub deferred: DeferredGradient<B::InnerBackend>,
}

impl<B: AutodiffBackend> PendingGradient<B> {
    /// Computes the gradient.
    pub(crate) fn compute(self) -> Gradient<B::InnerBackend> {
        Gradient { path: self.path, id: self.deferred.id, value: (self.deferred.compute)() }
    }
}

/// The end of a backward pass.
pub(crate) struct BackwardEnd<B: AutodiffBackend> {
    /// The gradients of the inputs.
    pub inputs: ActivationGradients<B>,
    /// The gradients that have been put off, in the order of the backward pass.
    pub pending: Vec<PendingGradient<B>>,
}

/// The settings of all passes of a step.
#[derive(Clone, Copy)]
pub(crate) struct Driver<'a> {
    pub plan: &'a BackwardPlan,
    pub checkpointing: Checkpointing,
    pub trace: &'a Trace,
}

impl Driver<'_> {
    /// Runs both passes over all segments; returns the detached loss of the last segment. The hook is called for every
    /// segment of the backward pass, with or without gradients.
    pub(crate) fn forward_backward<B: AutodiffBackend, M: TrainSegments<B>, S: WeightProvider<M>>(
        &self,
        source: &mut S,
        batch: &<M as Segments<B>>::Batch,
        hook: &mut PostBackwardHook<B, S>,
    ) -> Result<DynTensor<B::InnerBackend>, Error> {
        let pass = SegmentPass { batch, micro_batch: 0, segments: 0..self.plan.segments };
        let ForwardEnd { mut outputs, saved } = self.forward::<B, M, S>(source, &pass, Vec::new())?;
        self.backward::<B, M, S>(source, &pass, BackwardStart { saved, upstream: None, defer: false }, hook)?;
        Ok(outputs.remove(0))
    }

    /// Runs the forward pass from the outputs of the segment before; returns the outputs, of which the first is the
    /// loss after the last segment, and the saved data of each segment with a graph.
    pub(crate) fn forward<B: AutodiffBackend, M: TrainSegments<B>, S: WeightProvider<M>>(
        &self,
        source: &mut S,
        pass: &SegmentPass<<M as Segments<B>>::Batch>,
        inputs: Vec<DynTensor<B::InnerBackend>>,
    ) -> Result<ForwardEnd<B>, Error> {
        let (BackwardPlan { segments, first_trainable, .. }, batch) = (self.plan, pass.batch);
        let (mut saved, mut values) = (vec![], inputs);
        let mut inner = None;
        source.start_pass(pass.id());
        for segment in pass.segments.clone() {
            source.fetch_segment(Direction::Forward, segment)?;
            let model = source.model(pass.id());
            let (tracked, require_grad) = (segment >= *first_trainable, segment > *first_trainable);
            if tracked && self.checkpointing.keeps_graph(segment, *segments) {
                let leaves = leaves(values, require_grad);
                let run = || model.forward_segment(segment, batch, leaves.clone());
                let outputs = self.trace.numbered_span("forward", segment, Lane::Compute, run);
                values = outputs.iter().cloned().map(DynTensor::inner).collect();
                saved.push(SavedForBackward::Graph { leaves, outputs });
            } else {
                if tracked {
                    saved.push(SavedForBackward::Inputs { inputs: values.clone(), require_grad });
                }
                let (model, batch) = inner.get_or_insert_with(|| (model.valid(), M::inner_batch(batch)));
                let run = || model.forward_segment(segment, batch, values);
                values = self.trace.numbered_span("forward", segment, Lane::Compute, run);
            }
            if !S::ALWAYS_RESIDENT {
                inner = None;
            }
            source.release_segment(Direction::Forward, segment);
        }
        assert!(!values.is_empty(), "the segments {:?} of {segments} return no tensor", pass.segments);
        Ok(ForwardEnd { outputs: values, saved: Saved(saved) })
    }

    /// Runs the backward pass of segments after their forward pass, and frees their graphs; returns the gradients of
    /// the inputs. The hook is called for every segment from the first trainable one on. A parameter that several
    /// segments of the pass use is handed over once, with the summed gradient, together with the first of them.
    pub(crate) fn backward<B: AutodiffBackend, M: TrainSegments<B>, S: WeightProvider<M>>(
        &self,
        source: &mut S,
        pass: &SegmentPass<<M as Segments<B>>::Batch>,
        start: BackwardStart<B>,
        hook: &mut PostBackwardHook<B, S>,
    ) -> Result<BackwardEnd<B>, Error> {
        let BackwardStart { saved: Saved(mut saved), mut upstream, defer } = start;
        let mut collect = GradientCollector::new(self.plan, &pass.segments);
        for segment in pass.segments.clone().rev().take_while(|&segment| segment >= self.plan.first_trainable) {
            source.fetch_segment(Direction::Backward, segment)?;
            let saved = saved.pop().expect("one entry was saved for each segment with a graph");
            let model = source.model(pass.id());
            let run = || backward::<B, M>(model, pass.batch, segment, saved, upstream);
            let run = || if defer { M::defer_weight_gradients(run) } else { (run(), Vec::new()) };
            let ((grads, inputs), deferred) = self.trace.numbered_span("backward", segment, Lane::Compute, run);
            let found = collect.collect::<M>(model, segment, grads, deferred);
            source.release_segment(Direction::Backward, segment);
            hook(source, AfterBackward { segment, micro_batch: pass.micro_batch, complete: !defer }, found)?;
            upstream = Some(inputs);
        }
        source.finish_pass(pass.id());
        Ok(BackwardEnd { inputs: upstream.unwrap_or_default(), pending: collect.pending })
    }
}

fn leaves<B: AutodiffBackend>(values: Vec<DynTensor<B::InnerBackend>>, require_grad: bool) -> Vec<DynTensor<B>> {
    values.into_iter().map(|value| DynTensor::leaf(value, require_grad)).collect()
}

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

/// Returns a scalar whose gradient with respect to each output is that output's upstream gradient (ones for the loss,
/// the first output of the last segment), so that its backward pass computes the vector-Jacobian product; multiplication by 1 is exact in every dtype. The
/// scalar itself is not used and may overflow.
fn surrogate_loss<B: AutodiffBackend>(
    outputs: Vec<DynTensor<B>>,
    upstream: Option<ActivationGradients<B>>,
) -> FloatTensor<B> {
    let weighted: Vec<DynTensor<B>> = match upstream {
        None => outputs.into_iter().take(1).collect(),
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

/// Collects the gradients of parameters, segment by segment; those to which an earlier segment of the pass will add are
/// kept until then.
struct GradientCollector<'a, B: AutodiffBackend> {
    plan: &'a BackwardPlan,
    segments: &'a Range<usize>,
    segment: usize,
    path: Vec<String>,
    grads: Option<B::Gradients>,
    deferred: Vec<DeferredGradient<B::InnerBackend>>,
    partial_sums: HashMap<ParamId, DynTensor<B::InnerBackend>>,
    gradients: Vec<Gradient<B::InnerBackend>>,
    pending: Vec<PendingGradient<B>>,
}

impl<'a, B: AutodiffBackend> GradientCollector<'a, B> {
    fn new(plan: &'a BackwardPlan, segments: &'a Range<usize>) -> Self {
        Self {
            plan,
            segments,
            segment: 0,
            path: Vec::new(),
            grads: None,
            deferred: Vec::new(),
            partial_sums: HashMap::new(),
            gradients: Vec::new(),
            pending: Vec::new(),
        }
    }

    /// Returns the gradients to which no earlier segment of the pass will add.
    fn collect<M: TrainSegments<B>>(
        &mut self,
        model: &M,
        segment: usize,
        grads: Option<B::Gradients>,
        deferred: Vec<DeferredGradient<B::InnerBackend>>,
    ) -> Vec<Gradient<B::InnerBackend>> {
        (self.segment, self.grads, self.deferred) = (segment, grads, deferred);
        model.visit_segment(segment, self);
        self.grads = None;
        std::mem::take(&mut self.gradients)
    }
}

impl<B: AutodiffBackend> ModuleVisitor<B> for GradientCollector<'_, B> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let Some(first_use) = self.plan.first_use(param.id, self.segments) else { return };
        let (segment, path) = (self.segment, || self.path.join("."));
        for deferred in self.deferred.extract_if(.., |deferred| deferred.id == param.id) {
            self.pending.push(PendingGradient { segment, path: path(), deferred });
        }
        let new = self.grads.as_mut().and_then(|grads| param.val().grad_remove(grads)).map(DynTensor::new);
        let value = match (self.partial_sums.remove(&param.id), new) {
            (Some(sum), Some(new)) => sum.add(new),
            (sum, new) => match sum.or(new) {
                Some(value) => value,
                None => return,
            },
        };
        if first_use == segment {
            self.gradients.push(Gradient { path: path(), id: param.id, value });
        } else {
            self.partial_sums.insert(param.id, value);
        }
    }
}
