//! Products with rows of any storage: many rows of activations by tiles of decoded rows, [few] by a product of every stored row
//! with each of them. Rows of f32, and of bf16 where products read them, are multiplied where they lie.

use super::{
    dense,
    few::{self, Product},
    float, floats, own_values, tensor,
};
use crate::{
    kernel::{
        Compute, Stored, added,
        matrix::{self, Matrix, Output, Threads, product_in},
        scratch::{unwritten, vectorized, with_scratch},
    },
    packed::{Codec, Packed, RowCodec, RowUser},
};
use burn::{backend::Flex, tensor::DType};
use burn_flex::FlexTensor;
use rayon::prelude::*;

const _: () = assert!(cfg!(target_endian = "little"), "words are read as the bytes that they were made of");

/// Up to this many rows of activations meet the packed rows directly.
const FEW: usize = 8;
/// Values of a tile: it stays in the second-level cache while it is multiplied.
const TILE: usize = 1 << 18;
/// Values that a thread decodes at a time.
pub(super) const CHUNK: usize = 1 << 15;
/// Bytes that lie between what is read and what is asked of memory: what it takes to answer.
const AHEAD: usize = 1 << 12;
/// What a row is made of.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Floats(DType),
    Packed(Codec),
}

impl Kind {
    fn row_bytes(self, features: usize) -> usize {
        match self {
            Self::Floats(dtype) => features * dtype.size(),
            Self::Packed(codec) => codec.row_bytes(features),
        }
    }

    pub(super) fn rows<U: RowUser>(self, user: U) -> U::Output {
        match self {
            Self::Floats(dtype) => floats::rows(dtype, user),
            Self::Packed(codec) => codec.rows(user),
        }
    }
}

/// The rows of a weight as they are stored.
#[derive(Debug)]
pub struct Rows {
    stored: FlexTensor,
    pub(super) kind: Kind,
    pub(super) out: usize,
    pub(super) features: usize,
    /// From one row to the next.
    stride: usize,
}

impl Rows {
    /// Those of a weight.
    pub fn of(weight: Stored<Flex>) -> Self {
        match weight {
            Stored::Dense(weight) => Self::floats(weight),
            Stored::Packed(weight) => Self::packed(&weight),
        }
    }

    /// Their number, and the features of each.
    pub fn shape(&self) -> [usize; 2] {
        [self.out, self.features]
    }

    /// The values of rows from `first` on, until `out` is full.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn decode(&self, first: usize, out: &mut [f32]) {
        let step = (CHUNK / self.features).max(1);
        out.par_chunks_mut(step * self.features).enumerate().for_each(|(chunk, out)| {
            self.kind.rows(Decode { rows: self.from(first + chunk * step), out });
        });
    }

    /// Those of a weight of floats; f64 is narrowed.
    pub(super) fn floats(weight: FlexTensor) -> Self {
        let weight = if weight.dtype() == DType::F64 { float(weight) } else { weight };
        let (stored, kind) = (weight.to_contiguous(), Kind::Floats(weight.dtype()));
        let [out, features] = stored.layout().shape().dims();
        Self { stored, kind, out, features, stride: kind.row_bytes(features) }
    }

    /// Those of a packed weight.
    pub(super) fn packed(weight: &Packed<Flex>) -> Self {
        let stored = weight.words().clone().into_primitive().to_contiguous();
        let ([out, features], [_, words]) = (weight.shape(), weight.words().dims());
        Self { stored, kind: Kind::Packed(weight.codec()), out, features, stride: words * 4 }
    }

    /// All values, `[out, in]`.
    pub(super) fn unpack(&self) -> FlexTensor {
        let mut values = unwritten(self.out * self.features);
        self.decode(0, &mut values);
        tensor(values, [self.out, self.features])
    }

    /// The matrix, if products read the rows as they are.
    fn matrix(&self) -> Option<Matrix<'_>> {
        match self.kind {
            Kind::Floats(DType::F32) => Some(dense::matrix(&self.stored)),
            Kind::Floats(DType::BF16) if matrix::widens() => {
                Some(Matrix::of_bf16(self.stored.storage(), [self.out, self.features]))
            }
            _ => None,
        }
    }

    /// The bytes from row `first` on.
    pub(super) fn from(&self, first: usize) -> Bytes<'_> {
        let bytes = &self.stored.bytes()[first * self.stride..];
        Bytes { bytes, stride: self.stride, length: self.kind.row_bytes(self.features), features: self.features }
    }

    /// Calls `work` with the first row and the values of one tile after the other.
    fn tiles(&self, mut work: impl FnMut(usize, Matrix<'_>, usize)) {
        let step = (TILE / self.features).max(1).min(self.out);
        with_scratch(step * self.features, |tile| {
            for first in (0..self.out).step_by(step) {
                let rows = step.min(self.out - first);
                let tile = &mut tile[..rows * self.features];
                self.decode(first, tile);
                work(first, Matrix::new(tile, [rows, self.features]), rows);
            }
        });
    }
}

/// Bytes of some rows one after the other.
#[derive(Clone, Copy)]
pub(super) struct Bytes<'a> {
    bytes: &'a [u8],
    /// From one row to the next.
    stride: usize,
    /// Of a row.
    length: usize,
    pub(super) features: usize,
}

impl<'a> Bytes<'a> {
    /// One row, read after those before it.
    #[inline(always)]
    pub(super) fn row(&self, index: usize) -> &'a [u8] {
        let row = self.row_alone(index);
        (0..self.length).step_by(64).for_each(|line| ask(row.as_ptr().wrapping_add(AHEAD + line)));
        row
    }

    /// One row, of which the reader asks for what comes.
    #[inline(always)]
    pub(super) fn row_alone(&self, index: usize) -> &'a [u8] {
        &self.bytes[index * self.stride..][..self.length]
    }
}

/// Asks for the line of memory there.
#[inline(always)]
pub(super) fn ask(_line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: nothing is read, and every x86-64 has the instruction.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(_line.cast());
    }
}

/// Decodes rows until `out` is full.
struct Decode<'a> {
    rows: Bytes<'a>,
    out: &'a mut [f32],
}

impl RowUser for Decode<'_> {
    type Output = ();

    fn with<R: RowCodec>(self) {
        let Self { rows, out } = self;
        vectorized(
            #[inline(always)]
            || {
                for index in 0..out.len() / rows.features {
                    R::decode(rows.row(index), &mut out[index * rows.features..][..rows.features]);
                }
            },
        )
    }
}

/// `x·Wᵀ [tokens, out]`.
pub(super) fn forward(x: &FlexTensor, rows: &Rows, compute: Compute) -> FlexTensor {
    let [tokens, features] = x.layout().shape().dims();
    assert_eq!(features, rows.features, "{features} features meet a weight of {}", rows.features);
    let mut y = unwritten(tokens * rows.out);
    if tokens <= FEW {
        let x = x.to_contiguous();
        few::products([Product { weight: rows, x: x.storage(), y: &mut y }]);
    } else if let Some(weight) = rows.matrix() {
        let to = Output { values: &mut y, stride: rows.out, add: false };
        dense::with_matrix(x, |x| product_in(compute, to, x, weight.transposed(), 1.0, Threads::All));
    } else {
        dense::with_matrix(x, |x| {
            rows.tiles(|first, tile, _| {
                let to = Output { values: &mut y[first..], stride: rows.out, add: false };
                product_in(compute, to, x, tile.transposed(), 1.0, Threads::All);
            });
        });
    }
    tensor(y, [tokens, rows.out])
}

/// `dy·W [tokens, in]`, added to what was `found`.
pub(super) fn backward_input(dy: &FlexTensor, rows: &Rows, found: Option<FlexTensor>, compute: Compute) -> FlexTensor {
    let ([tokens, out], features) = (dy.layout().shape().dims(), rows.features);
    assert_eq!(out, rows.out, "the gradient of {out} outputs meets a weight of {}", rows.out);
    let product = |values: &mut [f32], add: bool| {
        if let Some(weight) = rows.matrix() {
            let to = Output { values, stride: features, add };
            return dense::with_matrix(dy, |dy| product_in(compute, to, dy, weight, 1.0, Threads::All));
        }
        let dy = dy.to_contiguous();
        if tokens > 0 {
            rows.tiles(|first, tile, count| {
                let to = Output { values: &mut *values, stride: features, add: add || first > 0 };
                let part = Matrix::strided(&dy.storage::<f32>()[first..], [tokens, count], out);
                product_in(compute, to, part, tile, 1.0, Threads::All);
            });
        }
    };
    let mut found = found;
    if let Some(values) = found.as_mut().and_then(own_values) {
        product(values, true);
    } else {
        let mut values = unwritten(tokens * features);
        product(&mut values, false);
        let dx = tensor(values, [tokens, features]);
        found = Some(added::<Flex>(dx, found));
    }
    found.expect("it was found or made")
}
