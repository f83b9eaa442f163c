//! The loss of the output head over blocks of tokens. While the logits of a block exist, the gradients are made from them
//! too, so that no product is computed twice.

use super::{
    buffer::{contiguous, integers, tensor, unwritten, values, widened_part},
    lanes::{exp_sum, max, scale, vectorized},
};
use crate::kernel::{Losses, Targets, tensor as wrapped};
use burn::{backend::Flex, tensor::DType};
use burn_flex::FlexTensor;
use burn_peft::kernel::{
    Compute, LinearKernels, Stored,
    matrix::{self, Matrix, Output, Threads, product_in},
};
use rayon::prelude::*;

/// The number of logits that exist at a time, unless that is fewer than a block of tokens.
const LOGITS: usize = 9 << 18;
/// The same with a head that learns, because every block passes over its gradient, and with products in half precision, which
/// would wait for the head to come from memory.
const MORE_LOGITS: usize = 5 << 20;
/// Tokens that products take together.
const TOKENS: usize = 48;
/// Parts of a block of the head whose gradients of hidden states are made side by side, each from a stretch of memory, and added
/// up in their order.
const PARTS: usize = 8;
/// Rows of a head in half precision or packed that are widened at a time.
const ROWS: usize = 4096;

/// The head, read in blocks of rows.
struct Head<'a> {
    weight: &'a Stored<Flex>,
    vocabulary: usize,
    width: usize,
    compute: Compute,
}

impl Head<'_> {
    /// Calls `work` with the first row and the values of one block after the other.
    fn blocks(&self, mut work: impl FnMut(usize, Matrix<'_>, usize)) {
        let halves = match self.weight {
            Stored::Dense(weight) if weight.dtype() == DType::BF16 && matrix::widens() => Some(weight.storage()),
            _ => None,
        };
        if let Some(values) = halves {
            return work(0, Matrix::of_bf16(values, [self.vocabulary, self.width]), self.vocabulary);
        }
        let step = match self.weight {
            Stored::Dense(weight) if weight.dtype() == DType::F32 => self.vocabulary,
            _ => ROWS,
        };
        for from in (0..self.vocabulary).step_by(step.max(1)) {
            let to = self.vocabulary.min(from + step);
            let shape = [to - from, self.width];
            match self.weight {
                Stored::Dense(weight) => {
                    let part = widened_part(weight, from * self.width, to * self.width);
                    work(from, Matrix::new(&part, shape), to - from);
                }
                Stored::Packed(rows) => {
                    let part = Flex::unpack(&rows.slice(from..to));
                    work(from, Matrix::new(values(&part), shape), to - from);
                }
            }
        }
    }

    fn tokens(&self, learns: bool) -> usize {
        let logits = if learns || self.compute != Compute::F32 { MORE_LOGITS } else { LOGITS };
        (logits / self.vocabulary / TOKENS).max(1) * TOKENS
    }
}

/// What one block of tokens adds to.
struct Sums<'a> {
    losses: &'a mut [f32],
    lse: &'a mut [f32],
    /// `[block, width]`, added to; empty if nobody asks.
    d_hidden: &'a mut [f32],
    /// `[vocabulary, width]`, added to; empty if nobody asks.
    d_head: &'a mut [f32],
}

/// Losses, and the gradients of their sum with respect to the hidden states and the head as far as they are `wanted`.
pub(super) fn forward(
    hidden: FlexTensor,
    head: Stored<Flex>,
    targets: &Targets<Flex>,
    (wanted, compute): ([bool; 2], Compute),
) -> Losses<Flex> {
    let weights = contiguous(targets.weights.clone().into_primitive().tensor());
    let weight = match head {
        Stored::Dense(head) => Stored::Dense(contiguous(head)),
        packed => packed,
    };
    let hidden = contiguous(hidden);
    let ([n, width], [vocabulary, _]) = (hidden.layout().shape().dims(), weight.shape());
    let head = Head { weight: &weight, vocabulary, width, compute };
    let (ids, weights) = (integers(targets.ids.to_data()), values(&weights));
    let room = |wanted: bool, size: usize| if wanted { vec![0.0; size] } else { Vec::new() };
    let (mut losses, mut lse) = (vec![0.0; n], vec![0.0; n]);
    let (mut d_hidden, mut d_head) = (room(wanted[0], n * width), room(wanted[1], vocabulary * width));
    let step = head.tokens(wanted[1]);
    // Freed with the last block: nothing of this size is there while the backward pass runs.
    let mut logits = unwritten(n.min(step) * vocabulary);
    for from in (0..n).step_by(step) {
        let to = n.min(from + step);
        let d_hidden = if wanted[0] { &mut d_hidden[from * width..to * width] } else { &mut [] };
        let sums = Sums { losses: &mut losses[from..to], lse: &mut lse[from..to], d_hidden, d_head: &mut d_head };
        let tokens = Matrix::new(&values(&hidden)[from * width..to * width], [to - from, width]);
        let logits = &mut logits[..(to - from) * vocabulary];
        block(&head, tokens, (&ids[from..to], &weights[from..to]), (logits, sums));
    }
    let unit = |wanted: bool, values: Vec<f32>, shape: [usize; 2]| wanted.then(|| tensor(values, &shape));
    Losses {
        losses: tensor(losses, &[n]),
        lse: tensor(lse, &[n]),
        unit: [unit(wanted[0], d_hidden, [n, width]), unit(wanted[1], d_head, [vocabulary, width])],
    }
}

/// The logits are overwritten.
fn block(
    head: &Head<'_>,
    tokens: Matrix<'_>,
    (ids, weights): (&[i32], &[f32]),
    (logits, sums): (&mut [f32], Sums<'_>),
) {
    let (n, vocabulary, width) = (ids.len(), head.vocabulary, head.width);
    let gradient = !sums.d_hidden.is_empty() || !sums.d_head.is_empty();
    head.blocks(|from, rows, _| {
        let to = Output { values: &mut logits[from..], stride: vocabulary, add: false };
        product_in(head.compute, to, tokens, rows.transposed(), 1.0, Threads::All);
    });
    let rows = logits.par_chunks_exact_mut(vocabulary).zip(sums.losses).zip(sums.lse);
    rows.zip(ids.par_iter().zip(weights)).for_each(|(((logits, loss), lse), (&id, &weight))| {
        (*loss, *lse) = row(logits, id as usize, weight, gradient);
    });
    let logits = &*logits;
    if !sums.d_hidden.is_empty() {
        // Cleared by the caller.
        head.blocks(|from, rows, count| {
            let step = count.div_ceil(PARTS);
            let mut parts = unwritten(count.div_ceil(step) * n * width);
            parts.par_chunks_exact_mut(n * width).enumerate().for_each(|(part, values)| {
                let own = part * step..count.min((part + 1) * step);
                let logits = Matrix::strided(&logits[from + own.start..], [n, own.len()], vocabulary);
                let to = Output { values, stride: width, add: false };
                product_in(head.compute, to, logits, rows.rows(own), 1.0, Threads::One);
            });
            for part in parts.chunks_exact(n * width) {
                sums.d_hidden.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            }
        });
    }
    if !sums.d_head.is_empty() {
        let to = Output { values: sums.d_head, stride: width, add: true };
        product_in(head.compute, to, Matrix::new(logits, [n, vocabulary]).transposed(), tokens, 1.0, Threads::All);
    }
}

/// The loss and log-sum-exp of a row of logits, which becomes `weight·(softmax - one_hot(id))` if `gradient`.
fn row(logits: &mut [f32], id: usize, weight: f32, gradient: bool) -> (f32, f32) {
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

/// The gradients for `dy [n]`: those of the sum times a factor where all losses have the same one, else made anew.
pub(super) fn backward(
    (hidden, head): (FlexTensor, Stored<Flex>),
    targets: &Targets<Flex>,
    (kept, dy): (Losses<Flex>, FlexTensor),
    (wanted, compute): ([bool; 2], Compute),
) -> [Option<FlexTensor>; 2] {
    let factors = contiguous(dy.clone());
    let factor = values(&factors).first().copied().unwrap_or(0.0);
    let same = values(&factors).iter().all(|&dy| dy == factor);
    let made = kept.unit.iter().zip(wanted).all(|(unit, wanted)| unit.is_some() || !wanted);
    if same && made {
        return kept.unit.map(|unit| unit.map(|unit| times(unit, factor)));
    }
    let weights = targets.weights.clone() * wrapped::<Flex, 1>(dy);
    forward(hidden, head, &Targets { ids: targets.ids.clone(), weights }, (wanted, compute)).unit
}

/// In place where nobody else holds the tensor.
fn times(mut x: FlexTensor, factor: f32) -> FlexTensor {
    if factor != 1.0 {
        x.storage_mut::<f32>().par_chunks_mut(1 << 14).for_each(|x| scale(x, factor));
    }
    x
}
