//! The optimizer step that runs once all gradients have been accumulated.

use super::{Engine, ShardingState, StepReport, stages::PipelineAxis, update::UpdatePipeline};
use crate::{
    Error, NumericError,
    comm::{Collectives, Lane},
    gather::{ReplicatedModel, ShardContext, WeightStore},
    host_or_device::HostOrDevice,
    norm::{ExactSum, add_squares, add_squares_on_host},
    optimizer::Hyperparameters,
    reduce::ShardGradients,
    segment::TrainSegments,
    sharding::ParamShard,
};
use burn::tensor::backend::{AutodiffBackend, Backend};
use std::collections::HashMap;

/// The properties of a step's gradients on which all ranks agree.
pub(super) struct GradientStats {
    pub norm: f64,
    /// For each parameter, true if any rank had a gradient.
    pub has_gradient: Vec<bool>,
}

impl<B: AutodiffBackend, M: TrainSegments<B>> Engine<B, M> {
    /// Clips the accumulated gradients by their global norm, as `torch.nn.utils.clip_grad_norm_` does, updates the
    /// parameters that have a gradient on any rank and clears the gradients. Parameters keep their ids; weight decay
    /// applies to matrices only, see [`crate::optimizer::no_decay`]. The norm covers all ranks and does not depend on
    /// their number.
    ///
    /// Half-precision weights are updated through the f32 master weights that this rank keeps of its shards.
    ///
    /// # Errors
    /// Returns [`NumericError::NotFinite`] if the norm is not finite on any rank: model, moments and step count are
    /// unchanged, the gradients are cleared. With a loss scaler all ranks skip the step instead, or return
    /// [`NumericError::LossScale`]. Returns [`CommError::Lost`](crate::CommError::Lost) or another communication error
    /// if a rank is lost; the model is incomplete then.
    pub fn step(&mut self, learning_rate: f64) -> Result<StepReport, Error> {
        let trace = self.communicator.trace().clone();
        trace.span("step", Lane::Compute, || {
            self.reduce_tied_gradients()?;
            let report = self.step_after_backward(learning_rate)?;
            if !report.skipped {
                self.send_tied_weights()?;
            }
            Ok(report)
        })
    }

    fn step_after_backward(&mut self, learning_rate: f64) -> Result<StepReport, Error> {
        let reducer = self.sharded.take_gradients();
        let has_gradient = reducer.has_gradient().to_vec();
        let Self { model, settings, communicator, pipeline, sharded, states, loss_scaler, steps, .. } = self;
        let ShardingState { layout, device, weights, .. } = sharded;
        let context = ShardContext { layout, communicator, device };
        // If the optimizer states are on the host, the gradients stay there.
        let gradient_device = states.host.is_none().then_some(context.device);
        let reduced = reducer.finish(context.layout, settings.sharding.stage, communicator, gradient_device)?;
        let mut sum = ExactSum::default();
        reduced.values().for_each(|gradients| add_gradient_squares(&mut sum, gradients, context.device));
        let GradientStats { norm, has_gradient } = reduce_gradient_stats(context, pipeline, &sum, &has_gradient)?;
        let scale = loss_scaler.map_or(1.0, |scaler| scaler.scale());
        let (norm, unscale) = (norm / scale, 1.0 / scale);
        let finite = norm.is_finite();
        if let Some(scaler) = loss_scaler {
            scaler.update(!finite)?;
        } else if !finite {
            return Err(NumericError::NotFinite { step: *steps, norm }.into());
        }
        if !finite {
            return Ok(StepReport { grad_norm: norm, clipped: false, skipped: true });
        }
        let clip = settings.max_grad_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
        let weight_decay = settings.optimizer.weight_decay();
        let hyperparameters = Hyperparameters { lr: learning_rate, weight_decay, grad_scale: clip * unscale };
        let updates = UpdatePipeline::new(settings, states, context, hyperparameters);
        match weights {
            Some(weights) => updates.update_all(&mut weights.as_store(context), reduced, &has_gradient)?,
            None => {
                let mut replicated = ReplicatedModel::take_from(model, context);
                let done = updates.update_all(&mut replicated, reduced, &has_gradient);
                replicated.put_back(model, done)?;
            }
        }
        self.finish_step(norm, clip < 1.0)
    }

    /// Counts a step whose updates are complete and returns its report.
    pub(super) fn finish_step(&mut self, grad_norm: f64, clipped: bool) -> Result<StepReport, Error> {
        self.states.host.as_ref().map_or(Ok(()), |host| host.lock_states().flush())?;
        self.steps += 1;
        Ok(StepReport { grad_norm, clipped, skipped: false })
    }
}

/// Computes the global norm over all shards and stages from this rank's sum of squares, and which parameters of this
/// stage had a gradient on any rank. If optimizer states are not sharded, all ranks of a stage hold the same sum and only
/// that of the first counts.
pub(super) fn reduce_gradient_stats<B: Backend>(
    context: ShardContext<'_, B>,
    pipeline: &PipelineAxis,
    sum: &ExactSum,
    has_gradient: &[bool],
) -> Result<GradientStats, Error> {
    let mut own = sum.to_bytes();
    own.extend(has_gradient.iter().map(|&present| u8::from(present)));
    let all = context.communicator.submit("share", move |group| group.all_gather_object(&own)).wait()?;
    let (mut total, mut any) = (ExactSum::default(), vec![false; has_gradient.len()]);
    for (rank, message) in all.iter().enumerate() {
        let (part, flags) = ExactSum::from_bytes(message);
        if rank < context.layout.num_shards {
            total.merge(part);
        }
        any.iter_mut().zip(flags).for_each(|(any, &flag)| *any |= flag != 0);
    }
    Ok(GradientStats { norm: pipeline.merge(&total)?.value().sqrt(), has_gradient: any })
}

/// Adds the squares of a bucket's gradients to `sum`.
pub(super) fn add_gradient_squares<B: Backend>(sum: &mut ExactSum, gradients: &ShardGradients<B>, device: &B::Device) {
    for gradient in gradients.iter().filter_map(|(_, gradient)| gradient.as_ref()) {
        match gradient {
            HostOrDevice::Device(value) => add_squares(sum, value),
            HostOrDevice::Host(values) => add_squares_on_host::<B>(sum, values, device),
        }
    }
}

/// Removes the gradients of parameters for which no rank had a gradient.
pub(super) fn retain_present<B: Backend>(
    gradients: ShardGradients<B>,
    present: impl Fn(usize) -> bool,
) -> ShardGradients<B> {
    let filter = |(shard, gradient): (ParamShard, Option<HostOrDevice<B>>)| {
        let gradient = gradient.filter(|_| present(shard.parameter));
        (shard, gradient)
    };
    gradients.into_iter().map(filter).collect()
}

impl<B: AutodiffBackend> UpdatePipeline<'_, B> {
    /// Updates all trainable buckets.
    fn update_all(
        mut self,
        store: &mut dyn WeightStore<B::InnerBackend>,
        mut reduced: HashMap<usize, ShardGradients<B::InnerBackend>>,
        has_gradient: &[bool],
    ) -> Result<(), Error> {
        for (index, _) in self.context.layout.trainable_buckets() {
            let gradients = reduced.remove(&index).unwrap_or_default();
            self.update_bucket(store, index, retain_present(gradients, |parameter| has_gradient[parameter]))?;
        }
        self.drain(store, 0)
    }
}
