//! Implementations of the kernel trait for the backends that use its default methods.

#[cfg(any(feature = "tch", feature = "cuda", feature = "vulkan", feature = "wgpu"))]
use super::LinearKernels;

#[cfg(feature = "tch")]
impl<E: burn::backend::libtorch::TchElement> LinearKernels for burn::backend::LibTorch<E> {}

#[cfg(any(feature = "cuda", feature = "vulkan", feature = "wgpu"))]
impl<R, F, I, BT> LinearKernels for burn_cubecl::CubeBackend<R, F, I, BT>
where
    R: burn_cubecl::CubeRuntime,
    F: burn_cubecl::FloatElement,
    I: burn_cubecl::IntElement,
    BT: burn_cubecl::element::BoolElement,
{
}
