//! The forward and backward pass of a micro-batch, and the two uses of its gradients: they are accumulated for a later
//! optimizer step, or, with the last micro-batch of a step, the parameters are updated during the backward pass
//! (optimizer in backward).
//!
//! ```text
//!  compute                  ─ backward 3 ──┬─ backward 2 ──┬─ backward 1 ──┬─ backward 0 ──┬─ …
//!  to host or other ranks                  └ gradients 3 ──┴─ gradients 2 ─┼─ gradients 1 ─┼─ …
//!  update on device or host                                                └─ update 3 ────┴─ update 2 ─ …
//! ```
//!
//! A bucket is ready when the backward pass has left the first segment that uses it: all its gradients exist then, and
//! the rest of the pass uses none of its weights. The engine waits for a ready bucket one segment later, at the same
//! point on every rank, so that all ranks submit the same collectives in the same order.

use super::{
    Engine, ShardingState, TrainStepOutput,
    step::{add_gradient_squares, reduce_gradient_stats, retain_present},
    update::UpdatePipeline,
};
use crate::{
    Error, NumericError,
    comm::{AsyncCommunicator, Collectives, Lane, Pending},
    gather::{GatheredModel, ReplicatedModel, ShardContext, WeightShards, WeightStore},
    norm::ExactSum,
    optimizer::Hyperparameters,
    reduce::GradientReducer,
    segment::{self, Checkpointing, DynTensor, Gradient, Segments, TrainSegments},
    stage::ZeroStage,
};
use burn::tensor::backend::{AutodiffBackend, Backend};
use std::collections::VecDeque;

impl<B: AutodiffBackend, M: TrainSegments<B>> Engine<B, M> {
    /// Takes an optimizer step of one micro-batch; returns the sum of this rank's loss before the step. It is
    /// [`Engine::forward_backward_step`] for callers that do not need the report.
    ///
    /// # Errors
    /// Returns the errors of [`Engine::forward_backward_step`].
    pub fn train_step(&mut self, batch: &<M as Segments<B>>::Batch, learning_rate: f64) -> Result<f64, Error> {
        self.forward_backward_step(batch, learning_rate).map(|output| output.loss)
    }

    /// Runs the forward and backward pass of one micro-batch and accumulates its gradients; returns the sum of this
    /// rank's loss.
    ///
    /// The loss weights in `batch` must already be divided by the number of target tokens of the whole step, over all
    /// ranks and micro-batches. The sum of the gradients is then the gradient of the step, whatever the sizes of the
    /// micro-batches. Gradients are accumulated in f32.
    ///
    /// # Errors
    /// Returns [`CommError::Lost`](crate::CommError::Lost) or another communication error if a rank is lost; the
    /// gradients are incomplete then.
    pub fn forward_backward(&mut self, batch: &<M as Segments<B>>::Batch) -> Result<f64, Error> {
        let Self { model, settings, communicator, sharded, states, .. } = self;
        let ShardingState { layout, device, reducer, weights } = sharded;
        let context = ShardContext { layout, communicator, device };
        // With one rank a reduction is the identity, so it can wait until the step, unless it moves gradients off the
        // device.
        let gradients_sharded = settings.sharding.stage >= ZeroStage::Gradients;
        let reduce_in_backward = if communicator.world_size() > 1 { gradients_sharded } else { states.host.is_some() };
        let pass = ForwardBackward {
            context,
            weights: weights.as_mut(),
            checkpointing: settings.checkpointing,
            prefetch: usize::from(settings.overlap),
        };
        let mut sink = GradientAccumulation { reducer, context, reduce_in_backward, overlap: settings.overlap };
        let (loss, gathered) = pass.run(model, batch, &mut sink)?;
        reducer.peak.gathered = reducer.peak.gathered.max(gathered);
        Ok(self.unscaled_loss(loss))
    }

    /// Runs the last micro-batch of a step and the optimizer step; returns the loss and the report of the step. The
    /// parameters are bit for bit those of [`Engine::forward_backward`] followed by [`Engine::step`].
    ///
    /// Without clipping and without a loss scaler the first update does not have to wait for all gradients. A bucket is
    /// then updated as soon as the backward pass has left the first segment that uses it, and its gradients are freed.
    /// So the gradients of the whole model never exist at once, provided that this is the only micro-batch of the step
    /// or that gradients are sharded. If the optimizer states are off the device, updates overlap with the backward
    /// pass, as in ZeRO-Offload (arXiv:2101.06840). That holds for every stage, world size and optimizer. With clipping
    /// or a loss scaler this method makes the two calls.
    ///
    /// # Errors
    /// Returns the errors of the two methods. One case differs: where updates have already begun,
    /// [`NumericError::NotFinite`] comes after the fact. Model and moments then hold values that are not finite, and
    /// training can only continue from a checkpoint.
    pub fn forward_backward_step(
        &mut self,
        batch: &<M as Segments<B>>::Batch,
        learning_rate: f64,
    ) -> Result<TrainStepOutput, Error> {
        if self.settings.max_grad_norm.is_some() || self.loss_scaler.is_some() {
            let loss = self.forward_backward(batch)?;
            return Ok(TrainStepOutput { loss, report: self.step(learning_rate)? });
        }
        let mut reducer = self.sharded.take_gradients();
        let result = self.optimizer_in_backward(batch, &mut reducer, learning_rate);
        self.sharded.reducer.peak = reducer.peak;
        result
    }

    fn optimizer_in_backward(
        &mut self,
        batch: &<M as Segments<B>>::Batch,
        reducer: &mut GradientReducer<B::InnerBackend>,
        learning_rate: f64,
    ) -> Result<TrainStepOutput, Error> {
        let Self { model, settings, communicator, sharded, states, .. } = self;
        let ShardingState { layout, device, weights, .. } = sharded;
        let context = ShardContext { layout, communicator, device };
        let pass = ForwardBackward {
            context,
            weights: weights.as_mut(),
            checkpointing: settings.checkpointing,
            prefetch: usize::from(settings.overlap),
        };
        let needs_transfer = communicator.world_size() > 1 || states.host.is_some();
        let weight_decay = settings.optimizer.weight_decay();
        let hyperparameters = Hyperparameters { lr: learning_rate, weight_decay, grad_scale: 1.0 };
        let updates = UpdatePipeline::new(settings, states, context, hyperparameters);
        let (ready, squared_norm) = (VecDeque::new(), ExactSum::default());
        let mut sink = OptimizerInBackward { reducer, updates, needs_transfer, ready, squared_norm };
        let (loss, gathered) = pass.run(model, batch, &mut sink)?;
        let squared_norm = sink.squared_norm;
        reducer.peak.gathered = reducer.peak.gathered.max(gathered);
        let norm = reduce_gradient_stats(context, &squared_norm, &[])?.norm;
        let report = self.finish_step(norm, false)?;
        if !norm.is_finite() {
            return Err(NumericError::NotFinite { step: self.steps - 1, norm }.into());
        }
        Ok(TrainStepOutput { loss: self.unscaled_loss(loss), report })
    }

    /// Returns the sum of a loss, with the loss scale divided out.
    fn unscaled_loss(&self, loss: DynTensor<B::InnerBackend>) -> f64 {
        let sum: f64 = loss.flatten().into_data().iter::<f64>().sum();
        sum / self.loss_scale()
    }
}

/// Receives the gradients of a micro-batch, segment by segment.
trait GradientSink<B: Backend> {
    /// Takes the gradients of a segment after its backward pass.
    fn post_backward(
        &mut self,
        store: &mut dyn WeightStore<B>,
        segment: usize,
        found: Vec<Gradient<B>>,
    ) -> Result<(), Error>;

    /// Called once when the backward pass has ended.
    fn finish(&mut self, store: &mut dyn WeightStore<B>) -> Result<(), Error>;
}

/// The forward and backward pass of one micro-batch.
struct ForwardBackward<'a, B: AutodiffBackend> {
    context: ShardContext<'a, B::InnerBackend>,
    /// The weight shards of stage 3; none if all weights are in the model.
    weights: Option<&'a mut WeightShards<B::InnerBackend>>,
    checkpointing: Checkpointing,
    /// The number of segments for which weights are prefetched.
    prefetch: usize,
}

impl<B: AutodiffBackend> ForwardBackward<'_, B> {
    /// Returns the loss and the largest number of bytes of gathered weights.
    fn run<M: TrainSegments<B>>(
        self,
        model: &mut M,
        batch: &<M as Segments<B>>::Batch,
        sink: &mut dyn GradientSink<B::InnerBackend>,
    ) -> Result<(DynTensor<B::InnerBackend>, usize), Error> {
        let Self { context, weights, checkpointing, prefetch } = self;
        match weights {
            None => {
                let mut replicated = ReplicatedModel::take_from(model, context);
                let loss = run_segments(&mut replicated, batch, checkpointing, context.communicator, sink);
                Ok((replicated.put_back(model, loss)?, 0))
            }
            Some(weights) => {
                let mut gathered = GatheredModel::new(model.clone(), weights, context, checkpointing, prefetch);
                let loss = run_segments(&mut gathered, batch, checkpointing, context.communicator, sink)?;
                Ok((loss, gathered.peak_bytes))
            }
        }
    }
}

fn run_segments<B, M, S>(
    source: &mut S,
    batch: &<M as Segments<B>>::Batch,
    checkpointing: Checkpointing,
    communicator: &AsyncCommunicator,
    sink: &mut dyn GradientSink<B::InnerBackend>,
) -> Result<DynTensor<B::InnerBackend>, Error>
where
    B: AutodiffBackend,
    M: TrainSegments<B>,
    S: segment::WeightProvider<M> + WeightStore<B::InnerBackend>,
{
    let trace = communicator.trace();
    let mut hook = |source: &mut S, segment, found| sink.post_backward(source, segment, found);
    let drive = || segment::forward_backward_with::<B, M, S>(source, batch, checkpointing, trace, &mut hook);
    let loss = trace.span("micro-batch", Lane::Compute, drive)?;
    sink.finish(source)?;
    Ok(loss)
}

/// Accumulates gradients for a later optimizer step.
struct GradientAccumulation<'a, B: Backend> {
    reducer: &'a mut GradientReducer<B>,
    context: ShardContext<'a, B>,
    /// True if buckets are reduced during the backward pass.
    reduce_in_backward: bool,
    overlap: bool,
}

impl<B: Backend> GradientSink<B> for GradientAccumulation<'_, B> {
    fn post_backward(
        &mut self,
        _: &mut dyn WeightStore<B>,
        segment: usize,
        found: Vec<Gradient<B>>,
    ) -> Result<(), Error> {
        let ShardContext { layout, communicator, .. } = self.context;
        self.reducer.accumulate(layout, found);
        if self.reduce_in_backward {
            self.reducer.reduce_ready_after(layout, segment, communicator)?;
            if !self.overlap {
                self.reducer.wait_all(layout)?;
            }
        }
        Ok(())
    }

    fn finish(&mut self, _: &mut dyn WeightStore<B>) -> Result<(), Error> {
        Ok(())
    }
}

/// Updates parameters during the backward pass (optimizer in backward).
struct OptimizerInBackward<'a, B: AutodiffBackend> {
    reducer: &'a mut GradientReducer<B::InnerBackend>,
    updates: UpdatePipeline<'a, B>,
    /// True if gradients are sent to other ranks or to the host.
    needs_transfer: bool,
    /// The buckets that have all their gradients, oldest first, each with one flag per parameter and rank: 1 if the
    /// rank had a gradient.
    ready: VecDeque<(usize, Pending<Vec<Vec<u8>>>)>,
    /// The sum of squares of this rank's gradients so far.
    squared_norm: ExactSum,
}

impl<B: AutodiffBackend> OptimizerInBackward<'_, B> {
    fn mark_ready(&mut self, index: usize) -> Result<(), Error> {
        let ShardContext { layout, communicator, .. } = self.updates.context;
        if self.needs_transfer {
            self.reducer.reduce(layout, index, communicator)?;
        }
        let parameters = layout.buckets[index].parameters();
        let flags: Vec<u8> = parameters.map(|index| u8::from(self.reducer.has_gradient()[index])).collect();
        self.ready.push_back((index, communicator.submit("share", move |group| group.all_gather_object(&flags))));
        Ok(())
    }

    /// Starts updates until at most `max_waiting` ready buckets still wait for their gradients.
    fn update_ready(&mut self, store: &mut dyn WeightStore<B::InnerBackend>, max_waiting: usize) -> Result<(), Error> {
        let ShardContext { layout, device, .. } = self.updates.context;
        while self.ready.len() > max_waiting {
            let Some((index, flags)) = self.ready.pop_front() else { return Ok(()) };
            let gradient_device = self.updates.states.host.is_none().then_some(device);
            let gradients = self.reducer.take_bucket(layout, index, gradient_device)?;
            add_gradient_squares(&mut self.squared_norm, &gradients, device);
            let flags = flags.wait()?;
            let slot = |parameter| layout.buckets[index].parameters().position(|other| other == parameter);
            let present = |parameter| slot(parameter).is_some_and(|slot| flags.iter().any(|flags| flags[slot] != 0));
            self.updates.update_bucket(store, index, retain_present(gradients, present))?;
            self.reducer.updating_bytes = self.updates.gradient_bytes();
        }
        Ok(())
    }
}

impl<B: AutodiffBackend> GradientSink<B::InnerBackend> for OptimizerInBackward<'_, B> {
    fn post_backward(
        &mut self,
        store: &mut dyn WeightStore<B::InnerBackend>,
        segment: usize,
        found: Vec<Gradient<B::InnerBackend>>,
    ) -> Result<(), Error> {
        let layout = self.updates.context.layout;
        self.reducer.accumulate(layout, found);
        let max_waiting = usize::from(self.needs_transfer && self.updates.settings.overlap);
        for index in layout.buckets_ready_after(segment) {
            self.mark_ready(index)?;
            self.update_ready(store, max_waiting)?;
        }
        Ok(())
    }

    fn finish(&mut self, store: &mut dyn WeightStore<B::InnerBackend>) -> Result<(), Error> {
        let trace = self.updates.context.communicator.trace();
        trace.span("step", Lane::Compute, || {
            self.update_ready(store, 0)?;
            self.updates.drain(store, 0)
        })
    }
}
