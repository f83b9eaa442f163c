//! The global gradient norm, which is the same in every world.
//!
//! A block of [`ALIGN`] values is summed by one rank as one row of a tensor. The block sums, f32 numbers, are then
//! added exactly, so it does not matter which rank adds which. Torch adds in f32 in an order that depends on the
//! sharding.

use crate::{bucket, segment::DynTensor, sharding::ALIGN};
use burn::tensor::backend::Backend;

/// The number of 32-bit digits of an [`ExactSum`]: the range of f32, and room for as many terms as fit into a machine.
const LIMBS: usize = 11;
/// The largest number of squares that are materialized at a time.
const MAX_SQUARES: usize = ALIGN << 14;
/// The largest number of host values that are copied to the device at a time.
const MAX_HOST_VALUES: usize = ALIGN << 10;
/// The exponent of the smallest positive f32.
const MIN_EXPONENT: i32 = -149;

/// An exact sum of non-negative f32 numbers, without rounding: digits of 32 bits, in units of the smallest positive
/// f32.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct ExactSum {
    limbs: [u64; LIMBS],
    /// The number of terms since the last carry propagation.
    terms: u32,
    infinite: bool,
    nan: bool,
}

impl ExactSum {
    pub(crate) fn add(&mut self, term: f32) {
        if !term.is_finite() {
            self.infinite |= term.is_infinite();
            self.nan |= term.is_nan();
            return;
        }
        let (exponent, fraction) = (term.to_bits() >> 23 & 0xff, u64::from(term.to_bits() & 0x7f_ffff));
        let digits = if exponent == 0 { fraction } else { fraction | 1 << 23 };
        let shift = exponent.max(1) - 1;
        let (limb, wide) = ((shift / 32) as usize, digits << (shift % 32));
        self.limbs[limb] += wide & 0xffff_ffff;
        self.limbs[limb + 1] += wide >> 32;
        self.terms += 1;
        if self.terms == u32::MAX {
            self.carry();
        }
    }

    fn carry(&mut self) {
        let mut carry = 0;
        for limb in &mut self.limbs {
            *limb += carry;
            carry = *limb >> 32;
            *limb &= 0xffff_ffff;
        }
        self.terms = 0;
    }

    /// Adds another sum.
    pub(crate) fn merge(&mut self, mut other: Self) {
        self.carry();
        other.carry();
        self.limbs.iter_mut().zip(other.limbs).for_each(|(limb, more)| *limb += more);
        self.carry();
        self.infinite |= other.infinite;
        self.nan |= other.nan;
    }

    /// Returns the sum, rounded to f64; the rounding depends on the sum alone.
    pub(crate) fn value(&self) -> f64 {
        if self.nan || self.infinite {
            return if self.nan { f64::NAN } else { f64::INFINITY };
        }
        let mut carried = self.clone();
        carried.carry();
        let weighted = |(i, &limb): (usize, &u64)| limb as f64 * f64::from(MIN_EXPONENT + 32 * i as i32).exp2();
        carried.limbs.iter().enumerate().rev().map(weighted).sum()
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let flags = u64::from(self.infinite) | u64::from(self.nan) << 1;
        let mut carried = self.clone();
        carried.carry();
        carried.limbs.iter().chain([&flags]).flat_map(|limb| limb.to_le_bytes()).collect()
    }

    /// Reads a sum from the start of `bytes`; returns it and the remaining bytes.
    pub(crate) fn from_bytes(bytes: &[u8]) -> (Self, &[u8]) {
        let (own, rest) = bytes.split_at(8 * (LIMBS + 1));
        let mut words =
            own.chunks_exact(8).map(|b| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]));
        let limbs = std::array::from_fn(|_| words.next().unwrap_or(0));
        let flags = words.next().unwrap_or(0);
        (Self { limbs, terms: 0, infinite: flags & 1 != 0, nan: flags & 2 != 0 }, rest)
    }
}

/// Adds the squares of f32 values; the values start at a multiple of [`ALIGN`] in their parameter.
pub(crate) fn add_squares<B: Backend>(sum: &mut ExactSum, values: &DynTensor<B>) {
    let (n, values) = (values.elements(), values.clone().flatten());
    let mut add = |from: usize, shape: [usize; 2]| {
        let rows = values.clone().narrow(0, from, shape[0] * shape[1]).reshape(shape);
        let squares = rows.clone().mul(rows).sum_dim(1);
        squares.into_data().iter::<f32>().for_each(|square| sum.add(square));
    };
    let full_blocks = n - n % ALIGN;
    for from in (0..full_blocks).step_by(MAX_SQUARES) {
        add(from, [MAX_SQUARES.min(full_blocks - from) / ALIGN, ALIGN]);
    }
    if full_blocks < n {
        add(full_blocks, [1, n - full_blocks]);
    }
}

/// Adds the squares of values in host memory. They are summed on the device, a part at a time, because the order in
/// which a row is summed differs between backends and the norm must not depend on where the values are.
pub(crate) fn add_squares_on_host<B: Backend>(sum: &mut ExactSum, values: &[f32], device: &B::Device) {
    for part in values.chunks(MAX_HOST_VALUES) {
        add_squares::<B>(sum, &bucket::tensor_from_slice(part, device));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms() -> Vec<f32> {
        let mantissa = |i: u32| f32::from_bits(0x3f80_0000 | i.wrapping_mul(2_654_435_761) >> 9);
        (0..4000).map(|i| mantissa(i) * ((i as f32 * 0.37) % 200.0 - 100.0).exp2()).collect()
    }

    #[test]
    fn the_sum_does_not_depend_on_order_or_division() {
        let terms = terms();
        let sum = |terms: &mut dyn Iterator<Item = f32>| {
            let mut sum = ExactSum::default();
            terms.for_each(|term| sum.add(term));
            sum
        };
        let forward = sum(&mut terms.iter().copied());
        assert_eq!(forward.value(), sum(&mut terms.iter().rev().copied()).value());
        for parts in 1..7 {
            let mut merged = ExactSum::default();
            for part in 0..parts {
                let (read, rest) = (sum(&mut terms.iter().copied().skip(part).step_by(parts)).to_bytes(), [1, 2]);
                let bytes = [read, rest.to_vec()].concat();
                let (part, left) = ExactSum::from_bytes(&bytes);
                assert_eq!(left, rest);
                merged.merge(part);
            }
            assert_eq!(merged.value(), forward.value());
        }
    }

    #[test]
    fn values_on_the_host_have_the_sum_of_values_on_the_device() {
        let (device, terms) = (Default::default(), terms());
        for n in [1, ALIGN - 1, ALIGN, 3 * ALIGN + 7, MAX_HOST_VALUES, MAX_HOST_VALUES + ALIGN + 1] {
            let values: Vec<f32> = terms.iter().cycle().copied().take(n).collect();
            let (mut on_device, mut on_host) = (ExactSum::default(), ExactSum::default());
            add_squares::<burn::backend::Flex>(&mut on_device, &bucket::tensor_from_slice(&values, &device));
            add_squares_on_host::<burn::backend::Flex>(&mut on_host, &values, &device);
            assert_eq!(on_host.value(), on_device.value(), "{n} values");
        }
    }

    #[test]
    fn the_sum_is_right_at_the_ends_of_the_range() {
        for terms in [vec![f32::from_bits(1); 3], vec![f32::MAX; 5], vec![1.0, 2f32.powi(-140), 0.0], vec![3.5, 0.25]] {
            let mut sum = ExactSum::default();
            terms.iter().for_each(|&term| sum.add(term));
            assert_eq!(sum.value(), terms.iter().map(|&term| f64::from(term)).sum::<f64>(), "{terms:?}");
        }
        let mut sum = ExactSum::default();
        sum.add(f32::INFINITY);
        assert_eq!(sum.value(), f64::INFINITY);
        sum.add(f32::NAN);
        let mut other = ExactSum::default();
        other.merge(ExactSum::from_bytes(&sum.to_bytes()).0);
        assert!(other.value().is_nan());
    }
}
