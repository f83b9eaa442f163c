//! Properties of backends that Burn's [`Backend`] trait does not state. No other module names a backend.

use burn::tensor::backend::Backend;

/// Returns true if tensors lie in the memory of this process and hand over their buffers without a copy.
pub(crate) fn has_host_memory<B: Backend>() -> bool {
    #[cfg(feature = "flex")]
    return std::any::TypeId::of::<B>() == std::any::TypeId::of::<burn::backend::Flex>();
    #[cfg(not(feature = "flex"))]
    false
}
