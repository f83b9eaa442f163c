//! Portable products with a packed weight, made of tensor operations: integer shifts and masks decode one tile of rows
//! at a time.

use super::{LinearKernels, portable, tensor};
use crate::{
    MatmulPrecision,
    packed::{BlockType, Codec, PackedWeight, nf4},
};
use burn::tensor::{
    DType, ElementConversion, Int, Tensor, TensorData, TensorMetadata, backend::Backend, ops::FloatTensor, s,
};

/// Values of a weight that are decoded at a time.
const TILE_VALUES: usize = 1 << 24;

/// Bytes of blocks, `[rows, blocks, bytes]`.
type BlockBytes<B> = Tensor<B, 3, Int>;
/// Values of blocks, `[rows, blocks, elements]`.
type BlockValues<B> = Tensor<B, 3>;

/// Decodes the rows tile by tile: yields the first row of each tile and its values in the given type.
fn decoded_tiles<B: LinearKernels>(
    weight: &PackedWeight<B>,
    dtype: DType,
) -> impl Iterator<Item = (usize, Tensor<B, 2>)> {
    let [out, features] = weight.shape();
    let step = (TILE_VALUES / features.max(1)).max(1);
    (0..out).step_by(step).map(move |from| (from, weight.slice(from..out.min(from + step)).values().cast(dtype)))
}

/// Returns `x·Wᵀ`.
pub(crate) fn forward<B: LinearKernels>(
    x: FloatTensor<B>,
    weight: &PackedWeight<B>,
    precision: MatmulPrecision,
) -> FloatTensor<B> {
    let dtype = x.dtype();
    let x = tensor::<B, 2>(x);
    let parts = decoded_tiles(weight, dtype).map(|(_, tile)| matmul(x.clone(), tile.transpose(), precision)).collect();
    Tensor::cat(parts, 1).into_primitive().tensor()
}

/// Returns `dy·W`.
pub(crate) fn backward_input<B: LinearKernels>(
    dy: FloatTensor<B>,
    weight: &PackedWeight<B>,
    precision: MatmulPrecision,
) -> FloatTensor<B> {
    let dtype = dy.dtype();
    let dy = tensor::<B, 2>(dy);
    let parts = decoded_tiles(weight, dtype).map(|(from, tile)| {
        let rows = tile.dims()[0];
        matmul(dy.clone().slice(s![.., from..from + rows]), tile, precision)
    });
    let sum = parts.reduce(|sum, part| sum + part).expect("a weight has at least one row");
    sum.into_primitive().tensor()
}

fn matmul<B: LinearKernels>(a: Tensor<B, 2>, b: Tensor<B, 2>, precision: MatmulPrecision) -> Tensor<B, 2> {
    tensor(portable::matmul::<B>(a.into_primitive().tensor(), b.into_primitive().tensor(), precision))
}

/// Decodes a packed weight to f32 `[out, in]`.
pub(crate) fn unpack<B: Backend>(weight: &PackedWeight<B>) -> FloatTensor<B> {
    let [out, features] = weight.shape();
    let [_, words] = weight.words().dims();
    let part = |i: i64| bit_and(shift_right(weight.words().clone(), 8 * i), 255).unsqueeze_dim::<3>(2);
    let bytes = Tensor::cat((0..4).map(part).collect(), 2).reshape([out, 4 * words]);
    let values = match weight.codec() {
        Codec::Blocks(kind) => {
            let (blocks, size) = (features / kind.block_len(), kind.block_bytes());
            dequantize_blocks(kind, bytes.slice(s![.., 0..blocks * size]).reshape([out, blocks, size]))
        }
        Codec::Nf4 => dequantize_nf4(bytes, features),
    };
    values.reshape([out, features]).into_primitive().tensor()
}

fn shift_right<B: Backend, const D: usize>(x: Tensor<B, D, Int>, by: i64) -> Tensor<B, D, Int> {
    if by == 0 { x } else { x.bitwise_right_shift_scalar(by.elem()) }
}

fn bit_and<B: Backend, const D: usize>(x: Tensor<B, D, Int>, mask: i64) -> Tensor<B, D, Int> {
    x.bitwise_and_scalar(mask.elem())
}

fn to_f32<B: Backend, const D: usize>(x: Tensor<B, D, Int>) -> Tensor<B, D> {
    x.float().cast(DType::F32)
}

fn byte_range<B: Backend>(block: &BlockBytes<B>, from: usize, to: usize) -> BlockBytes<B> {
    block.clone().slice(s![.., .., from..to])
}

/// Returns the table entry of every index.
fn look_up<B: Backend, const D: usize>(table: Vec<f32>, index: Tensor<B, D, Int>) -> Tensor<B, D> {
    let (shape, n) = (index.shape(), table.len());
    let table = Tensor::<B, 1>::from_data(TensorData::new(table, [n]), (&index.device(), DType::F32));
    let count = shape.num_elements();
    table.select(0, index.reshape([count])).reshape(shape)
}

/// Converts the f16 at byte `at` of every block to f32: `[rows, blocks, 1]`.
fn read_f16<B: Backend>(block: &BlockBytes<B>, at: usize) -> BlockValues<B> {
    let (low, high) = (byte_range(block, at, at + 1), byte_range(block, at + 1, at + 2));
    let exponent = bit_and(shift_right(high.clone(), 2), 31);
    let mantissa = to_f32(low + bit_and(high.clone(), 3) * 256);
    let normal = to_f32(exponent.clone().clamp(0, 1)) * 1024.0;
    let powers = (0..32).map(|e: i32| 2f32.powi(e.max(1) - 25)).collect();
    (mantissa + normal) * look_up(powers, exponent) * signs(high)
}

/// Returns -1 where the highest bit of a byte is set, else 1.
fn signs<B: Backend, const D: usize>(byte: Tensor<B, D, Int>) -> Tensor<B, D> {
    to_f32(shift_right(byte, 7)) * -2.0 + 1.0
}

/// Converts bytes to signed integers.
fn as_signed<B: Backend>(bytes: BlockBytes<B>) -> BlockValues<B> {
    to_f32(bytes.clone() - shift_right(bytes, 7) * 256)
}

/// Unpacks the lower four bits of all bytes, followed by the upper four bits.
fn nibbles<B: Backend>(bytes: BlockBytes<B>) -> BlockBytes<B> {
    Tensor::cat(vec![bit_and(bytes.clone(), 15), shift_right(bytes, 4)], 2)
}

/// Decodes blocks: `[rows, blocks, bytes]` → `[rows, blocks, elements]`.
fn dequantize_blocks<B: Backend>(kind: BlockType, block: BlockBytes<B>) -> BlockValues<B> {
    match kind {
        BlockType::Q8_0 => read_f16(&block, 0) * as_signed(byte_range(&block, 2, 34)),
        BlockType::Q4_0 => read_f16(&block, 0) * (to_f32(nibbles(byte_range(&block, 2, 18))) - 8.0),
        BlockType::Q4_1 => read_f16(&block, 0) * to_f32(nibbles(byte_range(&block, 4, 20))) + read_f16(&block, 2),
        BlockType::Q5_0 => {
            let quants = nibbles(byte_range(&block, 6, 22)) + unpack_bits(byte_range(&block, 2, 6)) * 16;
            read_f16(&block, 0) * (to_f32(quants) - 16.0)
        }
        BlockType::Q5_1 => {
            let quants = nibbles(byte_range(&block, 8, 24)) + unpack_bits(byte_range(&block, 4, 8)) * 16;
            read_f16(&block, 0) * to_f32(quants) + read_f16(&block, 2)
        }
        BlockType::Q4_K => dequantize_q4_k(&block),
        BlockType::Q6_K => dequantize_q6_k(&block),
        BlockType::F16 => read_f16(&block, 0),
        other => panic!("{other:?} is not a packed format"),
    }
}

/// Unpacks the bits of four bytes, lowest first.
fn unpack_bits<B: Backend>(bytes: BlockBytes<B>) -> BlockBytes<B> {
    let [rows, blocks, _] = bytes.dims();
    let bit = |i: i64| bit_and(shift_right(bytes.clone(), i), 1).unsqueeze_dim::<4>(3);
    Tensor::cat((0..8).map(bit).collect(), 3).reshape([rows, blocks, 32])
}

fn dequantize_q4_k<B: Backend>(block: &BlockBytes<B>) -> BlockValues<B> {
    let [rows, blocks, _] = block.dims();
    let [first, second, halves] = [4, 8, 12].map(|at| byte_range(block, at, at + 4));
    let six = |low: BlockBytes<B>, rest: BlockBytes<B>| {
        Tensor::cat(vec![bit_and(low.clone(), 63), rest + shift_right(low, 6) * 16], 2)
    };
    let scales = read_f16(block, 0) * to_f32(six(first, bit_and(halves.clone(), 15)));
    let minima = read_f16(block, 2) * to_f32(six(second, shift_right(halves, 4)));
    // 32 bytes hold two groups.
    let quants = nibbles(byte_range(block, 16, 144).reshape([rows * blocks, 4, 32])).reshape([rows * blocks, 8, 32]);
    let group = |x: BlockValues<B>| x.reshape([rows * blocks, 8, 1]);
    (group(scales) * to_f32(quants) - group(minima)).reshape([rows, blocks, 256])
}

fn dequantize_q6_k<B: Backend>(block: &BlockBytes<B>) -> BlockValues<B> {
    let [rows, blocks, _] = block.dims();
    let low = nibbles(byte_range(block, 0, 128).reshape([rows * blocks, 2, 64]));
    let high = byte_range(block, 128, 192).reshape([rows * blocks, 2, 32]);
    let high = Tensor::cat((0..4).map(|quarter| bit_and(shift_right(high.clone(), 2 * quarter), 3)).collect(), 2);
    let quants = (to_f32(low + high * 16) - 32.0).reshape([rows * blocks, 16, 16]);
    let scales = read_f16(block, 208) * as_signed(byte_range(block, 192, 208));
    (scales.reshape([rows * blocks, 16, 1]) * quants).reshape([rows, blocks, 256])
}

/// Decodes NF4 rows: `[rows, bytes]` → `[rows, blocks, elements]`.
fn dequantize_nf4<B: Backend>(rows: Tensor<B, 2, Int>, features: usize) -> BlockValues<B> {
    let (n, blocks) = (rows.dims()[0], features / nf4::BLOCK_SIZE);
    let (size, count) = (1 + nf4::BLOCK_SIZE / 2, nf4::max_groups(blocks));
    let block = rows.clone().slice(s![.., 0..blocks * size]).reshape([n, blocks, size]);
    let tail = rows.slice(s![.., blocks * size..blocks * size + 8 + 4 * count]).reshape([n, 2 + count, 4]);
    let byte = |i: usize| byte_range(&tail, i, i + 1);
    let counts = (byte(0) + byte(1) * 256).slice(s![.., 0..1, ..]).reshape([n, 1]);
    let floats = read_f32(&tail).reshape([n, 2 + count]);
    let mean = floats.clone().slice(s![.., 1..2]);
    let index = Tensor::<B, 1, Int>::arange(0..blocks as i64, &tail.device()).reshape([1, blocks]);
    // The groups of a row's later blocks are counted from the end of its first group.
    let group = shift_right(index - counts + 256, 8) + 2;
    let scales = look_up(nf4::DYNAMIC_MAP.to_vec(), byte_range(&block, 0, 1).reshape([n, blocks]))
        * floats.gather(1, group)
        + mean;
    look_up(nf4::VALUES.to_vec(), nibbles(byte_range(&block, 1, size))) * scales.unsqueeze_dim::<3>(2)
}

/// Reinterprets four bytes as an f32, for normal numbers and zero.
fn read_f32<B: Backend>(word: &BlockBytes<B>) -> BlockValues<B> {
    let byte = |i: usize| byte_range(word, i, i + 1);
    let exponent = bit_and(byte(3), 127) * 2 + shift_right(byte(2), 7);
    let mantissa = to_f32(bit_and(byte(2), 127) * 65536 + byte(1) * 256 + byte(0)) + (1 << 23) as f32;
    let powers = (0..256).map(|e: i32| if e == 0 { 0.0 } else { 2f64.powi(e - 150) as f32 }).collect();
    mantissa * look_up(powers, exponent) * signs(byte(3))
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::test_random as random;
    use burn::backend::Flex;

    /// Creates a weight of random bytes whose f16 fields are neither infinite nor NaN.
    fn packed(kind: BlockType, [out, features]: [usize; 2]) -> PackedWeight<Flex> {
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
        PackedWeight::new(kind.into(), features, bytes.chunks_exact(size), &Default::default())
    }

    #[test]
    fn tensor_operations_decode_bit_for_bit_as_the_codecs() {
        let values: Vec<f32> = (0..24 * 576).map(|i| random::uniform(3, i) as f32 * 0.04 - 0.02).collect();
        let mut all = vec![PackedWeight::<Flex>::nf4(&values, 576, &Default::default()).unwrap()];
        for kind in BlockType::ALL.into_iter().filter(|kind| kind.block_len() > 1) {
            all.push(packed(kind, [9, 768]));
        }
        for weight in all {
            let [out, features] = weight.shape();
            let bits = |x: FloatTensor<Flex>| {
                let values = tensor::<Flex, 2>(x).into_data().into_vec::<f32>().unwrap();
                // Adding 0 removes the sign of a zero.
                values.into_iter().map(|x| (x + 0.0).to_bits()).collect::<Vec<_>>()
            };
            assert_eq!(bits(unpack(&weight)), bits(Flex::unpack(&weight)), "{}", weight.codec());
            // This many rows do not take the integer kernels, which round activations.
            let input = |columns: usize| {
                let data = TensorData::new(random::numbers(5, 9 * columns), [9, columns]);
                Tensor::<Flex, 2>::from_data(data, &Default::default()).into_primitive().tensor()
            };
            let pairs = [
                (
                    forward(input(features), &weight, MatmulPrecision::F32),
                    Flex::packed_forward(input(features), &weight, MatmulPrecision::F32),
                ),
                (
                    backward_input(input(out), &weight, MatmulPrecision::F32),
                    Flex::packed_backward_input(input(out), &weight, None, MatmulPrecision::F32),
                ),
            ];
            for (found, expected) in pairs {
                let [found, expected] = [found, expected].map(tensor::<Flex, 2>);
                let size = expected.clone().abs().max().into_scalar();
                let difference = (found - expected).abs().max().into_scalar();
                assert!(difference <= 1e-5 * size, "{}: {difference} of {size}", weight.codec());
            }
        }
    }
}
