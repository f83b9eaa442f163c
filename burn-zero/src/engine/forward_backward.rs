//! The forward and backward passes of a step's micro-batches, and the two uses of their gradients: they are accumulated
//! for a later optimizer step, or, with the last micro-batch of a step, the parameters are updated during the backward
//! pass (optimizer in backward).
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
    Engine, EngineSettings, ShardingState, TrainStepOutput,
    stages::PipelineAxis,
    step::{add_gradient_squares, reduce_gradient_stats, retain_present},
    update::UpdatePipeline,
};
use crate::{
    Error, NumericError,
    comm::{AsyncCommunicator, Collectives, Lane, Pending},
    gather::{GatheredModel, ReplicatedModel, ShardContext, WeightShards, WeightStore},
    norm::ExactSum,
    optimizer::Hyperparameters,
    pipeline::{Executed, Executor, Instruction, Program},
    reduce::GradientReducer,
    segment::{AfterBackward, BackwardPlan, Driver, Gradient, Segments, TrainSegments, WeightProvider},
    stage::ZeroStage,
};
use burn::tensor::backend::{AutodiffBackend, Backend};
use std::collections::VecDeque;

impl<B: AutodiffBackend, M: TrainSegments<B>> Engine<B, M> {
    /// Takes an optimizer step of all its micro-batches; returns the loss and the report of the step. It is
    /// [`Engine::forward_backward`] followed by [`Engine::step`], and the parameters are bit for bit those of the two.
    ///
    /// Without clipping, without a loss scaler and without a pipeline, the first update does not have to wait for all
    /// gradients. A bucket is then updated as soon as the backward pass of the last micro-batch has left the first
    /// segment that uses it, and its gradients are freed. So the gradients of the whole model never exist at once,
    /// provided that the step has one micro-batch or that gradients are sharded. If the optimizer states are off the
    /// device, updates overlap with the backward pass, as in ZeRO-Offload (arXiv:2101.06840). That holds for every
    /// stage, world size and optimizer.
    ///
    /// # Errors
    /// Returns the errors of the two methods. One case differs: where updates have already begun,
    /// [`NumericError::NotFinite`] comes after the fact. Model and moments then hold values that are not finite, and
    /// training can only continue from a checkpoint.
    pub fn train_step(
        &mut self,
        micro_batches: &[<M as Segments<B>>::Batch],
        learning_rate: f64,
    ) -> Result<TrainStepOutput, Error> {
        if self.settings.max_grad_norm.is_some() || self.loss_scaler.is_some() || !self.pipeline.is_one_stage() {
            let loss = self.forward_backward(micro_batches)?;
            return Ok(TrainStepOutput { loss, report: self.step(learning_rate)? });
        }
        let mut reducer = self.sharded.take_gradients();
        let result = self.optimizer_in_backward(micro_batches, &mut reducer, learning_rate);
        self.sharded.reducer.peak = reducer.peak;
        result
    }

    /// Runs the forward and backward passes of micro-batches and accumulates their gradients; returns the sum of this
    /// rank's losses, which is 0 on a rank without the last stage of the pipeline.
    ///
    /// The loss weights in the batches must already be divided by the number of target tokens of the whole step, over
    /// all ranks and micro-batches. The sum of the gradients is then the gradient of the step, whatever the sizes of the
    /// micro-batches. Gradients are accumulated in f32. In a pipeline all micro-batches of a step belong into one call,
    /// because the pipeline is empty before and after it, and every rank of the pipeline passes the same micro-batches.
    ///
    /// # Errors
    /// Returns [`CommError::Lost`](crate::CommError::Lost) or another communication error if a rank is lost; the
    /// gradients are incomplete then. Returns [`Error::Pipeline`] if the schedule does not exist for this number of
    /// micro-batches.
    pub fn forward_backward(&mut self, micro_batches: &[<M as Segments<B>>::Batch]) -> Result<f64, Error> {
        let program = self.pipeline.program(micro_batches.len())?;
        let plan = BackwardPlan::new::<B, M>(&self.model);
        let Self { model, settings, communicator, pipeline, sharded, states, .. } = self;
        let ShardingState { layout, device, reducer, weights, .. } = sharded;
        let context = ShardContext { layout, communicator, device };
        let reduce_in_backward = reduces_in_backward(settings.sharding.stage, communicator, states.host.is_some());
        let passes = Passes { context, weights: weights.as_mut(), pipeline, plan: &plan, settings };
        let mut sink = GradientAccumulation { reducer, context, reduce_in_backward, overlap: settings.overlap };
        let (executed, gathered) = passes.run(model, &program, micro_batches, &mut sink)?;
        reducer.peak.gathered = reducer.peak.gathered.max(gathered);
        reducer.peak.deferred = reducer.peak.deferred.max(executed.deferred_bytes);
        Ok(self.unscaled_loss(executed))
    }

    /// Computes the losses of micro-batches without gradients; returns their sum on this rank, which is 0 on a rank
    /// without the last stage of the pipeline. The loss weights are not multiplied by [`Engine::loss_scale`].
    ///
    /// # Errors
    /// Returns the errors of [`Engine::forward_backward`].
    pub fn losses(&mut self, micro_batches: &[<M as Segments<B>>::Batch]) -> Result<f64, Error> {
        let program = self.pipeline.forward_program(micro_batches.len())?;
        let plan = BackwardPlan::forward_only(Segments::segments(&self.model));
        let Self { model, settings, communicator, pipeline, sharded, .. } = self;
        let ShardingState { layout, device, weights, .. } = sharded;
        let context = ShardContext { layout, communicator, device };
        let passes = Passes { context, weights: weights.as_mut(), pipeline, plan: &plan, settings };
        let (executed, _) = passes.run(model, &program, micro_batches, &mut NoGradients)?;
        Ok(executed.sum())
    }

    fn optimizer_in_backward(
        &mut self,
        micro_batches: &[<M as Segments<B>>::Batch],
        reducer: &mut GradientReducer<B::InnerBackend>,
        learning_rate: f64,
    ) -> Result<TrainStepOutput, Error> {
        let program = self.pipeline.program(micro_batches.len())?;
        let plan = BackwardPlan::new::<B, M>(&self.model);
        let Self { model, settings, communicator, pipeline, sharded, states, .. } = self;
        let ShardingState { layout, device, weights, .. } = sharded;
        let context = ShardContext { layout, communicator, device };
        let passes = Passes { context, weights: weights.as_mut(), pipeline, plan: &plan, settings };
        let offloaded = states.host.is_some();
        let reduce_in_backward = reduces_in_backward(settings.sharding.stage, communicator, offloaded);
        let accumulation = GradientAccumulation { reducer, context, reduce_in_backward, overlap: settings.overlap };
        let weight_decay = settings.optimizer.weight_decay();
        let hyperparameters = Hyperparameters { lr: learning_rate, weight_decay, grad_scale: 1.0 };
        let mut sink = OptimizerInBackward {
            accumulation,
            last_micro_batch: micro_batches.len() - 1,
            updates: UpdatePipeline::new(settings, states, context, hyperparameters),
            needs_transfer: communicator.world_size() > 1 || offloaded,
            ready: VecDeque::new(),
            squared_norm: ExactSum::default(),
        };
        let (executed, gathered) = passes.run(model, &program, micro_batches, &mut sink)?;
        let squared_norm = sink.squared_norm;
        reducer.peak.gathered = reducer.peak.gathered.max(gathered);
        let norm = reduce_gradient_stats(context, &self.pipeline, &squared_norm, &[])?.norm;
        let report = self.finish_step(norm, false)?;
        if !norm.is_finite() {
            return Err(NumericError::NotFinite { step: self.steps - 1, norm }.into());
        }
        Ok(TrainStepOutput { loss: self.unscaled_loss(executed), report })
    }

    /// Returns the sum of the losses, with the loss scale divided out.
    fn unscaled_loss(&self, executed: Executed<B::InnerBackend>) -> f64 {
        executed.sum() / self.loss_scale()
    }
}

/// Returns true if buckets are reduced during every backward pass. With one rank a reduction is the identity, so it can
/// wait until the step, unless it moves gradients off the device.
pub(super) fn reduces_in_backward(stage: ZeroStage, communicator: &AsyncCommunicator, offloaded: bool) -> bool {
    if communicator.world_size() > 1 { stage >= ZeroStage::Gradients } else { offloaded }
}

/// Receives the gradients of micro-batches, segment by segment.
trait GradientSink<B: Backend> {
    /// Takes the gradients of a segment after its backward pass.
    fn post_backward(
        &mut self,
        store: &mut dyn WeightStore<B>,
        after: AfterBackward,
        found: Vec<Gradient<B>>,
    ) -> Result<(), Error>;

    /// Called once when all backward passes have ended.
    fn finish(&mut self, store: &mut dyn WeightStore<B>) -> Result<(), Error>;
}

/// The sink of forward passes alone.
struct NoGradients;

impl<B: Backend> GradientSink<B> for NoGradients {
    fn post_backward(
        &mut self,
        _: &mut dyn WeightStore<B>,
        _: AfterBackward,
        _: Vec<Gradient<B>>,
    ) -> Result<(), Error> {
        Ok(())
    }

    fn finish(&mut self, _: &mut dyn WeightStore<B>) -> Result<(), Error> {
        Ok(())
    }
}

/// The passes of a step's micro-batches on this rank.
struct Passes<'a, B: AutodiffBackend> {
    context: ShardContext<'a, B::InnerBackend>,
    /// The weight shards of stage 3; none if all weights are in the model.
    weights: Option<&'a mut WeightShards<B::InnerBackend>>,
    pipeline: &'a PipelineAxis,
    plan: &'a BackwardPlan,
    settings: &'a EngineSettings,
}

impl<B: AutodiffBackend> Passes<'_, B> {
    /// Returns the losses and the largest number of bytes of gathered weights.
    fn run<M: TrainSegments<B>>(
        self,
        model: &mut M,
        program: &Program,
        micro_batches: &[<M as Segments<B>>::Batch],
        sink: &mut dyn GradientSink<B::InnerBackend>,
    ) -> Result<(Executed<B::InnerBackend>, usize), Error> {
        let Self { context, weights, pipeline, plan, settings } = self;
        let driver = Driver { plan, checkpointing: settings.checkpointing, trace: context.communicator.trace() };
        let stages = pipeline.stage_view(program);
        let executor = Executor::new(driver, stages, micro_batches, &pipeline.communicator, context.device);
        let instructions = &program.ranks[stages.rank];
        match weights {
            None => {
                let mut replicated = ReplicatedModel::take_from(model, context);
                let executed = execute(executor, instructions, &mut replicated, sink);
                Ok((replicated.put_back(model, executed)?, 0))
            }
            Some(weights) => {
                let prefetch = usize::from(settings.overlap);
                let mut gathered = GatheredModel::new(model.clone(), weights, context, driver, prefetch);
                let executed = execute(executor, instructions, &mut gathered, sink)?;
                Ok((executed, gathered.peak_bytes))
            }
        }
    }
}

fn execute<B, M, S>(
    executor: Executor<'_, B, M>,
    instructions: &[Instruction],
    source: &mut S,
    sink: &mut dyn GradientSink<B::InnerBackend>,
) -> Result<Executed<B::InnerBackend>, Error>
where
    B: AutodiffBackend,
    M: TrainSegments<B>,
    S: WeightProvider<M> + WeightStore<B::InnerBackend>,
{
    let mut hook = |source: &mut S, after, found| sink.post_backward(source, after, found);
    let executed = executor.run(instructions, source, &mut hook)?;
    sink.finish(source)?;
    Ok(executed)
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
        after: AfterBackward,
        found: Vec<Gradient<B>>,
    ) -> Result<(), Error> {
        let ShardContext { layout, communicator, .. } = self.context;
        self.reducer.accumulate(layout, found);
        if self.reduce_in_backward && after.complete {
            self.reducer.reduce_ready_after(layout, after.segment, communicator)?;
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

/// Updates parameters during the backward pass of the last micro-batch (optimizer in backward).
struct OptimizerInBackward<'a, B: AutodiffBackend> {
    accumulation: GradientAccumulation<'a, B::InnerBackend>,
    last_micro_batch: usize,
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
            self.accumulation.reducer.reduce(layout, index, communicator)?;
        }
        let parameters = layout.buckets[index].parameters();
        let flags: Vec<u8> =
            parameters.map(|index| u8::from(self.accumulation.reducer.has_gradient()[index])).collect();
        self.ready.push_back((index, communicator.submit("share", move |group| group.all_gather_object(&flags))));
        Ok(())
    }

    /// Starts updates until at most `max_waiting` ready buckets still wait for their gradients.
    fn update_ready(&mut self, store: &mut dyn WeightStore<B::InnerBackend>, max_waiting: usize) -> Result<(), Error> {
        let ShardContext { layout, device, .. } = self.updates.context;
        while self.ready.len() > max_waiting {
            let Some((index, flags)) = self.ready.pop_front() else { return Ok(()) };
            let gradient_device = self.updates.states.host.is_none().then_some(device);
            let gradients = self.accumulation.reducer.take_bucket(layout, index, gradient_device)?;
            add_gradient_squares(&mut self.squared_norm, &gradients, device);
            let flags = flags.wait()?;
            let slot = |parameter| layout.buckets[index].parameters().position(|other| other == parameter);
            let present = |parameter| slot(parameter).is_some_and(|slot| flags.iter().any(|flags| flags[slot] != 0));
            self.updates.update_bucket(store, index, retain_present(gradients, present))?;
            self.accumulation.reducer.updating_bytes = self.updates.gradient_bytes();
        }
        Ok(())
    }
}

impl<B: AutodiffBackend> GradientSink<B::InnerBackend> for OptimizerInBackward<'_, B> {
    fn post_backward(
        &mut self,
        store: &mut dyn WeightStore<B::InnerBackend>,
        after: AfterBackward,
        found: Vec<Gradient<B::InnerBackend>>,
    ) -> Result<(), Error> {
        if after.micro_batch != self.last_micro_batch {
            return self.accumulation.post_backward(store, after, found);
        }
        let layout = self.updates.context.layout;
        self.accumulation.reducer.accumulate(layout, found);
        let max_waiting = usize::from(self.needs_transfer && self.updates.settings.overlap);
        for index in layout.buckets_ready_after(after.segment) {
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
