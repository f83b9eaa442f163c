//! Training steps: micro-batches in, an updated model out.

use crate::{
    Error,
    comm::{Communicator, Solo},
    optimizer::{AdamW, Group, Moments},
    segment::{self, Checkpointing, Gradient, Segments, TrainSegments},
};
use burn::{
    module::{ModuleMapper, Param, ParamId},
    tensor::{
        Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use std::collections::HashMap;

mod checkpoint;

/// What a step found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// The global L2 norm of the step's gradient, before clipping.
    pub grad_norm: f64,
    /// Whether the gradient was scaled down.
    pub clipped: bool,
}

/// One process that trains a model. An optimizer step is any number of micro-batches: [`Engine::accumulate`] for each, then
/// [`Engine::step`].
pub struct Engine<B: AutodiffBackend> {
    optimizer: AdamW,
    max_grad_norm: Option<f64>,
    checkpointing: Checkpointing,
    gradients: HashMap<ParamId, Gradient<B::InnerBackend>>,
    moments: HashMap<ParamId, Moments<B::InnerBackend>>,
    communicator: Box<dyn Communicator>,
    steps: usize,
}

impl<B: AutodiffBackend> Engine<B> {
    /// An engine in a world of one. `max_grad_norm` is the global norm that gradients are clipped to, if any.
    pub fn new(optimizer: AdamW, max_grad_norm: Option<f64>, checkpointing: Checkpointing) -> Self {
        Self {
            optimizer,
            max_grad_norm,
            checkpointing,
            gradients: HashMap::new(),
            moments: HashMap::new(),
            communicator: Box::new(Solo),
            steps: 0,
        }
    }

    /// Adds the gradients of one micro-batch; returns the sum of its loss.
    ///
    /// The loss weights in `batch` must already be divided by the number of target tokens of the whole step, so that the sum
    /// over micro-batches is the step's gradient whatever their sizes. Sums are kept in f32.
    pub fn accumulate<M: TrainSegments<B>>(&mut self, model: &M, batch: &<M as Segments<B>>::Batch) -> f64 {
        let gradients = &mut self.gradients;
        let loss = segment::run::<B, M>(model, batch, self.checkpointing, &mut |found| {
            for mut gradient in found {
                gradient.value = gradient.value.into_f32();
                if let Some(sum) = gradients.remove(&gradient.id) {
                    gradient.value = sum.value.add(gradient.value);
                }
                gradients.insert(gradient.id, gradient);
            }
        });
        loss.flatten().into_data().iter::<f64>().sum()
    }

    /// Clips the accumulated gradients by their global norm, as torch's `clip_grad_norm_` does, updates the parameters that
    /// have one and forgets the gradients. Parameters keep their identity; matrices decay, see [`crate::optimizer::no_decay`].
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the norm is: model, moments and step count are as before, the gradients are gone.
    pub fn step<M: TrainSegments<B>>(&mut self, model: &mut M, learning_rate: f64) -> Result<StepReport, Error> {
        let gradients = std::mem::take(&mut self.gradients);
        let norm = global_norm(&gradients);
        if !norm.is_finite() {
            return Err(Error::NotFinite { step: self.steps, norm });
        }
        let scale = self.max_grad_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
        // A tensor is updated in place only if no one else holds it: the model is taken out, and a shell without the
        // parameters stands in its place meanwhile.
        let shell = model.clone().map(&mut Hollow { gradients: &gradients });
        let taken = std::mem::replace(model, shell);
        let (optimizer, moments) = (self.optimizer, &mut self.moments);
        *model = taken.map(&mut Update { optimizer, learning_rate, scale, gradients, moments });
        self.steps += 1;
        Ok(StepReport { grad_norm: norm, clipped: scale < 1.0 })
    }

    /// The number of steps taken.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The group of ranks that train together.
    pub fn communicator(&self) -> &dyn Communicator {
        self.communicator.as_ref()
    }
}

/// The L2 norm over all gradients: f32 sums of squares on the device, one read, their sum in f64 in the order of paths.
fn global_norm<B: Backend>(gradients: &HashMap<ParamId, Gradient<B>>) -> f64 {
    let mut sorted: Vec<_> = gradients.values().collect();
    sorted.sort_by(|a, b| a.path.cmp(&b.path));
    if sorted.is_empty() {
        return 0.0;
    }
    let squares = sorted.into_iter().map(|gradient| gradient.value.clone().sum_of_squares()).collect();
    Tensor::cat(squares, 0).into_data().iter::<f64>().sum::<f64>().sqrt()
}

/// Replaces every parameter that is about to be updated by one element.
struct Hollow<'a, B: Backend> {
    gradients: &'a HashMap<ParamId, Gradient<B>>,
}

impl<B: AutodiffBackend> ModuleMapper<B> for Hollow<'_, B::InnerBackend> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if !self.gradients.contains_key(&param.id) {
            return param;
        }
        let (id, tensor, mapper) = param.consume();
        Param::from_mapped_value(id, Tensor::empty([1; D], &tensor.device()), mapper)
    }
}

/// Updates every parameter that has a gradient, consuming the gradients.
struct Update<'a, B: Backend> {
    optimizer: AdamW,
    learning_rate: f64,
    scale: f64,
    gradients: HashMap<ParamId, Gradient<B>>,
    moments: &'a mut HashMap<ParamId, Moments<B>>,
}

impl<B: AutodiffBackend> ModuleMapper<B> for Update<'_, B::InnerBackend> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let Some(gradient) = self.gradients.remove(&param.id) else { return param };
        let group = Group::new(&gradient.path, D, self.optimizer.weight_decay);
        let lr = self.learning_rate * group.learning_rate_scale;
        let (id, parameter, mapper) = param.consume();
        let mut value: Tensor<_, D> = gradient.value.tensor();
        if self.scale < 1.0 {
            value = value.mul_scalar(self.scale);
        }
        let state = self.moments.remove(&id);
        let (parameter, state) = self.optimizer.update(lr, group.weight_decay, parameter.inner(), value, state);
        self.moments.insert(id, state);
        Param::from_mapped_value(id, Tensor::from_inner(parameter).require_grad(), mapper)
    }
}

#[cfg(test)]
mod tests;
