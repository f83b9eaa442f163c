//! AdaLoRA (Zhang et al., 2023, arXiv:2303.10512): LoRA with a trained factor per rank, `s·B·diag(E)·A`.

use crate::param;
use burn::{
    module::{Module, Param},
    tensor::{DType, Tensor},
};
use burn_peft_kernels::LinearKernels;

/// The factors of the ranks of one layer. [`RankAllocator`](crate::adapter::RankAllocator) sets those of unimportant
/// ranks to zero.
#[derive(Module, Debug)]
pub struct AdaLora<B: LinearKernels> {
    /// The factors `E [r, 1]`, PEFT's `lora_E`.
    pub lora_e: Param<Tensor<B, 2>>,
    /// For each rank, whether the last allocation kept it; `None` before the first. Only these are saved.
    #[module(skip)]
    pub kept: Option<Vec<bool>>,
}

impl<B: LinearKernels> AdaLora<B> {
    /// Creates the trainable factors of `r` ranks for the layer at `path`, which are zero at first.
    pub(super) fn new(path: &str, name: &str, r: usize, device: &B::Device) -> Self {
        let factors = Tensor::zeros([r, 1], (device, DType::F32)).require_grad();
        let id = param::id(&format!("{path}.lora_E.{name}"));
        Self { lora_e: Param::initialized(id, factors), kept: None }
    }
}
