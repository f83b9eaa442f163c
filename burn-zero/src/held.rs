//! Values on the device or on the host.

use crate::{bucket, segment::Value};
use burn::tensor::backend::Backend;

/// Flat f32 values of a piece, where they are.
#[derive(Debug, Clone)]
pub(crate) enum Held<B: Backend> {
    /// On the device that trains.
    Device(Value<B>),
    /// In the host's memory.
    Host(Vec<f32>),
}

impl<B: Backend> Held<B> {
    /// The values on the host; they travel if they have to.
    pub fn into_host(self) -> Vec<f32> {
        match self {
            Self::Device(value) => bucket::to_host(value),
            Self::Host(values) => values,
        }
    }

    /// The values on the device; they travel if they have to.
    pub fn on(self, device: &B::Device) -> Value<B> {
        match self {
            Self::Device(value) => value,
            Self::Host(values) => bucket::from_vec(values, device),
        }
    }

    /// Bytes on the device and on the host.
    pub fn bytes(&self) -> (usize, usize) {
        match self {
            Self::Device(value) => (value.bytes(), 0),
            Self::Host(values) => (0, size_of_val(values.as_slice())),
        }
    }
}
