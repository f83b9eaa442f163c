//! Decoders of float rows: f32, f16 and bf16 as they lie in memory.

use crate::packed::{LANES, RowCodec, WithRowCodec, accumulate_dot};
use burn::tensor::{DType, f16};
use half::slice::HalfFloatSliceExt;

/// Values that are converted to f32 at a time.
const BLOCK_LEN: usize = 64;

/// A little-endian float type of `BYTES` bytes.
trait LittleEndianFloat<const BYTES: usize> {
    /// Converts a block to f32. Loops over indices, as the block decoders do: the compiler does not always inline
    /// iterators.
    fn widen(bytes: &[[u8; BYTES]; BLOCK_LEN], out: &mut [f32; BLOCK_LEN]);
}

/// Decoder of rows of one float type.
struct FloatCodec<F, const BYTES: usize>(std::marker::PhantomData<F>);

impl<F: LittleEndianFloat<BYTES>, const BYTES: usize> FloatCodec<F, BYTES> {
    /// Calls `work` for every block with its index, its values and the number of valid values. The last block is padded
    /// with zeros.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn for_each_block(bytes: &[u8], mut work: impl FnMut(usize, &[f32; BLOCK_LEN], usize)) {
        let (blocks, rest) = bytes.as_chunks::<BYTES>().0.as_chunks::<BLOCK_LEN>();
        let mut values = [0.0; BLOCK_LEN];
        for index in 0..blocks.len() {
            F::widen(&blocks[index], &mut values);
            work(index, &values, BLOCK_LEN);
        }
        if !rest.is_empty() {
            let mut last = [[0; BYTES]; BLOCK_LEN];
            last[..rest.len()].copy_from_slice(rest);
            F::widen(&last, &mut values);
            work(blocks.len(), &values, rest.len());
        }
    }
}

impl<F: LittleEndianFloat<BYTES>, const BYTES: usize> RowCodec for FloatCodec<F, BYTES> {
    #[inline(always)]
    fn decode(bytes: &[u8], out: &mut [f32]) {
        Self::for_each_block(
            bytes,
            #[inline(always)]
            |index, values, n| out[index * BLOCK_LEN..][..n].copy_from_slice(&values[..n]),
        );
    }

    #[inline(always)]
    fn dot(bytes: &[u8], x: &[f32]) -> f32 {
        let ((whole, rest), mut sums) = (x.as_chunks::<BLOCK_LEN>(), [0.0; LANES]);
        Self::for_each_block(
            bytes,
            #[inline(always)]
            |index, values, n| match whole.get(index) {
                Some(x) => accumulate_dot(&mut sums, values, x),
                None => (0..n.min(rest.len())).for_each(|i| sums[0] += values[i] * rest[i]),
            },
        );
        sums.iter().sum()
    }
}

struct F32Le;
struct Bf16Le;
struct F16Le;

impl LittleEndianFloat<4> for F32Le {
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn widen(bytes: &[[u8; 4]; BLOCK_LEN], out: &mut [f32; BLOCK_LEN]) {
        for i in 0..BLOCK_LEN {
            out[i] = f32::from_le_bytes(bytes[i]);
        }
    }
}

impl LittleEndianFloat<2> for Bf16Le {
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn widen(bytes: &[[u8; 2]; BLOCK_LEN], out: &mut [f32; BLOCK_LEN]) {
        for i in 0..BLOCK_LEN {
            out[i] = f32::from_bits(u32::from(u16::from_le_bytes(bytes[i])) << 16);
        }
    }
}

impl LittleEndianFloat<2> for F16Le {
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn widen(bytes: &[[u8; 2]; BLOCK_LEN], out: &mut [f32; BLOCK_LEN]) {
        // One run-time check of the CPU's conversion instructions serves the whole block.
        let mut halves = [f16::ZERO; BLOCK_LEN];
        for i in 0..BLOCK_LEN {
            halves[i] = f16::from_le_bytes(bytes[i]);
        }
        halves.convert_to_f32_slice(out);
    }
}

/// Calls `user` with the row decoder of that float type.
pub(super) fn dispatch<U: WithRowCodec>(dtype: DType, user: U) -> U::Output {
    match dtype {
        DType::F32 => user.with_row_codec::<FloatCodec<F32Le, 4>>(),
        DType::F16 => user.with_row_codec::<FloatCodec<F16Le, 2>>(),
        DType::BF16 => user.with_row_codec::<FloatCodec<Bf16Le, 2>>(),
        other => panic!("the weight type {other:?} is not f32, f16 or bf16"),
    }
}
