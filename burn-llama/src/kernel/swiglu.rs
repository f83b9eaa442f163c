//! The gated activation (SwiGLU) with tensor operations.

use super::{F, primitive, tensor};
use burn::tensor::{activation::sigmoid, backend::Backend};

/// Implements [`swiglu`](super::Kernels::swiglu).
pub fn forward<B: Backend>(gate: F<B>, up: F<B>) -> F<B> {
    let gate = tensor::<B, 2>(gate);
    primitive(sigmoid(gate.clone()) * gate * tensor::<B, 2>(up))
}

/// Computes `d up = dy·a` and `d gate = dy·up·(s + a·(1 - s))`, where `s = σ(gate)` and `a = gate·s`.
pub fn backward<B: Backend>(gate: F<B>, up: F<B>, dy: F<B>) -> (F<B>, F<B>) {
    let dy = tensor::<B, 2>(dy);
    let [gate, up] = [gate, up].map(|kept| tensor::<B, 2>(kept).cast(dy.dtype()));
    let s = sigmoid(gate.clone());
    let a = gate * s.clone();
    let slope = s.clone() + a.clone() * (s.neg() + 1.0);
    (primitive(dy.clone() * up * slope), primitive(dy * a))
}
