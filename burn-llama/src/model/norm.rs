//! RMSNorm, with the parameter name of the checkpoint.

use crate::kernel::{Kernels, primitive, tensor};
use burn::{
    module::{Module, Param},
    tensor::Tensor,
};

/// RMSNorm: `x / √(mean(x²) + epsilon) · weight` over the last dimension.
#[derive(Module, Debug)]
pub struct RmsNorm<B: Kernels> {
    /// The weight, `[features]`.
    pub weight: Param<Tensor<B, 1>>,
    /// The term that is added to the mean square.
    pub epsilon: f64,
}

impl<B: Kernels> RmsNorm<B> {
    /// Normalises `[n, features]` → `[n, features]`.
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        tensor(B::rms_norm(primitive(x), primitive(self.weight.val()), self.epsilon))
    }
}
