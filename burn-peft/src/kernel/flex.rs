//! Products with packed weights on Flex's buffers: many rows of activations by tiles of decoded rows, few by a product of every
//! packed row with each of them.

use super::{
    LinearKernels,
    matrix::{Matrix, Output, Threads, product},
    scratch::{vectorized, with_scratch},
};
use crate::packed::{Codec, Packed, RowCodec, RowUser};
use burn::{
    backend::Flex,
    tensor::{DType, FloatDType, Shape, TensorData, ops::FloatTensorOps},
};
use burn_flex::FlexTensor;
use rayon::prelude::*;

const _: () = assert!(cfg!(target_endian = "little"), "words are read as the bytes that they were made of");

/// Up to this many rows of activations meet the packed rows directly.
const FEW: usize = 8;
/// Values of a tile: it stays in the second-level cache while it is multiplied.
const TILE: usize = 1 << 18;
/// Values that a thread decodes at a time.
const CHUNK: usize = 1 << 15;
/// Products with fewer values are not worth waking other threads.
const SERIAL: usize = 1 << 17;

impl LinearKernels for Flex {
    fn unpack(weight: &Packed<Self>) -> FlexTensor {
        let rows = Rows::new(weight);
        let mut values = vec![0.0; rows.out * rows.features];
        rows.decode(0, &mut values);
        tensor(values, [rows.out, rows.features])
    }

    fn packed_forward(x: FlexTensor, weight: &Packed<Self>) -> FlexTensor {
        in_f32(x, |x| forward(x, &Rows::new(weight)))
    }

    fn packed_backward_input(dy: FlexTensor, weight: &Packed<Self>) -> FlexTensor {
        in_f32(dy, |dy| backward_input(dy, &Rows::new(weight)))
    }
}

fn tensor(values: Vec<f32>, shape: [usize; 2]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, Shape::from(shape)))
}

/// Runs `work` on contiguous f32 and gives the result the type of `x`.
fn in_f32(x: FlexTensor, work: impl FnOnce(&FlexTensor) -> FlexTensor) -> FlexTensor {
    let dtype = x.dtype();
    if dtype == DType::F32 {
        return work(&x.to_contiguous());
    }
    let x = Flex::float_cast(x, FloatDType::F32);
    Flex::float_cast(work(&x.to_contiguous()), super::float_dtype(dtype))
}

/// The rows of a packed weight as bytes.
struct Rows {
    words: FlexTensor,
    codec: Codec,
    out: usize,
    features: usize,
    /// From one row to the next.
    stride: usize,
}

impl Rows {
    fn new(weight: &Packed<Flex>) -> Self {
        let words = weight.words().clone().into_primitive().to_contiguous();
        let ([out, features], [_, stride]) = (weight.shape(), weight.words().dims());
        Self { words, codec: weight.codec(), out, features, stride: stride * 4 }
    }

    /// The bytes from row `first` on.
    fn from(&self, first: usize) -> Bytes<'_> {
        let bytes = &self.words.bytes()[first * self.stride..];
        Bytes { bytes, stride: self.stride, length: self.codec.row_bytes(self.features), features: self.features }
    }

    /// Decodes rows from `first` until `out` is full.
    fn decode(&self, first: usize, out: &mut [f32]) {
        let step = (CHUNK / self.features).max(1);
        out.par_chunks_mut(step * self.features).enumerate().for_each(|(chunk, out)| {
            self.codec.rows(Decode { rows: self.from(first + chunk * step), out });
        });
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
struct Bytes<'a> {
    bytes: &'a [u8],
    /// From one row to the next.
    stride: usize,
    /// Of a row.
    length: usize,
    features: usize,
}

impl<'a> Bytes<'a> {
    #[inline(always)]
    fn row(&self, index: usize) -> &'a [u8] {
        &self.bytes[index * self.stride..][..self.length]
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

/// The products of rows with every row of `x`, until `y` is full.
struct Multiply<'a> {
    rows: Bytes<'a>,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl RowUser for Multiply<'_> {
    type Output = ();

    fn with<R: RowCodec>(self) {
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

fn forward(x: &FlexTensor, rows: &Rows) -> FlexTensor {
    let [tokens, features] = x.layout().shape().dims();
    let values = x.storage::<f32>();
    let mut y = vec![0.0; tokens * rows.out];
    if tokens > FEW {
        let x = Matrix::new(values, [tokens, features]);
        rows.tiles(|first, tile, _| {
            let to = Output { values: &mut y[first..], stride: rows.out, add: false };
            product(to, x, tile.transposed(), 1.0, Threads::All);
        });
    } else if tokens == 1 {
        few(&mut y, values, rows);
    } else if tokens > 1 {
        let mut across = vec![0.0; y.len()];
        few(&mut across, values, rows);
        for (row, across) in across.chunks_exact(tokens).enumerate() {
            across.iter().enumerate().for_each(|(token, &value)| y[token * rows.out + row] = value);
        }
    }
    tensor(y, [tokens, rows.out])
}

/// `W·xᵀ [out, tokens]`, straight from the packed rows.
fn few(y: &mut [f32], x: &[f32], rows: &Rows) {
    let (tokens, step) = (x.len() / rows.features, (CHUNK / rows.features).max(1));
    let work = |(chunk, y)| rows.codec.rows(Multiply { rows: rows.from(chunk * step), x, y });
    if rows.out * x.len() < SERIAL {
        y.chunks_mut(step * tokens).enumerate().for_each(work);
    } else {
        y.par_chunks_mut(step * tokens).enumerate().for_each(work);
    }
}

fn backward_input(dy: &FlexTensor, rows: &Rows) -> FlexTensor {
    let [tokens, out] = dy.layout().shape().dims();
    assert_eq!(out, rows.out, "the gradient of {out} outputs meets a weight of {}", rows.out);
    let values = dy.storage::<f32>();
    let mut dx = vec![0.0; tokens * rows.features];
    if tokens > 0 {
        rows.tiles(|first, tile, count| {
            let to = Output { values: &mut dx, stride: rows.features, add: first > 0 };
            product(to, Matrix::strided(&values[first..], [tokens, count], out), tile, 1.0, Threads::All);
        });
    }
    tensor(dx, [tokens, rows.features])
}
