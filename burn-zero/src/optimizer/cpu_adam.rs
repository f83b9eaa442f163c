//! Adam over slices in host memory, in one pass: 28 bytes of memory traffic per parameter.
//!
//! The arithmetic is that of the tensor implementation ([`AdamW::update`](super::AdamW::update)), operation by
//! operation in f32, so the result is the same bit for bit. Threads process blocks, and vector instructions are chosen
//! at run time.

use super::{AdamVariant, AdamW, Hyperparameters};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

/// The number of values that a thread processes at a time; what it reads and writes fits into its cache.
const THREAD_BLOCK: usize = 16 << 10;

/// One update by Adam.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamUpdate {
    /// The settings; their weight decay is ignored.
    pub settings: AdamW,
    /// True if weight decay is decoupled (AdamW), false if it is added to the gradient.
    pub decoupled: bool,
    /// The learning rate.
    pub lr: f64,
    /// The weight decay.
    pub weight_decay: f64,
    /// The factor by which gradients are multiplied.
    pub grad_scale: f64,
    /// The number of this update, counted from 1.
    pub step: usize,
}

/// The destination of a half-precision copy of the new parameters.
#[derive(Debug)]
pub enum HalfCopy<'a> {
    /// No copy.
    None,
    /// A copy in bf16.
    Bf16(&'a mut [bf16]),
    /// A copy in f16.
    F16(&'a mut [f16]),
}

/// The slices that an update reads and writes, all of one length. Before the first update `exp_avg` is filled with -0
/// and `exp_avg_sq` with 0 (adding to -0 keeps the sign of a zero).
#[derive(Debug)]
pub struct AdamSlices<'a> {
    /// The parameters.
    pub parameter: &'a mut [f32],
    /// Their gradients.
    pub gradient: &'a [f32],
    /// The running means of gradients.
    pub exp_avg: &'a mut [f32],
    /// The running means of squared gradients.
    pub exp_avg_sq: &'a mut [f32],
}

/// The constants of an update, precomputed in f32.
#[derive(Debug, Clone, Copy)]
pub(super) struct AdamConstants {
    decay_factor: f32,
    l2: f32,
    grad_scale: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    neg_step_size: f32,
    bias_correction2_sqrt: f32,
    epsilon: f32,
}

impl AdamUpdate {
    /// Returns the update number `step`, counted from 1.
    pub(crate) fn new(adam: AdamVariant, hyperparameters: Hyperparameters, step: usize) -> Self {
        let AdamVariant { settings, decoupled } = adam;
        let Hyperparameters { lr, weight_decay, grad_scale } = hyperparameters;
        Self { settings, decoupled, lr, weight_decay, grad_scale, step }
    }

    pub(super) fn constants(&self) -> AdamConstants {
        let AdamW { betas: (beta1, beta2), epsilon, .. } = self.settings;
        let correction = |beta: f64| 1.0 - beta.powi(self.step as i32);
        let (keep, decay) =
            if self.decoupled { (1.0 - self.lr * self.weight_decay, 0.0) } else { (1.0, self.weight_decay) };
        AdamConstants {
            decay_factor: keep as f32,
            l2: decay as f32,
            grad_scale: self.grad_scale as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            neg_step_size: (-self.lr / correction(beta1)) as f32,
            bias_correction2_sqrt: correction(beta2).sqrt() as f32,
            epsilon: epsilon as f32,
        }
    }

    /// Applies the update.
    ///
    /// # Panics
    /// Panics if the slices differ in length.
    pub fn apply(&self, slices: AdamSlices<'_>, copy: HalfCopy<'_>) {
        let constants = self.constants();
        let AdamSlices { parameter, gradient, exp_avg, exp_avg_sq } = slices;
        let lengths = [gradient.len(), exp_avg.len(), exp_avg_sq.len()];
        assert_eq!(lengths, [parameter.len(); 3], "gradients and moments have the length of the parameters");
        let blocks = parameter.par_chunks_mut(THREAD_BLOCK).zip(gradient.par_chunks(THREAD_BLOCK));
        let blocks = blocks.zip(exp_avg.par_chunks_mut(THREAD_BLOCK)).zip(exp_avg_sq.par_chunks_mut(THREAD_BLOCK));
        let blocks = blocks.map(|(((parameter, gradient), exp_avg), exp_avg_sq)| AdamSlices {
            parameter,
            gradient,
            exp_avg,
            exp_avg_sq,
        });
        match copy {
            HalfCopy::None => blocks.for_each(|block| constants.update_block(block, &mut [])),
            HalfCopy::Bf16(copy) => {
                assert_eq!(copy.len(), lengths[0], "the copy has the length of the parameters");
                blocks
                    .zip(copy.par_chunks_mut(THREAD_BLOCK))
                    .for_each(|(block, copy)| constants.update_block(block, copy));
            }
            HalfCopy::F16(copy) => {
                assert_eq!(copy.len(), lengths[0], "the copy has the length of the parameters");
                blocks.zip(copy.par_chunks_mut(THREAD_BLOCK)).for_each(|(block, copy)| {
                    let AdamSlices { parameter, gradient, exp_avg, exp_avg_sq } = block;
                    let block = AdamSlices { parameter: &mut *parameter, gradient, exp_avg, exp_avg_sq };
                    constants.update_block(block, &mut []);
                    copy.convert_from_f32_slice(parameter);
                });
            }
        }
    }
}

impl AdamConstants {
    /// Updates one block, with code compiled for the widest vector instructions of this machine.
    pub(super) fn update_block(self, block: AdamSlices<'_>, copy: &mut [bf16]) {
        pulp::Arch::new().dispatch(AdamKernel { constants: self, block, copy });
    }
}

/// The kernel that updates a block. It is a struct because a closure would not be compiled with the dispatched target
/// features.
struct AdamKernel<'a> {
    constants: AdamConstants,
    block: AdamSlices<'a>,
    /// The destination of the bf16 copy: empty, or as long as the block.
    copy: &'a mut [bf16],
}

impl pulp::NullaryFnOnce for AdamKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { constants: c, block: AdamSlices { parameter, gradient, exp_avg, exp_avg_sq }, copy } = self;
        let n = parameter.len();
        let (gradient, exp_avg, exp_avg_sq) = (&gradient[..n], &mut exp_avg[..n], &mut exp_avg_sq[..n]);
        for i in 0..n {
            let (mut p, mut g) = (parameter[i], gradient[i]);
            g *= c.grad_scale;
            g = if c.l2 == 0.0 { g } else { g + p * c.l2 };
            p *= c.decay_factor;
            let m = exp_avg[i] + (g - exp_avg[i]) * c.one_minus_beta1;
            let v = exp_avg_sq[i] * c.beta2 + g * c.one_minus_beta2 * g;
            let root = v.sqrt() / c.bias_correction2_sqrt + c.epsilon;
            parameter[i] = p + m * c.neg_step_size / root;
            exp_avg[i] = m;
            exp_avg_sq[i] = v;
        }
        copy.iter_mut().zip(&*parameter).for_each(|(half, &value)| *half = to_bf16(value));
    }
}

/// Rounds to the nearest bf16, ties to even; NaN stays NaN.
#[inline(always)]
fn to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
}
