//! Tests that products equal plain host code in f64, for all shapes, strides and types.

use super::*;

const LENGTHS: [usize; 8] = [1, 2, 3, 11, 16, 33, 61, 100];

/// Returns numbers between -1 and 1 that bf16 does not hold exactly.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    crate::test_random::numbers(seed, n)
}

fn halves(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&value| bf16::from_f32(value)).collect()
}

/// One operand in all the forms in which it can be passed: f32 or bf16, row-major or transposed.
struct TestOperand {
    shape: [usize; 2],
    plain: Vec<f32>,
    plain_turned: Vec<f32>,
    half: Vec<bf16>,
    half_turned: Vec<bf16>,
}

impl TestOperand {
    fn new([rows, columns]: [usize; 2], seed: u64) -> Self {
        let plain = numbers(rows * columns, seed);
        let plain_turned: Vec<f32> = (0..rows * columns).map(|at| plain[(at % rows) * columns + at / rows]).collect();
        let (half, half_turned) = (halves(&plain), halves(&plain_turned));
        Self { shape: [rows, columns], plain, plain_turned, half, half_turned }
    }

    fn matrix(&self, half: bool, turned: bool) -> Matrix<'_> {
        let [rows, columns] = self.shape;
        match (half, turned) {
            (false, false) => Matrix::new(&self.plain, [rows, columns]),
            (false, true) => Matrix::new(&self.plain_turned, [columns, rows]).transposed(),
            (true, false) => Matrix::from_bf16(&self.half, [rows, columns]),
            (true, true) => Matrix::from_bf16(&self.half_turned, [columns, rows]).transposed(),
        }
    }

    /// Returns the value that the product uses, rounded to the given precision.
    fn value(&self, [row, column]: [usize; 2], precision: MatmulPrecision, half: bool) -> f64 {
        let value = self.plain[row * self.shape[1] + column];
        let value = if half { bf16::from_f32(value).to_f32() } else { value };
        match precision {
            MatmulPrecision::F32 => value.into(),
            MatmulPrecision::Bf16 => bf16::from_f32(value).to_f64(),
            MatmulPrecision::F16 => f16::from_f32(value).to_f64(),
        }
    }
}

fn check([m, n, k]: [usize; 3], options: GemmOptions, accumulate: bool) {
    let precision = options.precision;
    let (a, b) = (TestOperand::new([m, k], 1), TestOperand::new([k, n], 2));
    let stride = n + 3;
    let before = numbers(m * stride, 3);
    for case in 0..16 {
        let [half_a, half_b, turned_a, turned_b] = [1, 2, 4, 8].map(|bit| case & bit != 0);
        let mut values = before.clone();
        let to = GemmOutput { values: &mut values, stride, accumulate };
        gemm(to, a.matrix(half_a, turned_a), b.matrix(half_b, turned_b), options);
        for row in 0..m {
            for column in 0..stride {
                let (at, place) =
                    (row * stride + column, format!("{m}x{n}x{k} {precision:?} {case:04b} {row},{column}"));
                if column >= n {
                    assert_eq!(values[at], before[at], "{place} is beyond the product");
                    continue;
                }
                let term = |p| a.value([row, p], precision, half_a) * b.value([p, column], precision, half_b);
                let sum: f64 = (0..k).map(term).sum();
                let expected = f64::from(options.alpha) * sum + if accumulate { before[at].into() } else { 0.0 };
                let error = (f64::from(values[at]) - expected).abs();
                assert!(error <= 2e-7 * (k as f64 + 4.0), "{place}: {} is not {expected}", values[at]);
            }
        }
    }
}

#[test]
fn products_of_any_shape_equal_plain_ones() {
    for (i, &m) in LENGTHS.iter().enumerate() {
        for (j, &n) in LENGTHS.iter().enumerate() {
            let k = LENGTHS[(i * 3 + j) % LENGTHS.len()];
            for precision in [MatmulPrecision::F32, MatmulPrecision::Bf16, MatmulPrecision::F16] {
                let options = GemmOptions { precision, alpha: [1.0, 0.375][i % 2], threads: Threads::One };
                check([m, n, k], options, (i + j) % 2 == 1);
            }
        }
    }
}

#[test]
fn products_that_are_divided_equal_plain_ones() {
    // These are deeper than one KC block, and each operand takes the role of A and of B.
    for shape in
        [[150, 200, 100], [13, 3, 1700], [7, 420, 1601], [300, 8, 1000], [40, 2100, 48], [110, 130, 703], [197, 96, 32]]
    {
        for precision in [MatmulPrecision::F32, MatmulPrecision::Bf16, MatmulPrecision::F16] {
            check(shape, GemmOptions { alpha: 0.5, ..GemmOptions::new(precision) }, true);
        }
    }
}

#[test]
fn a_result_does_not_depend_on_what_is_computed_beside_it() {
    let [m, n, k] = [300, 130, 833];
    let (a, b) = (TestOperand::new([m, k], 1), TestOperand::new([k, n], 2));
    for precision in [MatmulPrecision::F32, MatmulPrecision::Bf16, MatmulPrecision::F16] {
        let mut whole = vec![0.0; m * n];
        let to = GemmOutput { values: &mut whole, stride: n, accumulate: false };
        gemm(to, a.matrix(false, false), b.matrix(false, true), GemmOptions::new(precision));
        for rows in [0..1, 13..14, 299..300, 7..31, 101..300] {
            let mut some = vec![0.0; rows.len() * n];
            let to = GemmOutput { values: &mut some, stride: n, accumulate: false };
            let part = a.matrix(false, false).rows(rows.clone());
            let options = GemmOptions { threads: Threads::One, ..GemmOptions::new(precision) };
            gemm(to, part, b.matrix(false, true), options);
            let exact = same_summation_order(precision, [m, n, k], [rows.len(), n, k]);
            let near = |(&x, &y): (&f32, &f32)| if exact { x == y } else { (x - y).abs() < 1e-4 };
            assert!(whole[rows.start * n..rows.end * n].iter().zip(&some).all(near), "{rows:?}, {precision:?}");
        }
    }
}

#[test]
fn products_of_f32_are_as_exact_as_sums_of_f32() {
    // Dropping the lowest eight bits of a value would cause an error of 8e-6.
    for k in [64, 600, 1500, 5000] {
        let [m, n] = [100, 97];
        let (a, b) = (TestOperand::new([m, k], 1), TestOperand::new([k, n], 2));
        let mut values = vec![0.0; m * n];
        let to = GemmOutput { values: &mut values, stride: n, accumulate: false };
        sgemm(to, a.matrix(false, false), b.matrix(false, true), 1.0, Threads::All);
        let (mut errors, mut squares) = (0.0, 0.0);
        for (at, &found) in values.iter().enumerate() {
            let value = |operand: &TestOperand, at| operand.value(at, MatmulPrecision::F32, false);
            let sum: f64 = (0..k).map(|p| value(&a, [at / n, p]) * value(&b, [p, at % n])).sum();
            errors += (f64::from(found) - sum).powi(2);
            squares += sum * sum;
        }
        let error = (errors / squares).sqrt();
        assert!(error < 8e-7, "{k} deep: {error:e}");
    }
}

/// Returns true if products of these shapes accumulate in the same order. Those of the gemm crate do not; a product
/// with few rows does not use bf16x3, but one with many rows does.
fn same_summation_order(precision: MatmulPrecision, one: [usize; 3], other: [usize; 3]) -> bool {
    #[cfg(target_arch = "x86_64")]
    return has_simd_gemm() && (precision != MatmulPrecision::F32 || x86::uses_bf16x3(one) == x86::uses_bf16x3(other));
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (precision, one, other);
        has_simd_gemm()
    }
}

#[test]
fn a_value_that_is_no_number_shows() {
    for precision in [MatmulPrecision::F32, MatmulPrecision::Bf16, MatmulPrecision::F16] {
        for bad in [f32::NAN, f32::INFINITY] {
            let (mut a, b) = (TestOperand::new([20, 40], 1), TestOperand::new([40, 20], 2));
            a.plain[5 * 40 + 7] = bad;
            let mut values = vec![0.0; 400];
            let to = GemmOutput { values: &mut values, stride: 20, accumulate: false };
            let options = GemmOptions { threads: Threads::One, ..GemmOptions::new(precision) };
            gemm(to, a.matrix(false, false), b.matrix(false, false), options);
            for (at, value) in values.iter().enumerate() {
                assert_eq!(value.is_finite(), at / 20 != 5, "{precision:?}, {bad} in row 5: {value} at {at}");
            }
        }
    }
}
