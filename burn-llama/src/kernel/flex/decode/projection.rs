//! The linear layers and norms of a decode step, on slices.

use crate::{
    kernel::{
        flex::{
            buffer::{contiguous, to_f32},
            rms_norm::inverse_rms,
            vector_ops::{self, vectorized},
        },
        primitive,
    },
    model::RmsNorm,
};
use burn::backend::Flex;
use burn_peft::Linear;
use burn_peft_kernels::{
    WeightMatrix,
    gemv::{Gemv, WeightRows, gemv_batch},
};

/// The weights of a LoRA adapter, which adds `scaling · x·Aᵀ·Bᵀ`.
#[derive(Debug)]
struct LoraWeights {
    a: WeightRows,
    b: WeightRows,
    scaling: f32,
}

/// A linear layer with its active adapters.
#[derive(Debug)]
pub(super) struct Projection {
    pub(super) weight: WeightRows,
    bias: Option<Vec<f32>>,
    adapters: Vec<LoraWeights>,
}

impl Projection {
    /// Returns the layer's weights; `None` if anything but LoRA adapters acts on it.
    pub(super) fn of(linear: &Linear<Flex>) -> Option<Self> {
        if linear.ia3.iter().any(|ia3| ia3.active && !ia3.merged) {
            return None;
        }
        let mut adapters = Vec::new();
        for adapter in linear.adapters.iter().filter(|adapter| adapter.active && !adapter.merged) {
            if adapter.dora.is_some() {
                return None;
            }
            let rows = |values| WeightRows::new(WeightMatrix::Dense(primitive::<Flex, 2>(values)));
            let [a, b] = [adapter.down_weight(), adapter.lora_b.val()].map(rows);
            adapters.push(LoraWeights { a, b, scaling: adapter.scaling as f32 });
        }
        let bias = linear.bias.as_ref().map(|bias| to_f32(&contiguous(primitive(bias.val()))).into_owned());
        Some(Self { weight: WeightRows::new(linear.weight.matrix_ref()), bias, adapters })
    }

    /// Returns a layer with nothing but a weight.
    pub(super) fn plain(weight: WeightRows) -> Self {
        Self { weight, bias: None, adapters: Vec::new() }
    }

    /// Adds the bias and the outputs of the adapters to `y`.
    fn add_bias_and_adapters(&self, x: &[f32], y: &mut [f32], LoraBuffers { a_output, b_output }: &mut LoraBuffers) {
        let [out, features] = self.weight.shape();
        if let Some(bias) = &self.bias {
            y.chunks_exact_mut(out).for_each(|y| add(y, bias));
        }
        let rows = x.len() / features;
        for LoraWeights { a, b, scaling } in &self.adapters {
            a_output.resize(rows * a.shape()[0], 0.0);
            b_output.resize(rows * out, 0.0);
            gemv_batch([Gemv { weight: a, x, y: a_output }]);
            a_output.iter_mut().for_each(|value| *value *= scaling);
            gemv_batch([Gemv { weight: b, x: a_output, y: b_output }]);
            add(y, b_output);
        }
    }
}

#[derive(Debug)]
pub(super) struct DecodeRmsNorm {
    weight: Vec<f32>,
    epsilon: f64,
}

impl DecodeRmsNorm {
    pub(super) fn of(norm: &RmsNorm<Flex>) -> Self {
        let weight = to_f32(&contiguous(primitive(norm.weight.val()))).into_owned();
        Self { weight, epsilon: norm.epsilon }
    }

    /// Normalises every chunk of `x` that is as long as the weight, into `y`.
    pub(super) fn apply(&self, x: &[f32], y: &mut [f32]) {
        let width = self.weight.len();
        y.copy_from_slice(x);
        y.chunks_exact_mut(width).for_each(|y| self.apply_in_place(y));
    }

    pub(super) fn apply_in_place(&self, x: &mut [f32]) {
        vectorized(
            #[inline(always)]
            || {
                for x in x.chunks_exact_mut(self.weight.len()) {
                    let r = inverse_rms(x, self.epsilon);
                    for (x, w) in x.iter_mut().zip(&self.weight) {
                        *x = *x * r * w;
                    }
                }
            },
        );
    }
}

/// Scratch memory of the LoRA adapters.
#[derive(Debug, Default)]
pub(super) struct LoraBuffers {
    /// The output of A, `[rows, rank]`.
    a_output: Vec<f32>,
    /// The output of B, `[rows, out]`.
    b_output: Vec<f32>,
}

/// Applies several projections to one input, each with its own output.
pub(super) fn project<const N: usize>(mut all: [(&Projection, &mut [f32]); N], x: &[f32], buffers: &mut LoraBuffers) {
    gemv_batch(all.each_mut().map(|(projection, y)| Gemv { weight: &projection.weight, x, y }));
    for (projection, y) in all {
        projection.add_bias_and_adapters(x, y, buffers);
    }
}

pub(super) fn add(y: &mut [f32], x: &[f32]) {
    vectorized(
        #[inline(always)]
        || vector_ops::add(y, x),
    );
}
