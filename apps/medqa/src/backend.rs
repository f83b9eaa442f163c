//! Where a verb computes: `--device`, and the backend that stands behind it.
//!
//! Several backends can be in one binary, each by its cargo feature. Code that computes is generic over the backend; [`on!`]
//! picks it where a verb begins.

use anyhow::{Result, anyhow};
#[cfg(feature = "cuda")]
use burn::backend::cuda::CudaDevice;
#[cfg(feature = "tch")]
use burn::backend::libtorch::LibTorchDevice;
#[cfg(any(feature = "vulkan", feature = "wgpu"))]
use burn::backend::wgpu::WgpuDevice;
use burn::tensor::{Tensor, backend::Backend};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    panic::{self, AssertUnwindSafe},
    str::FromStr,
};

/// A device of a backend that this binary was built with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Device {
    name: String,
    /// What [`on!`] looks at.
    pub place: Place,
}

/// A backend and its device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// This machine's processor, by Flex and our own kernels.
    #[cfg(feature = "flex")]
    Cpu,
    /// libtorch, on the processor or a CUDA device.
    #[cfg(feature = "tch")]
    Tch(LibTorchDevice),
    /// CUDA, by kernels that are compiled on the spot.
    #[cfg(feature = "cuda")]
    Cuda(CudaDevice),
    /// Vulkan, by SPIR-V.
    #[cfg(feature = "vulkan")]
    Vulkan(WgpuDevice),
    /// WebGPU, by WGSL.
    #[cfg(feature = "wgpu")]
    Wgpu(WgpuDevice),
}

/// Does `$body` where `$B` is the backend of `$device` and `$place` its device.
macro_rules! on {
    ($device:expr, |$B:ident, $place:ident| $body:expr) => {
        match &$device.place {
            #[cfg(feature = "flex")]
            $crate::backend::Place::Cpu => {
                type $B = burn::backend::Flex;
                let $place = &burn::backend::flex::FlexDevice;
                $body
            }
            #[cfg(feature = "tch")]
            $crate::backend::Place::Tch($place) => {
                type $B = burn::backend::LibTorch;
                $body
            }
            #[cfg(feature = "cuda")]
            $crate::backend::Place::Cuda($place) => {
                type $B = burn::backend::Cuda;
                $body
            }
            #[cfg(feature = "vulkan")]
            $crate::backend::Place::Vulkan($place) => {
                type $B = burn::backend::Vulkan;
                $body
            }
            #[cfg(feature = "wgpu")]
            $crate::backend::Place::Wgpu($place) => {
                type $B = burn::backend::Wgpu;
                $body
            }
        }
    };
}
pub(crate) use on;

/// The names of devices, each with the feature that brings it.
const NAMES: [(&str, &str, bool); 6] = [
    ("cpu", "flex", cfg!(feature = "flex")),
    ("tch", "tch", cfg!(feature = "tch")),
    ("tch:cuda:N", "tch", cfg!(feature = "tch")),
    ("cuda:N", "cuda", cfg!(feature = "cuda")),
    ("vulkan[:N]", "vulkan", cfg!(feature = "vulkan")),
    ("wgpu[:N]", "wgpu", cfg!(feature = "wgpu")),
];

impl Default for Device {
    /// The first of the names that this binary has.
    fn default() -> Self {
        let here = NAMES.iter().filter(|(.., here)| *here);
        let name = here.map(|(name, ..)| name.split(['[', ':']).next().unwrap_or(name)).next();
        name.and_then(|name| name.parse().ok()).expect("medqa is built with at least one backend")
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let parts: Vec<&str> = name.split(':').collect();
        let number = |text: &str| text.parse::<usize>().map_err(|_| unknown(name));
        let (kind, n) = match parts[..] {
            [kind @ ("cpu" | "tch" | "cuda" | "vulkan" | "wgpu")] => (kind, None),
            ["tch", "cuda", n] => ("tch", Some(number(n)?)),
            [kind @ ("cuda" | "vulkan" | "wgpu"), n] => (kind, Some(number(n)?)),
            _ => return Err(unknown(name)),
        };
        let place = match (kind, n) {
            #[cfg(feature = "flex")]
            ("cpu", _) => Place::Cpu,
            #[cfg(feature = "tch")]
            ("tch", n) => Place::Tch(n.map_or(LibTorchDevice::Cpu, LibTorchDevice::Cuda)),
            #[cfg(feature = "cuda")]
            ("cuda", n) => Place::Cuda(n.map(CudaDevice::new).unwrap_or_default()),
            #[cfg(feature = "vulkan")]
            ("vulkan", n) => Place::Vulkan(n.map(WgpuDevice::DiscreteGpu).unwrap_or_default()),
            #[cfg(feature = "wgpu")]
            ("wgpu", n) => Place::Wgpu(n.map(WgpuDevice::DiscreteGpu).unwrap_or_default()),
            _ => return Err(absent(name, if kind == "cpu" { "flex" } else { kind })),
        };
        Ok(Self { name: name.to_owned(), place })
    }
}

fn unknown(name: &str) -> String {
    format!("expected one of {}, found {name:?}", NAMES.map(|(known, ..)| known).join(", "))
}

fn absent(name: &str, feature: &str) -> String {
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
    /// Whether it is this machine's processor, by Flex.
    pub fn is_cpu(&self) -> bool {
        self.name == "cpu"
    }

    /// The device, once it has computed a sum.
    ///
    /// # Errors
    /// If the machine lacks the device or its driver.
    pub fn ready(&self) -> Result<&Self> {
        on!(self, |B, place| answers::<B>(place)).map(|()| self).map_err(|problem| {
            let other = Self::default();
            anyhow!("device {self}: expected a device that computes, found: {problem}; another device is {other}")
        })
    }
}

/// Backends panic where a device is missing; here that is an answer.
fn answers<B: Backend>(device: &B::Device) -> Result<(), String> {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let sum = || Tensor::<B, 1>::ones([2], device).sum().into_data().iter::<f64>().next();
    let sum = panic::catch_unwind(AssertUnwindSafe(sum));
    panic::set_hook(hook);
    match sum {
        Ok(Some(2.0)) => Ok(()),
        Ok(sum) => Err(format!("1 + 1 = {sum:?}")),
        Err(panic) => {
            let words = panic.downcast_ref::<String>().map(String::as_str);
            let words = words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it does not say why");
            Err(words.lines().next().unwrap_or_default().to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_known_by_its_name() {
        for (name, feature, here) in NAMES {
            let name = name.replace("[:N]", "").replace('N', "0");
            match name.parse::<Device>() {
                Ok(device) => assert!(here && device.to_string() == name, "{name}"),
                Err(error) => assert!(!here && error.contains(&format!("--features {feature}")), "{name}: {error}"),
            }
        }
        for name in ["", "gpu", "cpu:1", "cuda:x", "tch:1", "vulkan:", "wgpu:-1", "tch:cuda"] {
            let error = name.parse::<Device>().unwrap_err();
            assert!(error.contains("vulkan[:N]") && error.contains(&format!("{name:?}")), "{name}: {error}");
        }
        assert!(Device::default().ready().is_ok());
    }
}
