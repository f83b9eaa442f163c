//! Tensors on the device or in host memory.

use crate::{bucket, segment::DynTensor};
use burn::tensor::backend::Backend;
use std::iter::Sum;

/// The flat f32 values of a shard, on the device or in host memory.
#[derive(Debug, Clone)]
pub(crate) enum HostOrDevice<B: Backend> {
    /// On the device that trains.
    Device(DynTensor<B>),
    /// In host memory.
    Host(Vec<f32>),
}

/// A number of bytes on the device and a number of bytes in host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct DeviceHostBytes {
    pub device: usize,
    pub host: usize,
}

impl DeviceHostBytes {
    pub(crate) fn total(self) -> usize {
        self.device + self.host
    }
}

impl Sum for DeviceHostBytes {
    fn sum<I: Iterator<Item = Self>>(terms: I) -> Self {
        terms.fold(Self::default(), |a, b| Self { device: a.device + b.device, host: a.host + b.host })
    }
}

impl<B: Backend> HostOrDevice<B> {
    /// Returns the values in host memory; copies them from the device if necessary.
    pub(crate) fn into_host(self) -> Vec<f32> {
        match self {
            Self::Device(value) => bucket::to_host(value),
            Self::Host(values) => values,
        }
    }

    /// Returns the values on the device; copies them from the host if necessary.
    pub(crate) fn into_device(self, device: &B::Device) -> DynTensor<B> {
        match self {
            Self::Device(value) => value,
            Self::Host(values) => bucket::tensor_from_vec(values, device),
        }
    }

    /// Returns the bytes of the values.
    pub(crate) fn device_and_host_bytes(&self) -> DeviceHostBytes {
        match self {
            Self::Device(value) => DeviceHostBytes { device: value.bytes(), host: 0 },
            Self::Host(values) => DeviceHostBytes { device: 0, host: size_of_val(values.as_slice()) },
        }
    }
}
