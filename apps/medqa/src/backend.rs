//! The backend that this build computes on.

/// For evaluation and generation.
#[cfg(feature = "flex")]
pub type Inference = burn::backend::Flex;
#[cfg(all(feature = "tch", not(feature = "flex")))]
pub type Inference = burn::backend::LibTorch;
#[cfg(all(feature = "cuda", not(any(feature = "flex", feature = "tch"))))]
pub type Inference = burn::backend::Cuda;
#[cfg(all(feature = "vulkan", not(any(feature = "flex", feature = "tch", feature = "cuda"))))]
pub type Inference = burn::backend::Vulkan;
#[cfg(all(feature = "wgpu", not(any(feature = "flex", feature = "tch", feature = "cuda", feature = "vulkan"))))]
pub type Inference = burn::backend::Wgpu;

/// For training.
pub type Training = burn::backend::Autodiff<Inference>;
