//! Products of weights with few rows of activations, usually one (GEMV), on weights as they are stored: every row of a
//! weight is read once. They use integer or float SIMD kernels where the machine has them for that format. After its
//! first call a thread allocates nothing.

#[cfg(target_arch = "x86_64")]
mod fixed_point;
mod float;
#[cfg(target_arch = "x86_64")]
mod int16;
#[cfg(target_arch = "x86_64")]
mod int8;

pub use crate::weight_rows::WeightRows;

#[cfg(target_arch = "x86_64")]
use crate::packed::Codec;
use crate::{
    instructions::vectorized,
    packed::{RowCodec, WithRowCodec},
    scratch::with_scratch,
    weight_rows::{CHUNK_VALUES, RawRows, RowFormat},
};
use float::FloatInput;
#[cfg(target_arch = "x86_64")]
use int8::Int8Input;
#[cfg(target_arch = "x86_64")]
use int16::Int16Input;
use rayon::prelude::*;

/// Products with fewer multiply-adds in total run on the calling thread.
const PARALLEL_MIN_FMAS: usize = 1 << 17;

/// One product `y = x·Wᵀ`.
#[derive(Debug)]
pub struct Gemv<'a> {
    /// The weight `W [out, in]`.
    pub weight: &'a WeightRows,
    /// The activations `[tokens, in]`.
    pub x: &'a [f32],
    /// The output `[tokens, out]`.
    pub y: &'a mut [f32],
}

impl Gemv<'_> {
    fn tokens(&self) -> usize {
        self.x.len() / self.weight.features.max(1)
    }
}

/// Computes several products at once, all of which are distributed over the threads together.
///
/// # Panics
/// If `x` or `y` does not have the size that the weight requires.
pub fn gemv_batch<const N: usize>(products: [Gemv<'_>; N]) {
    for Gemv { weight, x, y } in &products {
        let tokens = x.len() / weight.features.max(1);
        assert_eq!(
            [x.len(), y.len()],
            [tokens * weight.features, tokens * weight.out],
            "the activations or the output do not fit a weight {:?}",
            weight.shape()
        );
    }
    if products.iter().all(|product| product.tokens() <= 1) {
        return gemv_transposed(products);
    }
    let room = products.iter().map(|product| product.y.len()).sum();
    with_scratch(room, |room| {
        let mut rest = &mut *room;
        gemv_transposed(products.each_ref().map(|Gemv { weight, x, y }| {
            let (y, after) = std::mem::take(&mut rest).split_at_mut(y.len());
            rest = after;
            Gemv { weight, x, y }
        }));
        let mut from = 0;
        for product in products {
            let tokens = product.tokens();
            let Gemv { weight, y, .. } = product;
            for (row, columns) in room[from..from + y.len()].chunks_exact(tokens.max(1)).enumerate() {
                columns.iter().enumerate().for_each(|(token, &value)| y[token * weight.out + row] = value);
            }
            from += y.len();
        }
    });
}

/// A product whose activations were converted to the form that the kernel of its weight takes.
struct GemvTask<'a> {
    weight: &'a WeightRows,
    input: GemvInput<'a>,
    /// The output `[out, tokens]`.
    y: *mut f32,
    tokens: usize,
    /// Weight rows in a chunk, and the number of chunks.
    chunk_rows: usize,
    chunks: usize,
}

// SAFETY: every chunk writes rows of the output of its own, so no two threads access the same element.
unsafe impl Sync for GemvTask<'_> {}

/// Computes `W·xᵀ [out, tokens]` of every product into its `y`.
fn gemv_transposed<const N: usize>(products: [Gemv<'_>; N]) {
    let tasks = products.map(|product| {
        let tokens = product.tokens();
        let Gemv { weight, x, y } = product;
        let chunk_rows = (CHUNK_VALUES / weight.features.max(1)).max(1);
        let chunks = if y.is_empty() { 0 } else { weight.out.div_ceil(chunk_rows) };
        GemvTask { weight, input: GemvInput::prepare(weight, x), y: y.as_mut_ptr(), tokens, chunk_rows, chunks }
    });
    let compute_chunk = |mut index: usize| {
        for task in &tasks {
            if index < task.chunks {
                return task.compute_chunk(index);
            }
            index -= task.chunks;
        }
    };
    let chunks = tasks.iter().map(|task| task.chunks).sum::<usize>();
    let fmas = tasks.iter().map(|task| task.weight.out * task.weight.features * task.tokens).sum::<usize>();
    if fmas < PARALLEL_MIN_FMAS {
        (0..chunks).for_each(compute_chunk);
    } else {
        (0..chunks).into_par_iter().for_each(compute_chunk);
    }
}

impl GemvTask<'_> {
    /// Computes one chunk of weight rows.
    fn compute_chunk(&self, index: usize) {
        let first = index * self.chunk_rows;
        let rows = self.chunk_rows.min(self.weight.out - first);
        // SAFETY: `y` is `[out, tokens]`, borrowed mutably for the lifetime of the task; the chunk's rows lie within
        // it, and every chunk is computed once.
        let y = unsafe { std::slice::from_raw_parts_mut(self.y.add(first * self.tokens), rows * self.tokens) };
        let rows = self.weight.raw_rows(first);
        match &self.input {
            #[cfg(target_arch = "x86_64")]
            GemvInput::Int8(x) => x.multiply(rows, y),
            #[cfg(target_arch = "x86_64")]
            GemvInput::Int16(x) => x.multiply(rows, y),
            GemvInput::Float(x) => x.multiply(rows, y),
            GemvInput::Decode(x) => self.weight.format.dispatch(DecodeGemv { rows, x, y }),
        }
    }
}

/// Activations in the form that the kernel of a weight takes.
enum GemvInput<'a> {
    #[cfg(target_arch = "x86_64")]
    Int8(Int8Input),
    #[cfg(target_arch = "x86_64")]
    Int16(Int16Input),
    Float(FloatInput<'a>),
    Decode(&'a [f32]),
}

impl<'a> GemvInput<'a> {
    fn prepare(weight: &WeightRows, x: &'a [f32]) -> Self {
        match weight.format {
            _ if x.is_empty() || weight.out == 0 => Self::Decode(x),
            #[cfg(target_arch = "x86_64")]
            RowFormat::Packed(Codec::Blocks(block_type)) => {
                let int8 = Int8Input::new(block_type, x, weight.features).map(Self::Int8);
                let int16 = || Int16Input::new(block_type, x, weight.features).map(Self::Int16);
                int8.or_else(int16).unwrap_or(Self::Decode(x))
            }
            RowFormat::Packed(_) => Self::Decode(x),
            RowFormat::Floats(dtype) => {
                FloatInput::new(dtype, x, &weight.raw_rows(0)).map_or(Self::Decode(x), Self::Float)
            }
        }
    }
}

/// Computes the products of decoded weight rows with every row of `x`, until `y` is full.
struct DecodeGemv<'a> {
    rows: RawRows<'a>,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl WithRowCodec for DecodeGemv<'_> {
    type Output = ();

    fn with_row_codec<R: RowCodec>(self) {
        let Self { rows, x, y } = self;
        let tokens = x.len() / rows.features;
        vectorized(
            #[inline(always)]
            || {
                for (index, y) in y.iter_mut().enumerate() {
                    let (row, token) = (index / tokens, index % tokens);
                    *y = R::dot(rows.row(row), &x[token * rows.features..][..rows.features]);
                }
            },
        )
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
