//! The cross-entropy loss of the output head over blocks of tokens and of the vocabulary, with tensor operations.

use super::{F, primitive, tensor};
use burn::tensor::{
    IndexingUpdateOp, Int, Tensor,
    backend::{AutodiffBackend, Backend},
    s,
};
use burn_peft_kernels::{LinearKernels, MatmulPrecision, WeightMatrix};

/// The number of tokens per block.
const TOKENS_PER_BLOCK: usize = 4096;
/// The number of logits that exist at a time.
const MAX_LOGITS: usize = 1 << 21;

/// The target of each hidden state.
#[derive(Debug, Clone)]
pub struct Targets<B: Backend> {
    /// The token ids, `[n]`.
    pub ids: Tensor<B, 1, Int>,
    /// The factor of each token's loss, `[n]`.
    pub weights: Tensor<B, 1>,
}

/// The result of the cross-entropy, with the values that its backward pass may use.
#[derive(Debug, Clone)]
pub struct Losses<B: Backend> {
    /// The weighted loss of each token, `[n]`.
    pub losses: F<B>,
    /// The log-sum-exp of each token's logits, `[n]`.
    pub lse: F<B>,
    /// The gradients of the sum of the losses, as far as the forward pass computed them.
    pub sum_gradients: CrossEntropyGradients<B>,
}

/// The inputs of the cross-entropy.
#[derive(Debug, Clone)]
pub struct CrossEntropyInputs<B: Backend> {
    /// The normalised hidden states, `[n, features]`.
    pub hidden: F<B>,
    /// The output head, `[vocabulary, features]`. A packed head is never trained.
    pub head: WeightMatrix<B>,
    /// The target of each hidden state.
    pub targets: Targets<B>,
}

/// The gradients to compute, and the precision of the matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CrossEntropyOptions {
    /// True if the gradient of the hidden states is wanted.
    pub hidden_gradient: bool,
    /// True if the gradient of the head is wanted.
    pub head_gradient: bool,
    /// The precision of the matrix products with the head.
    pub precision: MatmulPrecision,
}

/// The gradients of the inputs of the cross-entropy; `None` where one is not wanted or not computed.
#[derive(Debug, Clone)]
pub struct CrossEntropyGradients<B: Backend> {
    /// The gradient of the hidden states, `[n, features]`.
    pub hidden: Option<F<B>>,
    /// The gradient of the head, `[vocabulary, features]`.
    pub head: Option<F<B>>,
}

impl<B: Backend> CrossEntropyGradients<B> {
    /// No gradients.
    pub const NONE: Self = Self { hidden: None, head: None };
}

impl<B: Backend> Targets<B> {
    fn slice(&self, from: usize, to: usize) -> Self {
        Self { ids: self.ids.clone().slice(s![from..to]), weights: self.weights.clone().slice(s![from..to]) }
    }
}

impl<B: AutodiffBackend> Targets<B> {
    /// Returns the same targets for the backend without autodiff.
    pub(crate) fn inner(&self) -> Targets<B::InnerBackend> {
        Targets { ids: self.ids.clone().inner(), weights: self.weights.clone().inner() }
    }
}

/// Returns ranges of at most `size` that cover `0..n`.
fn blocks(n: usize, size: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..n).step_by(size).map(move |from| (from, n.min(from + size)))
}

/// Returns the blocks of the vocabulary for `n` tokens.
fn vocabulary_blocks(n: usize, vocabulary: usize) -> impl Iterator<Item = (usize, usize)> {
    blocks(vocabulary, (MAX_LOGITS / n.max(1)).max(256))
}

fn matmul<B: LinearKernels>(a: Tensor<B, 2>, b: Tensor<B, 2>, precision: MatmulPrecision) -> Tensor<B, 2> {
    tensor(burn_peft_kernels::matmul::<B>(primitive(a), primitive(b), precision))
}

/// Implements [`linear_cross_entropy`](super::Kernels::linear_cross_entropy).
pub fn forward<B: LinearKernels>(inputs: CrossEntropyInputs<B>, options: CrossEntropyOptions) -> Losses<B> {
    let CrossEntropyInputs { hidden, head, targets } = inputs;
    let hidden = tensor::<B, 2>(hidden);
    let (mut losses, mut sums) = (Vec::new(), Vec::new());
    for (from, to) in blocks(hidden.dims()[0], TOKENS_PER_BLOCK) {
        let (hidden, targets) = (hidden.clone().slice(s![from..to, ..]), targets.slice(from, to));
        let lse = log_sum_exp(&hidden, &head, options.precision);
        let rows = head.select(targets.ids).cast(hidden.dtype());
        let target = (hidden * rows).sum_dim(1).squeeze_dim::<1>(1);
        losses.push((lse.clone() - target) * targets.weights);
        sums.push(lse);
    }
    Losses {
        losses: primitive(Tensor::cat(losses, 0)),
        lse: primitive(Tensor::cat(sums, 0)),
        sum_gradients: CrossEntropyGradients::NONE,
    }
}

/// Computes `log Σ exp(hidden · headᵀ)` over the vocabulary, `[n]`.
fn log_sum_exp<B: LinearKernels>(
    hidden: &Tensor<B, 2>,
    head: &WeightMatrix<B>,
    precision: MatmulPrecision,
) -> Tensor<B, 1> {
    let n = hidden.dims()[0];
    let mut running: Option<(Tensor<B, 2>, Tensor<B, 2>)> = None;
    for (from, to) in vocabulary_blocks(n, head.shape()[0]) {
        let rows = head.rows(from..to).cast(hidden.dtype());
        let logits = matmul(hidden.clone(), rows.transpose(), precision);
        let max = logits.clone().max_dim(1);
        running = Some(match running {
            None => (max.clone(), (logits - max).exp().sum_dim(1)),
            Some((old, sum)) => {
                let max = Tensor::max_pair(max, Tensor::clone(&old));
                let sum = sum * (old - max.clone()).exp();
                (max.clone(), sum + (logits - max).exp().sum_dim(1))
            }
        });
    }
    let (max, sum) = running.expect("a vocabulary is not empty");
    (max + sum.log()).squeeze_dim::<1>(1)
}

/// Computes the gradient of the hidden states and, if it is wanted, that of the head. The gradient of the logits is
/// `dy·weight·(softmax - one_hot(target))`.
pub fn backward<B: LinearKernels>(
    inputs: CrossEntropyInputs<B>,
    lse: F<B>,
    dy: F<B>,
    options: CrossEntropyOptions,
) -> CrossEntropyGradients<B> {
    let CrossEntropyInputs { hidden, head, targets } = inputs;
    let CrossEntropyOptions { head_gradient, precision, .. } = options;
    let hidden = tensor::<B, 2>(hidden);
    let (lse, scale) = (tensor::<B, 1>(lse), tensor::<B, 1>(dy) * targets.weights);
    let vocabulary = head.shape()[0];
    let mut d_hidden = Vec::new();
    let mut d_head: Option<Tensor<B, 2>> = None;
    for (from, to) in blocks(hidden.dims()[0], TOKENS_PER_BLOCK) {
        let h = hidden.clone().slice(s![from..to, ..]);
        let column = |x: &Tensor<B, 1>| x.clone().slice(s![from..to]).unsqueeze_dim::<2>(1);
        let (lse, scale) = (column(&lse), column(&scale));
        let ids = targets.ids.clone().slice(s![from..to]);
        let mut dh = (head.select(ids.clone()).cast(h.dtype()) * scale.clone()).neg();
        let mut parts = Vec::new();
        for (first, end) in vocabulary_blocks(to - from, vocabulary) {
            let w = head.rows(first..end).cast(h.dtype());
            let logits = matmul(h.clone(), w.clone().transpose(), precision);
            let d_logits = (logits - lse.clone()).exp() * scale.clone();
            if head_gradient {
                parts.push(matmul(d_logits.clone().transpose(), h.clone(), precision));
            }
            dh = dh + matmul(d_logits, w, precision);
        }
        if head_gradient {
            let part = Tensor::cat(parts, 0).select_assign(0, ids, (h * scale).neg(), IndexingUpdateOp::Add);
            d_head = Some(match d_head {
                Some(sum) => sum + part,
                None => part,
            });
        }
        d_hidden.push(dh);
    }
    CrossEntropyGradients { hidden: Some(primitive(Tensor::cat(d_hidden, 0))), head: d_head.map(primitive) }
}
