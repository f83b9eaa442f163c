//! Loops over f32 slices that compile to vector instructions: reductions keep independent partial sums, and all
//! functions are inlined into [`vectorized`].

/// The number of independent partial sums of a reduction: two AVX2 registers, one AVX-512 register.
const LANES: usize = 16;

pub(super) use burn_peft_kernels::instructions::vectorized;

/// Computes `eˣ` with a relative error of 2e-7. Where `eˣ` underflows, the result is about the smallest normal number;
/// NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.3, 88.3);
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    // ln 2 is subtracted in two parts, so that the difference is exact.
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let tail = 0.166_666_57 + r * (0.041_666_58 + r * (0.008_333_68 + r * 0.001_388_9));
    let p = 1.0 + r * (1.0 + r * (0.5 + r * tail));
    // SAFETY: the clamp bounds |n| by 128, which fits an i32, and NaN is excluded; `p` carries it to the result.
    let n = if n.is_nan() { 0 } else { unsafe { n.to_int_unchecked::<i32>() } };
    p * f32::from_bits(((n + 127) << 23) as u32)
}

/// Computes `Σ f(i)` over `0..n` in [`LANES`] independent partial sums.
#[inline(always)]
fn sum_in_lanes(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = n - n % LANES;
    let mut start = 0;
    while start < whole {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(start + lane);
        }
        start += LANES;
    }
    lanes.iter().sum::<f32>() + (whole..n).map(f).sum::<f32>()
}

/// Computes `Σ aᵢ·bᵢ`.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let b = &b[..a.len()];
    sum_in_lanes(a.len(), |i| a[i] * b[i])
}

/// Computes `Σ aᵢ·bᵢ·cᵢ`.
#[inline(always)]
pub(super) fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let (b, c) = (&b[..a.len()], &c[..a.len()]);
    sum_in_lanes(a.len(), |i| a[i] * b[i] * c[i])
}

/// Returns the largest value. It ignores NaN, which shows in the sum of exponentials that follows.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (max, &value) in lanes.iter_mut().zip(chunk) {
            *max = if value > *max { value } else { *max };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &value| max.max(value))
}

/// Replaces every `x` by `exp(x - shift)` and returns their sum.
#[inline(always)]
pub(super) fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let mut chunks = x.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (sum, value) in lanes.iter_mut().zip(chunk) {
            *value = exp(*value - shift);
            *sum += *value;
        }
    }
    let mut sum = lanes.iter().sum::<f32>();
    for value in chunks.into_remainder() {
        *value = exp(*value - shift);
        sum += *value;
    }
    sum
}

/// Multiplies every value by `factor`.
#[inline(always)]
pub(super) fn scale(x: &mut [f32], factor: f32) {
    x.iter_mut().for_each(|value| *value *= factor);
}

/// Computes `out = factor · x`.
#[inline(always)]
pub(super) fn scale_into(out: &mut [f32], x: &[f32], factor: f32) {
    for (out, &value) in out.iter_mut().zip(x) {
        *out = factor * value;
    }
}

/// Computes `out += x`.
#[inline(always)]
pub(super) fn add(out: &mut [f32], x: &[f32]) {
    for (out, &value) in out.iter_mut().zip(x) {
        *out += value;
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_exponential_is_accurate_where_it_is_normal() {
        for i in -870..880 {
            let x = i as f32 / 10.0;
            let (found, expected) = (super::exp(x) as f64, (x as f64).exp());
            assert!((found - expected).abs() <= 3e-7 * expected, "exp({x}) is {found}, not {expected}");
        }
        assert!(super::exp(f32::NAN).is_nan());
        assert!(super::exp(f32::NEG_INFINITY) < 2e-38);
    }

    #[test]
    fn reductions_of_any_length_equal_plain_ones() {
        let x: Vec<f32> = (0..67).map(|i| ((i * 37 % 19) as f32 - 9.0) / 8.0).collect();
        for n in 0..x.len() {
            let x = &x[..n];
            let plain: f64 = x.iter().map(|&v| v as f64 * v as f64).sum();
            assert!((super::dot(x, x) as f64 - plain).abs() < 1e-4);
            assert_eq!(super::max(x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut y = x.to_vec();
            let sum = super::exp_sum(&mut y, 1.0);
            let plain: f64 = x.iter().map(|&v| (v as f64 - 1.0).exp()).sum();
            assert!((sum as f64 - plain).abs() <= 1e-6 * plain.max(1.0));
        }
    }
}
