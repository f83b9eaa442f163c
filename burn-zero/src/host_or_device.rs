//! Tensors on the device or in host memory.

use crate::{bucket, segment::DynTensor};
use burn::tensor::backend::Backend;

/// The flat f32 values of a shard, on the device or in host memory.
#[derive(Debug, Clone)]
pub(crate) enum HostOrDevice<B: Backend> {
    /// On the device that trains.
    Device(DynTensor<B>),
    /// In host memory.
    Host(Vec<f32>),
}

impl<B: Backend> HostOrDevice<B> {
    /// Returns the values in host memory; copies them from the device if necessary.
    pub fn into_host(self) -> Vec<f32> {
        match self {
            Self::Device(value) => bucket::to_host(value),
            Self::Host(values) => values,
        }
    }

    /// Returns the values on the device; copies them from the host if necessary.
    pub fn into_device(self, device: &B::Device) -> DynTensor<B> {
        match self {
            Self::Device(value) => value,
            Self::Host(values) => bucket::tensor_from_vec(values, device),
        }
    }

    /// Returns the bytes on the device and the bytes in host memory.
    pub fn device_and_host_bytes(&self) -> (usize, usize) {
        match self {
            Self::Device(value) => (value.bytes(), 0),
            Self::Host(values) => (0, size_of_val(values.as_slice())),
        }
    }
}
