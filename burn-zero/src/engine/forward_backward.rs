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
    Engine, ShardingState, StepReport,
    step::{add_gradient_squares, retain_present},
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
    sharding::ShardLayout,
    stage::ZeroStage,
};
use burn::tensor::backend::{AutodiffBackend, Backend};
use std::collections::VecDeque;

impl<B: AutodiffBackend> Engine<B> {
    /// Runs the forward and backward pass of one micro-batch and accumulates its gradients; returns the sum of this
    /// rank's loss.
    ///
    /// The loss weights in `batch` must already be divided by the number of target tokens of the whole step, over all
    /// ranks and micro-batches. The sum of the gradients is then the gradient of the step, whatever the sizes of the
    /// micro-batches. Gradients are accumulated in f32.
    ///
    /// In stage 3 the first call takes this rank's weight shards and leaves placeholders of one element in the model,
    /// see [`Engine::with_full_params`]. The set of trainable parameters must not change from then on.
    ///
    /// # Errors
    /// Returns [`CommError::Lost`](crate::CommError::Lost) or another communication error if a rank is lost; the
    /// gradients are incomplete then.
    pub fn forward_backward<M: TrainSegments<B>>(
        &mut self,
        model: &mut M,
        batch: &<M as Segments<B>>::Batch,
    ) -> Result<f64, Error> {
        self.shard_model(model)?;
        let (communicator, overlap) = (&self.communicator, self.overlap);
        // With one rank a reduction is the identity, so it can wait until the step, unless it moves gradients off the
        // device.
        let gradients_sharded = self.sharding.stage >= ZeroStage::Gradients;
        let reduce_in_backward =
            if communicator.world_size() > 1 { gradients_sharded } else { self.host_optimizer.is_some() };
        let ShardingState { layout, device, reducer, weights } =
            self.sharding_state.as_mut().expect("the model was sharded above");
        let context = ShardContext { layout, communicator, device };
        let pass = ForwardBackward {
            context,
            weights: weights.as_mut(),
            checkpointing_and_prefetch: (self.checkpointing, usize::from(overlap)),
        };
        let (loss, gathered) = pass.run(
            model,
            batch,
            &mut GradientAccumulation { reducer, layout, communicator, reduce_in_backward, overlap },
        )?;
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
    pub fn forward_backward_step<M: TrainSegments<B>>(
        &mut self,
        model: &mut M,
        batch: &<M as Segments<B>>::Batch,
        learning_rate: f64,
    ) -> Result<(f64, StepReport), Error> {
        if self.max_grad_norm.is_some() || self.loss_scaler.is_some() {
            let loss = self.forward_backward(model, batch)?;
            return Ok((loss, self.step(model, learning_rate)?));
        }
        self.shard_model(model)?;
        let mut sharding_state = self.sharding_state.take().expect("the model was sharded above");
        let mut reducer = sharding_state.take_gradients();
        let done = self.optimizer_in_backward(model, batch, (&mut sharding_state, &mut reducer), learning_rate);
        sharding_state.reducer.peak = reducer.peak;
        self.sharding_state = Some(sharding_state);
        done
    }

    fn optimizer_in_backward<M: TrainSegments<B>>(
        &mut self,
        model: &mut M,
        batch: &<M as Segments<B>>::Batch,
        (sharding_state, reducer): (&mut ShardingState<B>, &mut GradientReducer<B::InnerBackend>),
        learning_rate: f64,
    ) -> Result<(f64, StepReport), Error> {
        let (communicator, overlap) = (self.communicator.clone(), usize::from(self.overlap));
        let ShardingState { layout, device, weights, .. } = sharding_state;
        let context = ShardContext { layout, communicator: &communicator, device };
        let pass = ForwardBackward {
            context,
            weights: weights.as_mut(),
            checkpointing_and_prefetch: (self.checkpointing, overlap),
        };
        let needs_transfer = communicator.world_size() > 1 || self.host_optimizer.is_some();
        let rates = Hyperparameters { lr: learning_rate, weight_decay: self.optimizer.weight_decay(), grad_scale: 1.0 };
        let updates = UpdatePipeline::new(self, context, rates);
        let (ready, squared_norm) = (VecDeque::new(), ExactSum::default());
        let mut sink = OptimizerInBackward { reducer, updates, needs_transfer, ready, squared_norm };
        let (loss, gathered) = pass.run(model, batch, &mut sink)?;
        let OptimizerInBackward { reducer: gradients, squared_norm: sum, .. } = sink;
        gradients.peak.gathered = gradients.peak.gathered.max(gathered);
        let norm = self.reduce_gradient_stats(layout, &sum, &[])?.norm;
        let report = self.finish_step(norm, false)?;
        if !norm.is_finite() {
            return Err(NumericError::NotFinite { step: self.steps - 1, norm }.into());
        }
        Ok((self.unscaled_loss(loss), report))
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
    /// The activation checkpointing, and the number of segments for which weights are prefetched.
    checkpointing_and_prefetch: (Checkpointing, usize),
}

impl<B: AutodiffBackend> ForwardBackward<'_, B> {
    /// Returns the loss and the largest number of bytes of gathered weights.
    fn run<M: TrainSegments<B>>(
        self,
        model: &mut M,
        batch: &<M as Segments<B>>::Batch,
        sink: &mut dyn GradientSink<B::InnerBackend>,
    ) -> Result<(DynTensor<B::InnerBackend>, usize), Error> {
        let Self { context, weights, checkpointing_and_prefetch: how } = self;
        match weights {
            None => {
                let mut whole = ReplicatedModel::take_from(model, context);
                let loss = run_segments(&mut whole, (batch, how.0), context.communicator, sink);
                Ok((whole.put_back(model, loss)?, 0))
            }
            Some(weights) => {
                let mut gathered = GatheredModel::new(model.clone(), weights, context, how);
                let loss = run_segments(&mut gathered, (batch, how.0), context.communicator, sink)?;
                Ok((loss, gathered.peak_bytes))
            }
        }
    }
}

fn run_segments<B, M, S>(
    source: &mut S,
    (batch, checkpointing): (&<M as Segments<B>>::Batch, Checkpointing),
    communicator: &AsyncCommunicator,
    sink: &mut dyn GradientSink<B::InnerBackend>,
) -> Result<DynTensor<B::InnerBackend>, Error>
where
    B: AutodiffBackend,
    M: TrainSegments<B>,
    S: segment::WeightProvider<M> + WeightStore<B::InnerBackend>,
{
    let trace = communicator.trace();
    let mut after = |source: &mut S, segment, found| sink.post_backward(source, segment, found);
    let drive = || segment::forward_backward_with::<B, M, S>(source, batch, (checkpointing, trace), &mut after);
    let loss = trace.span("micro-batch", Lane::Compute, drive)?;
    sink.finish(source)?;
    Ok(loss)
}

/// Accumulates gradients for a later optimizer step.
struct GradientAccumulation<'a, B: Backend> {
    reducer: &'a mut GradientReducer<B>,
    layout: &'a ShardLayout,
    communicator: &'a AsyncCommunicator,
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
        self.reducer.accumulate(self.layout, found);
        if self.reduce_in_backward {
            self.reducer.reduce_ready_after(self.layout, segment, self.communicator)?;
            if !self.overlap {
                self.reducer.wait_all(self.layout)?;
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
        let slots = layout.buckets[index].param_offsets.iter();
        let flags: Vec<u8> = slots.map(|&(parameter, _)| u8::from(self.reducer.has_gradient()[parameter])).collect();
        self.ready.push_back((index, communicator.submit("share", move |group| group.all_gather_object(&flags))));
        Ok(())
    }

    /// Starts updates until at most `max_waiting` ready buckets still wait for their gradients.
    fn update_ready(&mut self, store: &mut dyn WeightStore<B::InnerBackend>, max_waiting: usize) -> Result<(), Error> {
        let ShardContext { layout, device, .. } = self.updates.context;
        while self.ready.len() > max_waiting {
            let Some((index, flags)) = self.ready.pop_front() else { return Ok(()) };
            let device = self.updates.engine.host_optimizer.is_none().then_some(device);
            let gradients = self.reducer.take_bucket(layout, index, device)?;
            add_gradient_squares(&mut self.squared_norm, &gradients);
            let flags = flags.wait()?;
            let slot = |parameter| layout.buckets[index].param_offsets.iter().position(|&(slot, _)| slot == parameter);
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
        let ahead = usize::from(self.needs_transfer && self.updates.engine.overlap);
        for index in layout.buckets_ready_after(segment) {
            self.mark_ready(index)?;
            self.update_ready(store, ahead)?;
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
