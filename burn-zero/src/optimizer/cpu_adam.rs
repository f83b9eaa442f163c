//! Adam over host slices, in one pass: 28 bytes of memory traffic per parameter.
//!
//! The arithmetic is that of the tensors' path ([`AdamW::update`](super::AdamW::update)), operation by operation in f32, so that
//! the result is the same bit for bit. Threads take blocks, vector instructions are chosen at run time.

use super::AdamW;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

/// Values that one thread takes at a time: what it reads and writes fits its cache.
const BLOCK: usize = 16 << 10;

/// An update of Adam.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// The settings; their weight decay is not looked at.
    pub settings: AdamW,
    /// Whether weight decay is decoupled (AdamW) or added to the gradient.
    pub decoupled: bool,
    /// The learning rate.
    pub lr: f64,
    /// The weight decay.
    pub weight_decay: f64,
    /// What gradients are multiplied by.
    pub scale: f64,
    /// The number of this update, from 1.
    pub step: usize,
}

/// Where a copy of the new parameters in half precision goes.
#[derive(Debug)]
pub enum Copy<'a> {
    /// Nowhere.
    None,
    /// To bf16.
    Bf16(&'a mut [bf16]),
    /// To f16.
    F16(&'a mut [f16]),
}

/// What an update reads and writes; slices of one length. Before the first update `exp_avg` is filled with -0, `exp_avg_sq` with
/// 0 (adding to -0 keeps the sign of a zero).
#[derive(Debug)]
pub struct Slices<'a> {
    /// The parameters.
    pub parameter: &'a mut [f32],
    /// Their gradients.
    pub gradient: &'a [f32],
    /// The running means of gradients.
    pub exp_avg: &'a mut [f32],
    /// The running means of their squares.
    pub exp_avg_sq: &'a mut [f32],
}

/// The constants of an update as the arithmetic uses them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Constants {
    keep: f32,
    decay: f32,
    scale: f32,
    share1: f32,
    beta2: f32,
    share2: f32,
    rate: f32,
    root2: f32,
    epsilon: f32,
}

impl Update {
    pub(super) fn constants(&self) -> Constants {
        let AdamW { betas: (beta1, beta2), epsilon, .. } = self.settings;
        let correction = |beta: f64| 1.0 - beta.powi(self.step as i32);
        let (keep, decay) =
            if self.decoupled { (1.0 - self.lr * self.weight_decay, 0.0) } else { (1.0, self.weight_decay) };
        Constants {
            keep: keep as f32,
            decay: decay as f32,
            scale: self.scale as f32,
            share1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            share2: (1.0 - beta2) as f32,
            rate: (-self.lr / correction(beta1)) as f32,
            root2: correction(beta2).sqrt() as f32,
            epsilon: epsilon as f32,
        }
    }

    /// Takes the step.
    ///
    /// # Panics
    /// If slices differ in length.
    pub fn apply(&self, slices: Slices<'_>, copy: Copy<'_>) {
        let constants = self.constants();
        let Slices { parameter, gradient, exp_avg, exp_avg_sq } = slices;
        let lengths = [gradient.len(), exp_avg.len(), exp_avg_sq.len()];
        assert_eq!(lengths, [parameter.len(); 3], "gradients and moments are as many as parameters");
        let blocks = parameter.par_chunks_mut(BLOCK).zip(gradient.par_chunks(BLOCK));
        let blocks = blocks.zip(exp_avg.par_chunks_mut(BLOCK)).zip(exp_avg_sq.par_chunks_mut(BLOCK));
        match copy {
            Copy::None => blocks.for_each(|block| constants.step(block, &mut [])),
            Copy::Bf16(copy) => {
                assert_eq!(copy.len(), lengths[0], "the copy is as long as the parameters");
                blocks.zip(copy.par_chunks_mut(BLOCK)).for_each(|(block, copy)| constants.step(block, copy));
            }
            Copy::F16(copy) => {
                assert_eq!(copy.len(), lengths[0], "the copy is as long as the parameters");
                blocks.zip(copy.par_chunks_mut(BLOCK)).for_each(|((((p, g), m), v), copy)| {
                    constants.step((((&mut *p, g), m), v), &mut []);
                    copy.convert_from_f32_slice(p);
                });
            }
        }
    }
}

impl Constants {
    /// One thread's share, compiled for the widest vector instructions that this machine has.
    pub(super) fn step(self, block: Block, copy: &mut [bf16]) {
        pulp::Arch::new().dispatch(Share { constants: self, block, copy });
    }
}

/// A parameter, its gradient and its two moments, nested as iterators zip them.
pub(super) type Block<'a> = (((&'a mut [f32], &'a [f32]), &'a mut [f32]), &'a mut [f32]);

/// A closure would not be compiled along with what calls it.
struct Share<'a> {
    constants: Constants,
    block: Block<'a>,
    /// Empty, or as long as the block.
    copy: &'a mut [bf16],
}

impl pulp::NullaryFnOnce for Share<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { constants: c, block: (((parameter, gradient), exp_avg), exp_avg_sq), copy } = self;
        let n = parameter.len();
        let (gradient, exp_avg, exp_avg_sq) = (&gradient[..n], &mut exp_avg[..n], &mut exp_avg_sq[..n]);
        for i in 0..n {
            let (mut p, mut g) = (parameter[i], gradient[i]);
            g *= c.scale;
            g = if c.decay == 0.0 { g } else { g + p * c.decay };
            p *= c.keep;
            let m = exp_avg[i] + (g - exp_avg[i]) * c.share1;
            let v = exp_avg_sq[i] * c.beta2 + g * c.share2 * g;
            let root = v.sqrt() / c.root2 + c.epsilon;
            parameter[i] = p + m * c.rate / root;
            exp_avg[i] = m;
            exp_avg_sq[i] = v;
        }
        copy.iter_mut().zip(&*parameter).for_each(|(half, &value)| *half = to_bf16(value));
    }
}

/// Rounds to the nearest, ties to even; NaN stays NaN.
#[inline(always)]
fn to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
}
