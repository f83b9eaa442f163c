//! Rows of floats as rows that are decoded: f32, f16 and bf16 as they lie in memory.

use crate::packed::{LANES, RowCodec, RowUser, accumulate};
use burn::tensor::{DType, f16};
use half::slice::HalfFloatSliceExt;

/// Values that are widened at a time.
const BLOCK: usize = 64;

/// The type of a float that fills `BYTES` bytes, little-endian.
trait Float<const BYTES: usize> {
    /// Loops over indices, as in the decoders: iterators are not always compiled into the caller.
    fn widen(bytes: &[[u8; BYTES]; BLOCK], out: &mut [f32; BLOCK]);
}

/// Rows of such floats.
struct Floats<F, const BYTES: usize>(std::marker::PhantomData<F>);

impl<F: Float<BYTES>, const BYTES: usize> Floats<F, BYTES> {
    /// Calls `work` with the index and the values of one block after the other, and the number of those that count. The last
    /// block is filled up with zeros.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn blocks(bytes: &[u8], mut work: impl FnMut(usize, &[f32; BLOCK], usize)) {
        let (blocks, rest) = bytes.as_chunks::<BYTES>().0.as_chunks::<BLOCK>();
        let mut values = [0.0; BLOCK];
        for index in 0..blocks.len() {
            F::widen(&blocks[index], &mut values);
            work(index, &values, BLOCK);
        }
        if !rest.is_empty() {
            let mut last = [[0; BYTES]; BLOCK];
            last[..rest.len()].copy_from_slice(rest);
            F::widen(&last, &mut values);
            work(blocks.len(), &values, rest.len());
        }
    }
}

impl<F: Float<BYTES>, const BYTES: usize> RowCodec for Floats<F, BYTES> {
    #[inline(always)]
    fn decode(bytes: &[u8], out: &mut [f32]) {
        Self::blocks(
            bytes,
            #[inline(always)]
            |index, values, n| out[index * BLOCK..][..n].copy_from_slice(&values[..n]),
        );
    }

    #[inline(always)]
    fn dot(bytes: &[u8], x: &[f32]) -> f32 {
        let ((whole, rest), mut sums) = (x.as_chunks::<BLOCK>(), [0.0; LANES]);
        Self::blocks(
            bytes,
            #[inline(always)]
            |index, values, n| match whole.get(index) {
                Some(x) => accumulate(&mut sums, values, x),
                None => (0..n.min(rest.len())).for_each(|i| sums[0] += values[i] * rest[i]),
            },
        );
        sums.iter().sum()
    }
}

struct F32;
struct Bf16;
struct F16;

impl Float<4> for F32 {
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn widen(bytes: &[[u8; 4]; BLOCK], out: &mut [f32; BLOCK]) {
        for i in 0..BLOCK {
            out[i] = f32::from_le_bytes(bytes[i]);
        }
    }
}

impl Float<2> for Bf16 {
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn widen(bytes: &[[u8; 2]; BLOCK], out: &mut [f32; BLOCK]) {
        for i in 0..BLOCK {
            out[i] = f32::from_bits(u32::from(u16::from_le_bytes(bytes[i])) << 16);
        }
    }
}

impl Float<2> for F16 {
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn widen(bytes: &[[u8; 2]; BLOCK], out: &mut [f32; BLOCK]) {
        // One test of what the machine has serves the whole block.
        let mut halves = [f16::ZERO; BLOCK];
        for i in 0..BLOCK {
            halves[i] = f16::from_le_bytes(bytes[i]);
        }
        halves.convert_to_f32_slice(out);
    }
}

/// Calls `user` with the codec of floats of that type.
pub(super) fn rows<U: RowUser>(dtype: DType, user: U) -> U::Output {
    match dtype {
        DType::F32 => user.with::<Floats<F32, 4>>(),
        DType::F16 => user.with::<Floats<F16, 2>>(),
        DType::BF16 => user.with::<Floats<Bf16, 2>>(),
        other => panic!("a weight of the type {other:?} is no f32, f16 or bf16"),
    }
}
