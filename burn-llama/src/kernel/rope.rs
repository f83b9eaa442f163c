//! Rotary position embedding with tensor operations.

use super::{F, primitive, tensor};
use burn::tensor::{Tensor, backend::Backend, s};

/// Implements [`rope`](super::Kernels::rope).
pub fn forward<B: Backend>(x: F<B>, cos: F<B>, sin: F<B>) -> F<B> {
    let x = tensor::<B, 3>(x);
    let half = x.dims()[2] / 2;
    let (cos, sin) = (tensor::<B, 2>(cos).unsqueeze_dim::<3>(1), tensor::<B, 2>(sin).unsqueeze_dim::<3>(1));
    let (first, second) = (x.clone().slice(s![.., .., ..half]), x.slice(s![.., .., half..]));
    let rotated = first.clone() * cos.clone() - second.clone() * sin.clone();
    primitive(Tensor::cat(vec![rotated, second * cos + first * sin], 2))
}
