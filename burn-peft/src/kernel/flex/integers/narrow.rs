//! The same by 256-bit vectors: the integers of weights and of activations meet as 16-bit words, blocks of 32 one after the other.
//!
//! Blocks are reached by pointers: bounds of every one would cost as much as its product.

mod formats;

use super::{
    Bytes,
    fixed::{FLOOR, LARGEST},
};
use crate::{kernel::instructions::is_narrow, packed::BlockType};
use formats::{Nibbles, Q4K, Q6K, Q8};
use std::{arch::x86_64::*, cell::RefCell};

/// Activations that share a scale.
const BLOCK: usize = 32;

/// Products of some packed rows with rows of activations.
type Product = unsafe fn(&Narrow, Bytes<'_>, &mut [f32]);

/// Activations of a block as integers.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
struct Block([i16; BLOCK]);

/// Blocks of activations one after the other.
#[derive(Debug, Default)]
struct Blocks {
    integers: Vec<Block>,
    /// What an integer of a block stands for, and the sum of what all of them do. NaN if an activation of it is not finite.
    scales: Vec<[f32; 2]>,
}

thread_local! {
    /// Memory that the thread had blocks in.
    static BLOCKS: RefCell<Vec<Blocks>> = const { RefCell::new(Vec::new()) };
}

/// Rows of activations, and what multiplies them with packed rows.
pub(in super::super) struct Narrow {
    blocks: Blocks,
    /// Blocks of a row.
    per_row: usize,
    product: Product,
}

impl Drop for Narrow {
    fn drop(&mut self) {
        let blocks = std::mem::take(&mut self.blocks);
        BLOCKS.with_borrow_mut(|all| all.push(blocks));
    }
}

impl Narrow {
    /// Rows of `features` activations for weights of that format; `None` where floats serve.
    pub(in super::super) fn new(kind: BlockType, x: &[f32], features: usize) -> Option<Self> {
        let product: Product = match kind {
            BlockType::Q4_0 => product::<Nibbles<false, false>>,
            BlockType::Q4_1 => product::<Nibbles<true, false>>,
            BlockType::Q5_0 => product::<Nibbles<false, true>>,
            BlockType::Q5_1 => product::<Nibbles<true, true>>,
            BlockType::Q8_0 => product::<Q8>,
            BlockType::Q4_K => product::<Q4K>,
            BlockType::Q6_K => product::<Q6K>,
            BlockType::F32 | BlockType::F16 | BlockType::BF16 => return None,
        };
        is_narrow().then(|| {
            let mut blocks = BLOCKS.with_borrow_mut(Vec::pop).unwrap_or_default();
            blocks.integers.clear();
            blocks.scales.clear();
            for x in x.as_chunks::<BLOCK>().0 {
                // SAFETY: it is available.
                let (integers, scales) = unsafe { fixed(x) };
                blocks.integers.push(integers);
                blocks.scales.push(scales);
            }
            Self { blocks, per_row: features / BLOCK, product }
        })
    }

    /// The products of rows with every row of activations, until `y` is full.
    pub(in super::super) fn multiply(&self, rows: Bytes<'_>, y: &mut [f32]) {
        // SAFETY: there is no `Narrow` where it is not available.
        unsafe { (self.product)(self, rows, y) }
    }
}

/// A block of activations in 16-bit fixed point, and its two scales.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn fixed(x: &[f32; BLOCK]) -> (Block, [f32; 2]) {
    // SAFETY: four times eight values, and as many words in a block.
    unsafe {
        // As integers, the magnitudes of floats are in order, infinity and NaN above all others.
        let magnitude = |part: usize| {
            let bits = _mm256_loadu_si256(x.as_ptr().add(8 * part).cast());
            _mm256_and_si256(bits, _mm256_set1_epi32(i32::MAX))
        };
        let most = _mm256_max_epu32(
            _mm256_max_epu32(magnitude(0), magnitude(1)),
            _mm256_max_epu32(magnitude(2), magnitude(3)),
        );
        let lanes: [u32; 8] = std::mem::transmute(most);
        let largest = f32::from_bits(lanes.into_iter().fold(0, u32::max));
        let scale = if largest.is_finite() { largest.max(FLOOR) / LARGEST } else { f32::NAN };
        let inverse = _mm256_set1_ps(1.0 / scale);
        let mut block = Block([0; BLOCK]);
        let mut sums = _mm256_setzero_si256();
        for half in 0..2 {
            let integers = |part: usize| {
                let values = _mm256_loadu_ps(x.as_ptr().add(16 * half + 8 * part));
                _mm256_cvtps_epi32(_mm256_mul_ps(values, inverse))
            };
            let (first, second) = (integers(0), integers(1));
            // Halves of 128 bits are packed each by itself.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(first, second));
            _mm256_store_si256(block.0.as_mut_ptr().add(16 * half).cast(), words);
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
        }
        let lanes: [i32; 8] = std::mem::transmute(sums);
        (block, [scale, scale * lanes.into_iter().sum::<i32>() as f32])
    }
}

/// Where the activations of a part of a row are.
#[derive(Clone, Copy)]
struct Part {
    integers: *const Block,
    scales: *const [f32; 2],
}

/// What a row's products are summed in.
struct Sums {
    dots: [__m256; SUMS],
    /// Of what weights share in a block.
    minima: __m128,
}

/// Independent sums.
const SUMS: usize = 4;

/// How rows are packed.
trait Format {
    /// Blocks of activations that meet a part of a row.
    const BLOCKS: usize;
    /// The bytes of that part.
    const BYTES: usize;

    /// Adds the products of a part of a row with its activations; of small parts in the sum of that index.
    ///
    /// # Safety
    /// It is [`is_narrow`], and as many bytes and blocks are there.
    unsafe fn add(sums: &mut Sums, index: usize, bytes: *const u8, x: Part);
}

/// # Safety
/// It is [`is_narrow`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn product<F: Format>(x: &Narrow, rows: Bytes<'_>, y: &mut [f32]) {
    let Narrow { blocks: Blocks { integers, scales }, per_row, .. } = x;
    let (tokens, parts) = (integers.len() / per_row, per_row / F::BLOCKS);
    for index in 0..y.len() {
        let (row, token) = (rows.row(index / tokens), index % tokens);
        assert!(row.len() == parts * F::BYTES && (token + 1) * per_row <= scales.len().min(integers.len()));
        // SAFETY: that many are there.
        y[index] = unsafe {
            let x =
                Part { integers: integers.as_ptr().add(token * per_row), scales: scales.as_ptr().add(token * per_row) };
            dot::<F>(parts, row.as_ptr(), x)
        };
    }
}

/// The product of a row of so many parts with a row of activations.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot<F: Format>(parts: usize, mut row: *const u8, mut x: Part) -> f32 {
    let mut sums = Sums { dots: [_mm256_setzero_ps(); SUMS], minima: _mm_setzero_ps() };
    let mut left = parts;
    // SAFETY: by the caller.
    unsafe {
        while left >= SUMS {
            for index in 0..SUMS {
                F::add(&mut sums, index, row, x);
                (row, x) = next::<F>(row, x);
            }
            left -= SUMS;
        }
        for _ in 0..left {
            F::add(&mut sums, 0, row, x);
            (row, x) = next::<F>(row, x);
        }
    }
    let [a, b, c, d] = sums.dots;
    let sum = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
    let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
    let sum = _mm_add_ps(sum, sums.minima);
    let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)))
}

/// What comes after a part.
#[inline(always)]
fn next<F: Format>(row: *const u8, x: Part) -> (*const u8, Part) {
    let after = Part { integers: x.integers.wrapping_add(F::BLOCKS), scales: x.scales.wrapping_add(F::BLOCKS) };
    (row.wrapping_add(F::BYTES), after)
}
