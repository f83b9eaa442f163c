//! The cross-entropy loss of the output head over blocks of tokens. The gradients are computed as well while the logits
//! of a block exist, so that the logits are not computed twice.

use super::{
    buffer::{contiguous, tensor, to_f32_range, to_i32, uninit_vec, values},
    vector_ops::{exp_sum, max, scale, vectorized},
};
use crate::kernel::{
    CrossEntropyGradients, CrossEntropyInputs, CrossEntropyOptions, Losses, Targets, tensor as wrapped,
};
use burn::{backend::Flex, tensor::DType};
use burn_flex::FlexTensor;
use burn_peft_kernels::{
    LinearKernels, MatmulPrecision, WeightMatrix,
    gemm::{self, GemmOptions, GemmOutput, Matrix, Threads, gemm},
};
use rayon::prelude::*;

/// The number of logits that exist at a time, rounded down to whole multiples of [`TOKEN_MULTIPLE`] tokens, at least
/// one.
const MAX_LOGITS: usize = 9 << 18;
/// The same with a trainable head, because every block makes a pass over its gradient, and with matrix products in half
/// precision, which would be bound by reading the head from memory.
const MAX_LOGITS_LARGE: usize = 5 << 20;
/// The number of tokens per block is a multiple of this, which suits the matrix products.
const TOKEN_MULTIPLE: usize = 48;
/// The number of parts into which a block of the head is split for the gradient of hidden states. They are computed in
/// parallel, each from contiguous memory, and summed in order.
const HEAD_PARTS: usize = 8;
/// The number of rows of a packed or half-precision head that are converted to f32 at a time.
const CONVERTED_ROWS: usize = 4096;

/// The output head, read in blocks of rows.
struct LmHead {
    weight: WeightMatrix<Flex>,
    vocabulary: usize,
    width: usize,
    precision: MatmulPrecision,
}

impl LmHead {
    fn new(weight: WeightMatrix<Flex>, precision: MatmulPrecision) -> Self {
        let [vocabulary, width] = weight.shape();
        let weight = match weight {
            WeightMatrix::Dense(weight) => WeightMatrix::Dense(contiguous(weight)),
            packed => packed,
        };
        Self { weight, vocabulary, width, precision }
    }

    /// Calls `work` with the first row, the values and the number of rows of each block in turn.
    fn for_each_block(&self, mut work: impl FnMut(usize, Matrix<'_>, usize)) {
        let halves = match &self.weight {
            WeightMatrix::Dense(weight) if weight.dtype() == DType::BF16 && gemm::reads_bf16() => {
                Some(weight.storage())
            }
            _ => None,
        };
        if let Some(values) = halves {
            return work(0, Matrix::from_bf16(values, [self.vocabulary, self.width]), self.vocabulary);
        }
        let step = match &self.weight {
            WeightMatrix::Dense(weight) if weight.dtype() == DType::F32 => self.vocabulary,
            _ => CONVERTED_ROWS,
        };
        for from in (0..self.vocabulary).step_by(step.max(1)) {
            let to = self.vocabulary.min(from + step);
            let shape = [to - from, self.width];
            match &self.weight {
                WeightMatrix::Dense(weight) => {
                    let part = to_f32_range(weight, from * self.width, to * self.width);
                    work(from, Matrix::new(&part, shape), to - from);
                }
                WeightMatrix::Packed(rows) => {
                    let part = Flex::unpack(&rows.slice(from..to));
                    work(from, Matrix::new(values(&part), shape), to - from);
                }
            }
        }
    }

    fn tokens_per_block(&self, trained: bool) -> usize {
        let logits = if trained || self.precision != MatmulPrecision::F32 { MAX_LOGITS_LARGE } else { MAX_LOGITS };
        (logits / self.vocabulary / TOKEN_MULTIPLE).max(1) * TOKEN_MULTIPLE
    }
}

/// One block of tokens.
struct TokenBlock<'a> {
    /// The hidden states, `[block, width]`.
    hidden: Matrix<'a>,
    /// The target of each token.
    ids: &'a [i32],
    /// The factor of each token's loss.
    weights: &'a [f32],
}

/// The outputs of one block of tokens.
struct TokenBlockOutputs<'a> {
    /// Scratch memory for the logits, `[block, vocabulary]`.
    logits: &'a mut [f32],
    losses: &'a mut [f32],
    lse: &'a mut [f32],
    /// The accumulated gradient of the hidden states, `[block, width]`; empty if it is not wanted.
    d_hidden: &'a mut [f32],
    /// The accumulated gradient of the head, `[vocabulary, width]`; empty if it is not wanted.
    d_head: &'a mut [f32],
}

/// Computes the losses and, as far as `options` ask for them, the gradients of their sum.
pub(super) fn forward(inputs: CrossEntropyInputs<Flex>, options: CrossEntropyOptions) -> Losses<Flex> {
    let CrossEntropyInputs { hidden, head, targets } = inputs;
    let CrossEntropyOptions { hidden_gradient, head_gradient, precision } = options;
    let weights = contiguous(targets.weights.into_primitive().tensor());
    let hidden = contiguous(hidden);
    let head = LmHead::new(head, precision);
    let (n, vocabulary, width) = (hidden.layout().shape()[0], head.vocabulary, head.width);
    let (ids, weights) = (to_i32(targets.ids.into_data()), values(&weights));
    let zeros = |wanted: bool, size: usize| if wanted { vec![0.0; size] } else { Vec::new() };
    let (mut losses, mut lse) = (vec![0.0; n], vec![0.0; n]);
    let (mut d_hidden, mut d_head) = (zeros(hidden_gradient, n * width), zeros(head_gradient, vocabulary * width));
    let step = head.tokens_per_block(head_gradient);
    // This buffer is freed after the last block, so that it takes no memory in the backward pass.
    // SAFETY: every block of tokens overwrites its logits before it reads them.
    let mut logits = unsafe { uninit_vec(n.min(step) * vocabulary) };
    for from in (0..n).step_by(step) {
        let to = n.min(from + step);
        let block = TokenBlock {
            hidden: Matrix::new(&values(&hidden)[from * width..to * width], [to - from, width]),
            ids: &ids[from..to],
            weights: &weights[from..to],
        };
        let outputs = TokenBlockOutputs {
            logits: &mut logits[..(to - from) * vocabulary],
            losses: &mut losses[from..to],
            lse: &mut lse[from..to],
            d_hidden: if hidden_gradient { &mut d_hidden[from * width..to * width] } else { &mut [] },
            d_head: &mut d_head,
        };
        token_block(&head, block, outputs);
    }
    let gradient = |wanted: bool, values: Vec<f32>, shape: [usize; 2]| wanted.then(|| tensor(values, &shape));
    let sum_gradients = CrossEntropyGradients {
        hidden: gradient(hidden_gradient, d_hidden, [n, width]),
        head: gradient(head_gradient, d_head, [vocabulary, width]),
    };
    Losses { losses: tensor(losses, &[n]), lse: tensor(lse, &[n]), sum_gradients }
}

/// Computes the outputs of one block of tokens.
fn token_block(head: &LmHead, block: TokenBlock<'_>, outputs: TokenBlockOutputs<'_>) {
    let TokenBlock { hidden, ids, weights } = block;
    let TokenBlockOutputs { logits, losses, lse, d_hidden, d_head } = outputs;
    let (n, vocabulary, width) = (ids.len(), head.vocabulary, head.width);
    let gradient = !d_hidden.is_empty() || !d_head.is_empty();
    head.for_each_block(|from, rows, _| {
        let to = GemmOutput { values: &mut logits[from..], stride: vocabulary, accumulate: false };
        gemm(to, hidden, rows.transposed(), GemmOptions::new(head.precision));
    });
    let rows = logits.par_chunks_exact_mut(vocabulary).zip(losses).zip(lse);
    rows.zip(ids.par_iter().zip(weights)).for_each(|(((logits, loss), lse), (&id, &weight))| {
        (*loss, *lse) = row_loss(logits, id as usize, weight, gradient);
    });
    if !d_hidden.is_empty() {
        add_hidden_gradient(head, logits, n, d_hidden);
    }
    if !d_head.is_empty() {
        let to = GemmOutput { values: d_head, stride: width, accumulate: true };
        let d_logits = Matrix::new(logits, [n, vocabulary]).transposed();
        gemm(to, d_logits, hidden, GemmOptions::new(head.precision));
    }
}

/// Adds the gradient of the hidden states of `n` tokens to `d_hidden [n, width]`, from that of their logits
/// `[n, vocabulary]`.
fn add_hidden_gradient(head: &LmHead, d_logits: &[f32], n: usize, d_hidden: &mut [f32]) {
    let (vocabulary, width) = (head.vocabulary, head.width);
    head.for_each_block(|from, rows, count| {
        let step = count.div_ceil(HEAD_PARTS);
        // SAFETY: each part is overwritten by a product.
        let mut parts = unsafe { uninit_vec(count.div_ceil(step) * n * width) };
        parts.par_chunks_exact_mut(n * width).enumerate().for_each(|(part, values)| {
            let own = part * step..count.min((part + 1) * step);
            let d_logits = Matrix::strided(&d_logits[from + own.start..], [n, own.len()], vocabulary);
            let to = GemmOutput { values, stride: width, accumulate: false };
            let options = GemmOptions { threads: Threads::One, ..GemmOptions::new(head.precision) };
            gemm(to, d_logits, rows.rows(own), options);
        });
        for part in parts.chunks_exact(n * width) {
            d_hidden.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
    });
}

/// Computes the loss and the log-sum-exp of a row of logits, and replaces the row by `weight·(softmax - one_hot(id))`
/// if `gradient`.
fn row_loss(logits: &mut [f32], id: usize, weight: f32, gradient: bool) -> (f32, f32) {
    let target = logits[id];
    let (largest, sum) = vectorized(
        #[inline(always)]
        || {
            let largest = max(logits);
            let sum = exp_sum(logits, largest);
            if gradient {
                scale(logits, weight / sum);
            }
            (largest, sum)
        },
    );
    if gradient {
        logits[id] -= weight;
    }
    let lse = largest + sum.ln();
    ((lse - target) * weight, lse)
}

/// Computes the gradients for `dy [n]`: scales those of the sum of the losses if all values of `dy` are equal and the
/// forward pass has computed them, otherwise computes them again.
pub(super) fn backward(
    inputs: CrossEntropyInputs<Flex>,
    sum_gradients: CrossEntropyGradients<Flex>,
    dy: FlexTensor,
    options: CrossEntropyOptions,
) -> CrossEntropyGradients<Flex> {
    let factors = contiguous(dy.clone());
    let factor = values(&factors).first().copied().unwrap_or(0.0);
    let equal = values(&factors).iter().all(|&dy| dy == factor);
    let computed = (sum_gradients.hidden.is_some() || !options.hidden_gradient)
        && (sum_gradients.head.is_some() || !options.head_gradient);
    if equal && computed {
        let scaled = |gradient: Option<FlexTensor>| gradient.map(|gradient| scale_tensor(gradient, factor));
        return CrossEntropyGradients { hidden: scaled(sum_gradients.hidden), head: scaled(sum_gradients.head) };
    }
    let Targets { ids, weights } = inputs.targets;
    let targets = Targets { ids, weights: weights * wrapped::<Flex, 1>(dy) };
    forward(CrossEntropyInputs { targets, ..inputs }, options).sum_gradients
}

/// Multiplies the tensor by `factor`, in place if it has no other owner.
fn scale_tensor(mut x: FlexTensor, factor: f32) -> FlexTensor {
    if factor != 1.0 {
        x.storage_mut::<f32>().par_chunks_mut(1 << 14).for_each(|x| scale(x, factor));
    }
    x
}
