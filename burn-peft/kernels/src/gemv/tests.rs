//! Tests that integer GEMV agrees with the decoded weights to the accuracy of 16-bit fixed point.

use super::int8::has_avx512_vnni;
use crate::{
    MatmulPrecision,
    instructions::has_avx2,
    packed::{BlockType, PackedWeight},
    test_random as random,
};
use burn::{
    backend::Flex,
    tensor::{DType, Tensor, TensorData},
};
use half::f16;

/// A block format with an integer kernel.
#[derive(Debug, Clone, Copy)]
struct FormatCase {
    block_type: BlockType,
    /// The offsets of the f16 fields in a block.
    f16_offsets: &'static [usize],
    /// The largest weight magnitude for f16 fields of 1, without a minimum.
    max_weight: f32,
}

const fn format(block_type: BlockType, f16_offsets: &'static [usize], max_weight: f32) -> FormatCase {
    FormatCase { block_type, f16_offsets, max_weight }
}

const FORMATS: [FormatCase; 7] = [
    format(BlockType::Q8_0, &[0], 128.0),
    format(BlockType::Q4_0, &[0], 8.0),
    format(BlockType::Q4_1, &[0, 2], 15.0),
    format(BlockType::Q5_0, &[0], 16.0),
    format(BlockType::Q5_1, &[0, 2], 31.0),
    format(BlockType::Q4_K, &[0, 2], 63.0 * 15.0),
    format(BlockType::Q6_K, &[208], 128.0 * 32.0),
];

/// A packed weight `[out, features]` and the values that it decodes to.
struct TestWeight {
    packed: PackedWeight<Flex>,
    values: Vec<f32>,
    /// An upper bound on the magnitude of the terms of which a weight is the sum.
    magnitude_bound: f32,
}

impl TestWeight {
    /// Creates a weight whose bytes are given by `quant` and whose f16 fields by `half`.
    fn new(
        FormatCase { block_type, f16_offsets, max_weight }: FormatCase,
        [out, features]: [usize; 2],
        quant: impl Fn(u64) -> u8,
        half: impl Fn(u64) -> f32,
    ) -> Self {
        let size = block_type.block_bytes();
        let mut bytes: Vec<u8> = (0..(out * features / block_type.block_len() * size) as u64).map(quant).collect();
        let mut largest = 0f32;
        for (index, block) in bytes.chunks_exact_mut(size).enumerate() {
            for &at in f16_offsets {
                let half = f16::from_f32(half((index * 8 + at) as u64));
                largest = largest.max(half.to_f32().abs());
                block[at..at + 2].copy_from_slice(&half.to_le_bytes());
            }
        }
        let mut values = vec![0.0; out * features];
        block_type.dequantize(&bytes, &mut values);
        let rows = bytes.chunks_exact(bytes.len() / out);
        let magnitude_bound = largest * (max_weight + if block_type == BlockType::Q4_K { 63.0 } else { 1.0 });
        Self {
            packed: PackedWeight::new(block_type.into(), features, rows, &Default::default()),
            values,
            magnitude_bound,
        }
    }

    fn random(format: FormatCase, shape: [usize; 2]) -> Self {
        let key = random::seed(&format!("{format:?} {shape:?}"));
        let half = |i| 0.01 * (random::uniform(key, i) as f32 - 0.3);
        Self::new(format, shape, |i| random::bits(key, i) as u8, half)
    }

    /// Returns `x·Wᵀ [tokens, out]`.
    fn matmul(&self, x: &[f32]) -> Vec<f32> {
        let features = self.packed.shape()[1];
        let x = TensorData::new(x.to_vec(), [x.len() / features, features]);
        let x = Tensor::from_data(x, (&Default::default(), DType::F32));
        self.packed.linear(x, MatmulPrecision::F32).into_data().to_vec().unwrap()
    }

    /// Asserts that every product agrees with the f64 reference, up to half an integer step of each activation times
    /// the weight and the rounding errors of an f32 sum.
    fn assert_within_bound(&self, x: &[f32], name: &str) {
        let [out, features] = self.packed.shape();
        for (index, found) in self.matmul(x).into_iter().enumerate() {
            let (row, token) = (index % out, index / out);
            let (weights, x) = (&self.values[row * features..], &x[token * features..]);
            let (mut sum, mut bound) = (0.0, 0.0);
            for (weights, x) in weights[..features].chunks(32).zip(x[..features].chunks(32)) {
                let largest = x.iter().fold(2f32.powi(-100), |largest, x| largest.max(x.abs()));
                let weight: f64 = weights.iter().map(|&w| f64::from(w.abs())).sum();
                let size: f64 = x.iter().map(|&x| f64::from(x.abs())).sum();
                let roundings = (features / 64 + 8) as f64 * 2f64.powi(-24);
                sum += weights.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum::<f64>();
                bound += weight * f64::from(largest) / 65270.0 + roundings * size * f64::from(self.magnitude_bound);
            }
            let error = (f64::from(found) - sum).abs();
            assert!(error <= bound, "{name}, row {row} of token {token}: {found} for {sum}, {error:e} over {bound:e}");
        }
    }
}

fn numbers(name: &str, n: usize) -> Vec<f32> {
    random::numbers(random::seed(name), n)
}

/// Returns true if the machine has an integer kernel; the float kernels are covered by the other tests of packed
/// weights.
fn is_supported() -> bool {
    let here = has_avx512_vnni() || has_avx2();
    if !here {
        eprintln!("skipped: this machine has neither AVX2 nor AVX-512 VNNI");
    }
    here
}

#[test]
fn products_of_random_rows_of_any_length_and_number() {
    for format in FORMATS.into_iter().filter(|_| is_supported()) {
        for blocks in [1, 2, 3, 4, 5, 6, 7, 8, 18, 48] {
            let features = blocks * format.block_type.block_len();
            for tokens in 1..=8 {
                let name = format!("{:?}, {blocks} blocks, {tokens} tokens", format.block_type);
                TestWeight::random(format, [19, features])
                    .assert_within_bound(&numbers(&name, tokens * features), &name);
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_what_else_is_computed() {
    for format in FORMATS.into_iter().filter(|_| is_supported()) {
        // These are more rows than a chunk has, and more values than the limit of a single thread.
        let (weight, x) = (TestWeight::random(format, [777, 768]), numbers("x", 3 * 768));
        let (all, last) = (weight.matmul(&x), weight.packed.slice(760..777));
        let last = TestWeight { packed: last, values: Vec::new(), magnitude_bound: 0.0 }.matmul(&x[768..2 * 768]);
        assert_eq!(all[777 + 760..2 * 777], last, "{:?}", format.block_type);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(pool.install(|| weight.matmul(&x)), all, "{:?}", format.block_type);
    }
}

#[test]
fn extreme_blocks() {
    for format in FORMATS.into_iter().filter(|_| is_supported()) {
        let shape @ [_, features] = [3, 768];
        let mut outlier = numbers("outlier", features);
        (outlier[5], outlier[300]) = (3e4, -1e-3);
        let alternating = |i: usize| if i.is_multiple_of(2) { 1e30 } else { -1e30 };
        let inputs: [(&str, Vec<f32>); 8] = [
            ("zero", vec![0.0; features]),
            ("largest", vec![1e30; features]),
            ("least", vec![-1e30; features]),
            ("both", (0..features).map(alternating).collect()),
            ("subnormal", vec![1e-40; features]),
            ("tiny", numbers("tiny", features).iter().map(|x| x * 1e-31).collect()),
            ("a zero block", (0..features).map(|i| if i / 32 == 3 { 0.0 } else { 0.5 }).collect()),
            ("outlier", outlier),
        ];
        for (name, x) in inputs {
            for quant in [0, 0x7f, 0x80, 0xff] {
                let name = format!("{:?} of {quant:#x} × {name}", format.block_type);
                TestWeight::new(format, shape, |_| quant, |_| 0.5).assert_within_bound(&x, &name);
            }
            TestWeight::random(format, shape).assert_within_bound(&x, &format!("{:?} × {name}", format.block_type));
        }
    }
}

#[test]
fn what_is_not_finite_is_seen_in_every_output_it_meets() {
    for format in FORMATS.into_iter().filter(|_| is_supported()) {
        // In the last case all weights are zero.
        for (weight, bad) in [(0.5, f32::NAN), (0.5, f32::INFINITY), (0.0, f32::NEG_INFINITY)] {
            let weight = TestWeight::new(format, [21, 256 * 3], |i| i as u8, |_| weight);
            for at in [0, 33, 127, 767] {
                let mut x = numbers("x", 3 * 768);
                x[768 + at] = bad;
                let y = weight.matmul(&x);
                assert!(y[21..42].iter().all(|y| !y.is_finite()), "{:?}: {bad} at {at}: {y:?}", format.block_type);
                assert!(
                    y[..21].iter().chain(&y[42..]).all(|y| y.is_finite()),
                    "{:?}: {bad} at {at}",
                    format.block_type
                );
            }
        }
        let weight = TestWeight::new(format, [1, 256], |_| 0x11, |_| f32::INFINITY);
        assert!(!weight.matmul(&[1.0; 256])[0].is_finite(), "{:?}", format.block_type);
    }
}
