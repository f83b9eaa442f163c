//! The products with a packed weight as tensor operations: shifts and masks of integers, a tile of rows at a time.

use super::{BlockType, Codec, Packed, nf4};
use crate::kernel::{self, Compute, LinearKernels};
use burn::tensor::{
    DType, ElementConversion, Int, Tensor, TensorData, TensorMetadata, backend::Backend, ops::FloatTensor, s,
};

/// Values of a weight that are decoded at a time.
const TILE: usize = 1 << 24;

type Bytes<B> = Tensor<B, 3, Int>;
type Values<B> = Tensor<B, 3>;

/// The rows in tiles: the first row of each, and its values in the given type.
fn tiles<B: LinearKernels>(weight: &Packed<B>, dtype: DType) -> impl Iterator<Item = (usize, Tensor<B, 2>)> {
    let [out, features] = weight.shape();
    let step = (TILE / features.max(1)).max(1);
    (0..out).step_by(step).map(move |from| (from, weight.slice(from..out.min(from + step)).values().cast(dtype)))
}

/// `x·Wᵀ`.
pub(crate) fn forward<B: LinearKernels>(x: FloatTensor<B>, weight: &Packed<B>, compute: Compute) -> FloatTensor<B> {
    let dtype = x.dtype();
    let x = kernel::tensor::<B, 2>(x);
    let parts = tiles(weight, dtype).map(|(_, tile)| times(x.clone(), tile.transpose(), compute)).collect();
    Tensor::cat(parts, 1).into_primitive().tensor()
}

/// `dy·W`.
pub(crate) fn backward_input<B: LinearKernels>(
    dy: FloatTensor<B>,
    weight: &Packed<B>,
    compute: Compute,
) -> FloatTensor<B> {
    let dtype = dy.dtype();
    let dy = kernel::tensor::<B, 2>(dy);
    let parts = tiles(weight, dtype).map(|(from, tile)| {
        let rows = tile.dims()[0];
        times(dy.clone().slice(s![.., from..from + rows]), tile, compute)
    });
    let sum = parts.reduce(|sum, part| sum + part).expect("a weight has rows");
    sum.into_primitive().tensor()
}

fn times<B: LinearKernels>(a: Tensor<B, 2>, b: Tensor<B, 2>, compute: Compute) -> Tensor<B, 2> {
    kernel::tensor(kernel::product::<B>(a.into_primitive().tensor(), b.into_primitive().tensor(), compute))
}

/// The values `[out, in]` in f32.
pub(crate) fn unpack<B: Backend>(weight: &Packed<B>) -> FloatTensor<B> {
    let [out, features] = weight.shape();
    let [_, words] = weight.words().dims();
    let part = |i: i64| and(shift(weight.words().clone(), 8 * i), 255).unsqueeze_dim::<3>(2);
    let bytes = Tensor::cat((0..4).map(part).collect(), 2).reshape([out, 4 * words]);
    let values = match weight.codec() {
        Codec::Blocks(kind) => {
            let (blocks, size) = (features / kind.block_len(), kind.block_bytes());
            blockwise(kind, bytes.slice(s![.., 0..blocks * size]).reshape([out, blocks, size]))
        }
        Codec::Nf4 => nf4_rows(bytes, features),
    };
    values.reshape([out, features]).into_primitive().tensor()
}

fn shift<B: Backend, const D: usize>(x: Tensor<B, D, Int>, by: i64) -> Tensor<B, D, Int> {
    if by == 0 { x } else { x.bitwise_right_shift_scalar(by.elem()) }
}

fn and<B: Backend, const D: usize>(x: Tensor<B, D, Int>, mask: i64) -> Tensor<B, D, Int> {
    x.bitwise_and_scalar(mask.elem())
}

fn float<B: Backend, const D: usize>(x: Tensor<B, D, Int>) -> Tensor<B, D> {
    x.float().cast(DType::F32)
}

fn bytes<B: Backend>(block: &Bytes<B>, from: usize, to: usize) -> Bytes<B> {
    block.clone().slice(s![.., .., from..to])
}

/// The entry of a table for every index.
fn look_up<B: Backend, const D: usize>(table: Vec<f32>, index: Tensor<B, D, Int>) -> Tensor<B, D> {
    let (shape, n) = (index.shape(), table.len());
    let table = Tensor::<B, 1>::from_data(TensorData::new(table, [n]), (&index.device(), DType::F32));
    let count = shape.num_elements();
    table.select(0, index.reshape([count])).reshape(shape)
}

/// The halves at byte `at` of every block, widened: `[rows, blocks, 1]`.
fn half<B: Backend>(block: &Bytes<B>, at: usize) -> Values<B> {
    let (low, high) = (bytes(block, at, at + 1), bytes(block, at + 1, at + 2));
    let exponent = and(shift(high.clone(), 2), 31);
    let mantissa = float(low + and(high.clone(), 3) * 256);
    let normal = float(exponent.clone().clamp(0, 1)) * 1024.0;
    let powers = (0..32).map(|e: i32| 2f32.powi(e.max(1) - 25)).collect();
    (mantissa + normal) * look_up(powers, exponent) * signs(high)
}

/// -1 where the highest bit of a byte is set, else 1.
fn signs<B: Backend, const D: usize>(byte: Tensor<B, D, Int>) -> Tensor<B, D> {
    float(shift(byte, 7)) * -2.0 + 1.0
}

/// Bytes as signed integers.
fn signed<B: Backend>(bytes: Bytes<B>) -> Values<B> {
    float(bytes.clone() - shift(bytes, 7) * 256)
}

/// Low halves, then high halves.
fn nibbles<B: Backend>(bytes: Bytes<B>) -> Bytes<B> {
    Tensor::cat(vec![and(bytes.clone(), 15), shift(bytes, 4)], 2)
}

/// `[rows, blocks, bytes]` → `[rows, blocks, elements]`.
fn blockwise<B: Backend>(kind: BlockType, block: Bytes<B>) -> Values<B> {
    match kind {
        BlockType::Q8_0 => half(&block, 0) * signed(bytes(&block, 2, 34)),
        BlockType::Q4_0 => half(&block, 0) * (float(nibbles(bytes(&block, 2, 18))) - 8.0),
        BlockType::Q4_1 => half(&block, 0) * float(nibbles(bytes(&block, 4, 20))) + half(&block, 2),
        BlockType::Q5_0 => {
            let quants = nibbles(bytes(&block, 6, 22)) + fifth(bytes(&block, 2, 6)) * 16;
            half(&block, 0) * (float(quants) - 16.0)
        }
        BlockType::Q5_1 => {
            let quants = nibbles(bytes(&block, 8, 24)) + fifth(bytes(&block, 4, 8)) * 16;
            half(&block, 0) * float(quants) + half(&block, 2)
        }
        BlockType::Q4_K => q4_k(&block),
        BlockType::Q6_K => q6_k(&block),
        BlockType::F16 => half(&block, 0),
        other => panic!("{other:?} is no packed format"),
    }
}

/// The bits of four bytes, lowest first.
fn fifth<B: Backend>(bytes: Bytes<B>) -> Bytes<B> {
    let [rows, blocks, _] = bytes.dims();
    let bit = |i: i64| and(shift(bytes.clone(), i), 1).unsqueeze_dim::<4>(3);
    Tensor::cat((0..8).map(bit).collect(), 3).reshape([rows, blocks, 32])
}

fn q4_k<B: Backend>(block: &Bytes<B>) -> Values<B> {
    let [rows, blocks, _] = block.dims();
    let [first, second, halves] = [4, 8, 12].map(|at| bytes(block, at, at + 4));
    let six = |low: Bytes<B>, rest: Bytes<B>| Tensor::cat(vec![and(low.clone(), 63), rest + shift(low, 6) * 16], 2);
    let scales = half(block, 0) * float(six(first, and(halves.clone(), 15)));
    let minima = half(block, 2) * float(six(second, shift(halves, 4)));
    // 32 bytes serve two groups.
    let quants = nibbles(bytes(block, 16, 144).reshape([rows * blocks, 4, 32])).reshape([rows * blocks, 8, 32]);
    let group = |x: Values<B>| x.reshape([rows * blocks, 8, 1]);
    (group(scales) * float(quants) - group(minima)).reshape([rows, blocks, 256])
}

fn q6_k<B: Backend>(block: &Bytes<B>) -> Values<B> {
    let [rows, blocks, _] = block.dims();
    let low = nibbles(bytes(block, 0, 128).reshape([rows * blocks, 2, 64]));
    let high = bytes(block, 128, 192).reshape([rows * blocks, 2, 32]);
    let high = Tensor::cat((0..4).map(|quarter| and(shift(high.clone(), 2 * quarter), 3)).collect(), 2);
    let quants = (float(low + high * 16) - 32.0).reshape([rows * blocks, 16, 16]);
    let scales = half(block, 208) * signed(bytes(block, 192, 208));
    (scales.reshape([rows * blocks, 16, 1]) * quants).reshape([rows, blocks, 256])
}

/// Rows `[rows, bytes]` → `[rows, blocks, elements]`.
fn nf4_rows<B: Backend>(rows: Tensor<B, 2, Int>, features: usize) -> Values<B> {
    let (n, blocks) = (rows.dims()[0], features / nf4::BLOCK);
    let (size, count) = (1 + nf4::BLOCK / 2, nf4::groups(blocks));
    let block = rows.clone().slice(s![.., 0..blocks * size]).reshape([n, blocks, size]);
    let tail = rows.slice(s![.., blocks * size..blocks * size + 8 + 4 * count]).reshape([n, 2 + count, 4]);
    let byte = |i: usize| bytes(&tail, i, i + 1);
    let counts = (byte(0) + byte(1) * 256).slice(s![.., 0..1, ..]).reshape([n, 1]);
    let floats = float32(&tail).reshape([n, 2 + count]);
    let mean = floats.clone().slice(s![.., 1..2]);
    let index = Tensor::<B, 1, Int>::arange(0..blocks as i64, &tail.device()).reshape([1, blocks]);
    // What a row's later blocks belong to is counted from the end of its first group.
    let group = shift(index - counts + 256, 8) + 2;
    let scales = look_up(nf4::MAP.to_vec(), bytes(&block, 0, 1).reshape([n, blocks])) * floats.gather(1, group) + mean;
    look_up(nf4::VALUES.to_vec(), nibbles(bytes(&block, 1, size))) * scales.unsqueeze_dim::<3>(2)
}

/// Four bytes each as the f32 that they are (normal numbers and zero).
fn float32<B: Backend>(word: &Bytes<B>) -> Values<B> {
    let byte = |i: usize| bytes(word, i, i + 1);
    let exponent = and(byte(3), 127) * 2 + shift(byte(2), 7);
    let mantissa = float(and(byte(2), 127) * 65536 + byte(1) * 256 + byte(0)) + (1 << 23) as f32;
    let powers = (0..256).map(|e: i32| if e == 0 { 0.0 } else { 2f64.powi(e - 150) as f32 }).collect();
    mantissa * look_up(powers, exponent) * signs(byte(3))
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::random;
    use burn::backend::Flex;

    /// Random bytes whose halves are neither infinite nor NaN.
    fn packed(kind: BlockType, [out, features]: [usize; 2]) -> Packed<Flex> {
        let halves: &[usize] = match kind {
            BlockType::Q6_K => &[208],
            BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4_K => &[0, 2],
            _ => &[0],
        };
        let size = Codec::from(kind).row_bytes(features);
        let mut bytes: Vec<u8> = (0..(out * size) as u64).map(|i| random::bits(7, i) as u8).collect();
        for block in bytes.chunks_exact_mut(kind.block_bytes()) {
            halves.iter().for_each(|at| block[at + 1] &= 0xbb);
        }
        Packed::new(kind.into(), features, bytes.chunks_exact(size), &Default::default())
    }

    #[test]
    fn tensor_operations_decode_bit_for_bit_as_the_codecs() {
        let values: Vec<f32> = (0..24 * 576).map(|i| random::normal(3, i) as f32 * 0.02).collect();
        let mut all = vec![Packed::<Flex>::nf4(&values, 576, &Default::default()).unwrap()];
        for kind in BlockType::ALL.into_iter().filter(|kind| kind.block_len() > 1) {
            all.push(packed(kind, [9, 768]));
        }
        for weight in all {
            let [out, features] = weight.shape();
            let bits = |x: FloatTensor<Flex>| {
                let values = kernel::tensor::<Flex, 2>(x).into_data().into_vec::<f32>().unwrap();
                // Zero has two signs.
                values.into_iter().map(|x| (x + 0.0).to_bits()).collect::<Vec<_>>()
            };
            assert_eq!(bits(unpack(&weight)), bits(Flex::unpack(&weight)), "{}", weight.codec());
            let numbers = |n: usize| -> Vec<f32> { (0..n as u64).map(|i| random::normal(5, i) as f32).collect() };
            // Too many rows to be rounded to integers.
            let tensor = |columns: usize| {
                let data = TensorData::new(numbers(9 * columns), [9, columns]);
                Tensor::<Flex, 2>::from_data(data, &Default::default()).into_primitive().tensor()
            };
            let pairs = [
                (
                    forward(tensor(features), &weight, Compute::F32),
                    Flex::packed_forward(tensor(features), &weight, Compute::F32),
                ),
                (
                    backward_input(tensor(out), &weight, Compute::F32),
                    Flex::packed_backward_input(tensor(out), &weight, None, Compute::F32),
                ),
            ];
            for (found, expected) in pairs {
                let [found, expected] = [found, expected].map(kernel::tensor::<Flex, 2>);
                let size = expected.clone().abs().max().into_scalar();
                let difference = (found - expected).abs().max().into_scalar();
                assert!(difference <= 1e-5 * size, "{}: {difference} of {size}", weight.codec());
            }
        }
    }
}
