//! The memory that a rank holds, counted from the buffers.

use super::Engine;
use crate::{
    estimate::MemoryEstimate,
    host_or_device::{DeviceHostBytes, HostOrDevice},
    reduce::PeakMemory,
    segment::{DynTensor, TrainSegments},
};
use burn::{
    module::{ModuleVisitor, Param, ParamId},
    tensor::{Tensor, backend::AutodiffBackend},
};
use std::collections::HashSet;

impl<B: AutodiffBackend, M: TrainSegments<B>> Engine<B, M> {
    /// Returns the largest number of bytes that transient buffers occupied at a time, counted from the buffers.
    pub fn peak_memory(&self) -> PeakMemory {
        self.sharded.reducer.peak
    }

    /// Returns the bytes that this rank holds between two computations, counted from the buffers: weights, accumulated
    /// gradients, master weights and moments. The field `host` counts everything that is off the device.
    pub fn memory(&self) -> MemoryEstimate {
        let mut resident = ResidentBytes::default();
        self.model.visit(&mut resident);
        let shards = |trainable| {
            let weights = self.sharded.weights.as_ref();
            weights.map_or_else(DeviceHostBytes::default, |weights| weights.bytes(&self.sharded.layout, trainable))
        };
        let (trainable, frozen) = (shards(true), shards(false));
        let mut gradients = self.sharded.reducer.device_and_host_bytes();
        if self.states.host.is_none() {
            // Reduced gradients are counted where the update puts them.
            gradients = DeviceHostBytes { device: gradients.total(), host: 0 };
        }
        let master: DeviceHostBytes =
            self.states.master_weights.values().map(HostOrDevice::device_and_host_bytes).sum();
        let moments: usize = self.states.device.values().flat_map(|state| &state.slots).map(DynTensor::bytes).sum();
        let offloaded = self.states.host.as_ref().map_or(0, |host| host.lock_states().bytes());
        MemoryEstimate {
            parameters: (resident.trainable + trainable.device) as u64,
            frozen: (resident.frozen + frozen.device) as u64,
            gradients: gradients.device as u64,
            master: master.device as u64,
            moments: moments as u64,
            host: (offloaded + gradients.host + trainable.host + frozen.host + master.host) as u64,
            ..MemoryEstimate::default()
        }
    }
}

/// The bytes of a model's float parameters; a parameter that several modules share is counted once.
#[derive(Default)]
struct ResidentBytes {
    trainable: usize,
    frozen: usize,
    seen: HashSet<ParamId>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for ResidentBytes {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if self.seen.insert(param.id) {
            let value = param.val();
            let bytes = DynTensor::new(value.clone().inner()).bytes();
            *if value.is_require_grad() { &mut self.trainable } else { &mut self.frozen } += bytes;
        }
    }
}
