//! The optimizer step that runs once all gradients have been accumulated.

use super::{Engine, ShardingState, StepReport, update::UpdatePipeline};
use crate::{
    Error, NumericError,
    comm::{Collectives, Lane},
    gather::{ReplicatedModel, ShardContext, WeightStore},
    host_or_device::HostOrDevice,
    norm::{ExactSum, add_squares, add_squares_on_host},
    optimizer::Hyperparameters,
    reduce::{GradientReducer, ShardGradients},
    segment::TrainSegments,
    sharding::{ParamShard, ShardLayout},
};
use burn::tensor::backend::{AutodiffBackend, Backend};
use std::collections::HashMap;

/// The properties of a step's gradients on which all ranks agree.
pub(super) struct GradientStats {
    pub norm: f64,
    /// For each parameter, true if any rank had a gradient.
    pub has_gradient: Vec<bool>,
}

impl<B: AutodiffBackend> Engine<B> {
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
    pub fn step<M: TrainSegments<B>>(&mut self, model: &mut M, learning_rate: f64) -> Result<StepReport, Error> {
        self.shard_model(model)?;
        let mut sharding_state = self.sharding_state.take().expect("the model was sharded above");
        let gradients = sharding_state.take_gradients();
        let trace = self.communicator.trace().clone();
        let update = || self.step_after_backward(model, &mut sharding_state, gradients, learning_rate);
        let report = trace.span("step", Lane::Compute, update);
        self.sharding_state = Some(sharding_state);
        report
    }

    fn step_after_backward<M: TrainSegments<B>>(
        &mut self,
        model: &mut M,
        sharding_state: &mut ShardingState<B>,
        reducer: GradientReducer<B::InnerBackend>,
        learning_rate: f64,
    ) -> Result<StepReport, Error> {
        let has_gradient = reducer.has_gradient().to_vec();
        let context = (self.sharding.stage, self.communicator.as_ref());
        // If the optimizer states are on the host, the gradients stay there.
        let device = self.host_optimizer.is_none().then_some(&sharding_state.device);
        let reduced = reducer.finish(&sharding_state.layout, context, device)?;
        let mut sum = ExactSum::default();
        reduced.values().for_each(|gradients| add_gradient_squares(&mut sum, gradients));
        let GradientStats { norm, has_gradient: present } =
            self.reduce_gradient_stats(&sharding_state.layout, &sum, &has_gradient)?;
        let (norm, unscale) = (norm / self.loss_scale(), 1.0 / self.loss_scale());
        let finite = norm.is_finite();
        if let Some(scaler) = &mut self.loss_scaler {
            scaler.update(!finite)?;
        } else if !finite {
            return Err(NumericError::NotFinite { step: self.steps, norm }.into());
        }
        if !finite {
            return Ok(StepReport { grad_norm: norm, clipped: false, skipped: true });
        }
        let clip = self.max_grad_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
        let rates = Hyperparameters {
            lr: learning_rate,
            weight_decay: self.optimizer.weight_decay(),
            grad_scale: clip * unscale,
        };
        let communicator = self.communicator.clone();
        let ShardingState { layout, device, weights, .. } = sharding_state;
        let place = ShardContext { layout, communicator: &communicator, device };
        let updates = UpdatePipeline::new(self, place, rates);
        match weights {
            Some(weights) => updates.update_all(&mut weights.as_store(place), (reduced, &present))?,
            None => {
                let mut whole = ReplicatedModel::take_from(model, place);
                let done = updates.update_all(&mut whole, (reduced, &present));
                whole.put_back(model, done)?;
            }
        }
        self.finish_step(norm, clip < 1.0)
    }

    /// Counts a step whose updates are complete and returns its report.
    pub(super) fn finish_step(&mut self, grad_norm: f64, clipped: bool) -> Result<StepReport, Error> {
        self.host_optimizer.as_ref().map_or(Ok(()), |desk| desk.lock_states().flush())?;
        self.steps += 1;
        Ok(StepReport { grad_norm, clipped, skipped: false })
    }

    /// Computes the global norm over all shards from this rank's sum of squares, and which parameters had a gradient on
    /// any rank. If optimizer states are not sharded, all ranks hold the same sum and only that of rank 0 counts.
    pub(super) fn reduce_gradient_stats(
        &self,
        layout: &ShardLayout,
        sum: &ExactSum,
        present: &[bool],
    ) -> Result<GradientStats, Error> {
        let mut message = sum.to_bytes();
        message.extend(present.iter().map(|&present| u8::from(present)));
        let messages = self.communicator.submit("share", move |group| group.all_gather_object(&message)).wait()?;
        let (mut total, mut any) = (ExactSum::default(), vec![false; present.len()]);
        for (rank, note) in messages.iter().enumerate() {
            let (part, flags) = ExactSum::from_bytes(note);
            if rank < layout.num_shards {
                total.merge(part);
            }
            any.iter_mut().zip(flags).for_each(|(any, &flag)| *any |= flag != 0);
        }
        Ok(GradientStats { norm: total.value().sqrt(), has_gradient: any })
    }
}

/// Adds the squares of a bucket's gradients to `sum`.
pub(super) fn add_gradient_squares<B: Backend>(sum: &mut ExactSum, gradients: &ShardGradients<B>) {
    for held in gradients.iter().filter_map(|(_, held)| held.as_ref()) {
        match held {
            HostOrDevice::Device(value) => add_squares(sum, value),
            HostOrDevice::Host(values) => add_squares_on_host(sum, values),
        }
    }
}

/// Removes the gradients of parameters for which no rank had a gradient.
pub(super) fn retain_present<B: Backend>(
    gradients: ShardGradients<B>,
    present: impl Fn(usize) -> bool,
) -> ShardGradients<B> {
    let filter = |(shard, held): (ParamShard, Option<HostOrDevice<B>>)| {
        let held = held.filter(|_| present(shard.parameter));
        (shard, held)
    };
    gradients.into_iter().map(filter).collect()
}

impl<B: AutodiffBackend> UpdatePipeline<'_, B> {
    /// Updates all trainable buckets.
    fn update_all(
        mut self,
        store: &mut dyn WeightStore<B::InnerBackend>,
        (mut reduced, present): (HashMap<usize, ShardGradients<B::InnerBackend>>, &[bool]),
    ) -> Result<(), Error> {
        for (index, _) in self.context.layout.trainable_buckets() {
            let gradients = reduced.remove(&index).unwrap_or_default();
            self.update_bucket(store, index, retain_present(gradients, |parameter| present[parameter]))?;
        }
        self.drain(store, 0)
    }
}
