//! Root-mean-square normalisation with tensor operations.

use super::{F, primitive, tensor};
use burn::tensor::{Tensor, backend::Backend};

/// The inputs of [`rms_norm_backward`](super::Kernels::rms_norm_backward) besides those of the forward pass.
#[derive(Debug, Clone)]
pub struct RmsNormGradient<B: Backend> {
    /// The gradient of the output, `[n, features]`.
    pub dy: F<B>,
    /// The gradient of the input that other operations have accumulated before, `[n, features]`.
    pub accumulated: Option<F<B>>,
    /// The epsilon of the forward pass.
    pub epsilon: f64,
    /// True if the gradient of the weight is wanted.
    pub weight_trained: bool,
}

/// Computes `1 / √(mean(x²) + eps)`, `[n, 1]`.
fn inverse_rms<B: Backend>(x: &Tensor<B, 2>, epsilon: f64) -> Tensor<B, 2> {
    (x.clone().powi_scalar(2).mean_dim(1) + epsilon).sqrt().recip()
}

/// Implements [`rms_norm`](super::Kernels::rms_norm).
pub fn forward<B: Backend>(x: F<B>, weight: F<B>, epsilon: f64) -> F<B> {
    let x = tensor::<B, 2>(x);
    let weight = tensor::<B, 1>(weight).cast(x.dtype());
    let r = inverse_rms(&x, epsilon);
    primitive(x * r * weight.unsqueeze())
}

/// Implements [`rms_norm_backward`](super::Kernels::rms_norm_backward).
pub fn backward<B: Backend>(x: F<B>, weight: F<B>, gradient: RmsNormGradient<B>) -> (F<B>, Option<F<B>>) {
    let RmsNormGradient { dy, accumulated, epsilon, weight_trained } = gradient;
    let (x, dy) = (tensor::<B, 2>(x), tensor::<B, 2>(dy));
    let weight = tensor::<B, 1>(weight).cast(x.dtype());
    let r = inverse_rms(&x, epsilon);
    let normed = x * r.clone();
    let dw = weight_trained.then(|| primitive((dy.clone() * normed.clone()).sum_dim(0).squeeze_dim::<1>(0)));
    let dn = dy * weight.unsqueeze();
    let dot = (dn.clone() * normed.clone()).mean_dim(1);
    let dx = (dn - normed * dot) * r;
    let dx = match accumulated {
        Some(accumulated) => dx + tensor(accumulated),
        None => dx,
    };
    (primitive(dx), dw)
}
