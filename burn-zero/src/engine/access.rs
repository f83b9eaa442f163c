//! Access to the gradients and the model between the passes of a step, for methods that change either.

use super::Engine;
use crate::segment::{DynTensor, Gradient, TrainSegments};
use burn::{module::ParamId, tensor::backend::AutodiffBackend};

impl<B: AutodiffBackend, M: TrainSegments<B>> Engine<B, M> {
    /// Returns the gradient of a parameter that [`Engine::forward_backward`] has accumulated on this rank since the
    /// last step, of the parameter's shape, in f32 and times the loss scale. `None` if it has none, or if it has been
    /// reduced already: with gradients that are sharded among several ranks, or optimizer states off the device.
    pub fn accumulated_gradient(&self, id: ParamId) -> Option<DynTensor<B::InnerBackend>> {
        let index = self.sharded.layout.parameter_index.get(&id)?;
        self.sharded.reducer.unreduced().get(index).cloned()
    }

    /// Adds to the accumulated gradient of a parameter: the next [`Engine::step`] takes the sum. The gradient has the
    /// parameter's shape and is multiplied by [`Engine::loss_scale`].
    ///
    /// # Panics
    /// Panics if the model has no such parameter.
    pub fn accumulate_gradient(&mut self, id: ParamId, value: DynTensor<B::InnerBackend>) {
        let gradient = Gradient { path: String::new(), id, value };
        self.sharded.reducer.accumulate(&self.sharded.layout, vec![gradient]);
    }

    /// Changes values of the model between two steps, in the same way on every rank. Parameters keep their ids, shapes
    /// and types. In stage 3 the values of the model are placeholders, and those of half-precision weights come from
    /// their master weights in the next step; changes of either have no effect.
    pub fn map_model(&mut self, change: impl FnOnce(M) -> M) {
        self.model = change(self.model.clone());
    }
}
