//! The device that a command computes on (`--device`), and the backend behind it.
//!
//! One binary can contain several backends, each enabled by its cargo feature. Code that computes is generic over the
//! backend; [`with_backend!`] selects it where a command starts.

use crate::catch_panic::catch_panic;
use anyhow::{Result, anyhow};
#[cfg(feature = "cuda")]
use burn::backend::cuda::CudaDevice;
#[cfg(feature = "tch")]
use burn::backend::libtorch::LibTorchDevice;
#[cfg(any(feature = "vulkan", feature = "wgpu"))]
use burn::backend::wgpu::WgpuDevice;
use burn::tensor::{Tensor, backend::Backend};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// A device of a backend that this binary was built with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Device {
    name: String,
    /// The backend and its device, which [`with_backend!`] matches on.
    pub backend_device: BackendDevice,
}

/// A backend and its device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackendDevice {
    /// The CPU, with Flex and this project's own kernels.
    #[cfg(feature = "flex")]
    Cpu,
    /// libtorch, on the CPU or a CUDA device.
    #[cfg(feature = "tch")]
    Tch(LibTorchDevice),
    /// CUDA, with kernels that are compiled at run time.
    #[cfg(feature = "cuda")]
    Cuda(CudaDevice),
    /// Vulkan, with SPIR-V kernels.
    #[cfg(feature = "vulkan")]
    Vulkan(WgpuDevice),
    /// WebGPU, with WGSL kernels.
    #[cfg(feature = "wgpu")]
    Wgpu(WgpuDevice),
}

/// Evaluates `$body` with `$B` as the backend of `$device` and `$backend_device` as its Burn device.
macro_rules! with_backend {
    ($device:expr, |$B:ident, $backend_device:ident| $body:expr) => {
        match &$device.backend_device {
            #[cfg(feature = "flex")]
            $crate::backend::BackendDevice::Cpu => {
                type $B = burn::backend::Flex;
                let $backend_device = &burn::backend::flex::FlexDevice;
                $body
            }
            #[cfg(feature = "tch")]
            $crate::backend::BackendDevice::Tch($backend_device) => {
                type $B = burn::backend::LibTorch;
                $body
            }
            #[cfg(feature = "cuda")]
            $crate::backend::BackendDevice::Cuda($backend_device) => {
                type $B = burn::backend::Cuda;
                $body
            }
            #[cfg(feature = "vulkan")]
            $crate::backend::BackendDevice::Vulkan($backend_device) => {
                type $B = burn::backend::Vulkan;
                $body
            }
            #[cfg(feature = "wgpu")]
            $crate::backend::BackendDevice::Wgpu($backend_device) => {
                type $B = burn::backend::Wgpu;
                $body
            }
        }
    };
}
pub(crate) use with_backend;

/// A form of device names.
#[derive(Clone, Copy)]
struct DeviceName {
    /// The form; N stands for a number, and brackets for a part that may be left out.
    name: &'static str,
    /// The cargo feature that the device needs.
    feature: &'static str,
    /// True if this binary has the feature.
    available: bool,
}

/// All forms of device names.
const DEVICE_NAMES: [DeviceName; 6] = [
    DeviceName { name: "cpu", feature: "flex", available: cfg!(feature = "flex") },
    DeviceName { name: "tch", feature: "tch", available: cfg!(feature = "tch") },
    DeviceName { name: "tch:cuda:N", feature: "tch", available: cfg!(feature = "tch") },
    DeviceName { name: "cuda:N", feature: "cuda", available: cfg!(feature = "cuda") },
    DeviceName { name: "vulkan[:N]", feature: "vulkan", available: cfg!(feature = "vulkan") },
    DeviceName { name: "wgpu[:N]", feature: "wgpu", available: cfg!(feature = "wgpu") },
];

impl Default for Device {
    /// Returns the first device of [`DEVICE_NAMES`] that this binary supports.
    fn default() -> Self {
        let here = DEVICE_NAMES.iter().find(|device| device.available);
        let name = here.map(|device| device.name.split(['[', ':']).next().unwrap_or(device.name));
        name.and_then(|name| name.parse().ok()).expect("medqa is built with at least one backend")
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let parts: Vec<&str> = name.split(':').collect();
        let number = |text: &str| text.parse::<usize>().map_err(|_| unknown_device(name));
        let (kind, n) = match parts[..] {
            [kind @ ("cpu" | "tch" | "cuda" | "vulkan" | "wgpu")] => (kind, None),
            ["tch", "cuda", n] => ("tch", Some(number(n)?)),
            [kind @ ("cuda" | "vulkan" | "wgpu"), n] => (kind, Some(number(n)?)),
            _ => return Err(unknown_device(name)),
        };
        let backend_device = match (kind, n) {
            #[cfg(feature = "flex")]
            ("cpu", _) => BackendDevice::Cpu,
            #[cfg(feature = "tch")]
            ("tch", n) => BackendDevice::Tch(n.map_or(LibTorchDevice::Cpu, LibTorchDevice::Cuda)),
            #[cfg(feature = "cuda")]
            ("cuda", n) => BackendDevice::Cuda(n.map(CudaDevice::new).unwrap_or_default()),
            #[cfg(feature = "vulkan")]
            ("vulkan", n) => BackendDevice::Vulkan(n.map(WgpuDevice::DiscreteGpu).unwrap_or_default()),
            #[cfg(feature = "wgpu")]
            ("wgpu", n) => BackendDevice::Wgpu(n.map(WgpuDevice::DiscreteGpu).unwrap_or_default()),
            _ => return Err(missing_feature(name, kind)),
        };
        Ok(Self { name: name.to_owned(), backend_device })
    }
}

fn unknown_device(name: &str) -> String {
    format!("expected one of {}, found {name:?}", DEVICE_NAMES.map(|known| known.name).join(", "))
}

fn missing_feature(name: &str, kind: &str) -> String {
    let known = DEVICE_NAMES.iter().find(|device| device.name.starts_with(kind));
    let feature = known.map_or(kind, |device| device.feature);
    format!(
        "{name:?} needs a medqa that was built with the feature `{feature}`: cargo build --release -p medqa --features {feature}"
    )
}

impl TryFrom<String> for Device {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}

impl From<Device> for String {
    fn from(device: Device) -> Self {
        device.name
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Device {
    /// Returns whether this is the CPU with Flex.
    pub fn is_cpu(&self) -> bool {
        self.name == "cpu"
    }

    /// Returns the device after checking that it can compute a sum.
    ///
    /// # Errors
    /// If the machine lacks the device or its driver.
    pub fn ensure_ready(&self) -> Result<&Self> {
        with_backend!(self, |B, device| probe::<B>(device)).map(|()| self).map_err(|problem| {
            let other = Self::default();
            anyhow!("device {self}: expected a device that computes, found: {problem}; another device is {other}")
        })
    }
}

/// Computes a sum on the device. Backends panic if their device is missing; the panic is returned as an error.
fn probe<B: Backend>(device: &B::Device) -> Result<(), String> {
    let sum = || Tensor::<B, 1>::ones([2], device).sum().into_data().iter::<f64>().next();
    match catch_panic(sum)? {
        Some(2.0) => Ok(()),
        sum => Err(format!("1 + 1 = {sum:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_known_by_its_name() {
        for DeviceName { name, feature, available } in DEVICE_NAMES {
            let name = name.replace("[:N]", "").replace('N', "0");
            match name.parse::<Device>() {
                Ok(device) => assert!(available && device.to_string() == name, "{name}"),
                Err(error) => {
                    assert!(!available && error.contains(&format!("--features {feature}")), "{name}: {error}")
                }
            }
        }
        for name in ["", "gpu", "cpu:1", "cuda:x", "tch:1", "vulkan:", "wgpu:-1", "tch:cuda"] {
            let error = name.parse::<Device>().unwrap_err();
            assert!(error.contains("vulkan[:N]") && error.contains(&format!("{name:?}")), "{name}: {error}");
        }
        assert!(Device::default().ensure_ready().is_ok());
    }
}
