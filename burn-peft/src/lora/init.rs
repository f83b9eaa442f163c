//! The initialization of `A` and `B`.

use super::linalg::{Factors, orthonormalise};
use crate::{config::InitLoraWeights, random};
use burn::tensor::{DType, Tensor, TensorData, backend::Backend, s};

/// Returns the initial `A [r, in]` and `B [out, r]`, drawn with the random `key`.
pub(super) fn initial_values(init: &InitLoraWeights, [out, features]: [usize; 2], r: usize, key: u64) -> [Vec<f32>; 2] {
    let second = random::key(&[key, 1]);
    let (a, b) = (r * features, out * r);
    match init {
        InitLoraWeights::Gaussian => [normal(key, a, 1.0 / r as f64), vec![0.0; b]],
        InitLoraWeights::False => [kaiming_uniform(key, a, features), kaiming_uniform(second, b, r)],
        InitLoraWeights::Orthogonal => orthogonal_init([out, features], r, key),
        // The other initializations compute their values from the weight, or a file overwrites them.
        _ => [kaiming_uniform(key, a, features), vec![0.0; b]],
    }
}

/// Returns AdaLoRA's initial `A [r, in]` and `B [out, r]`: normal with standard deviation 0.02. The factors between them
/// start at zero.
pub(super) fn adalora_values([out, features]: [usize; 2], r: usize, key: u64) -> [Vec<f32>; 2] {
    [normal(key, r * features, 0.02), normal(random::key(&[key, 1]), out * r, 0.02)]
}

/// Draws `n` uniform numbers in `±1/√features`: Kaiming initialization with `a = √5`.
fn kaiming_uniform(key: u64, n: usize, features: usize) -> Vec<f32> {
    random::uniform_values(key, n, 1.0 / (features as f64).sqrt())
}

fn normal(key: u64, n: usize, deviation: f64) -> Vec<f32> {
    (0..n as u64).map(|i| (random::normal(key, i) * deviation) as f32).collect()
}

/// Returns the orthogonal initialization: `A` mixes the odd rows of a random orthogonal matrix, `B` the even ones, with
/// normal random coefficients divided by 10. `B·A` is 0, but neither matrix is.
fn orthogonal_init([out, features]: [usize; 2], r: usize, key: u64) -> [Vec<f32>; 2] {
    let mut rows: Vec<Vec<f64>> =
        (0..r).map(|row| (0..r).map(|column| random::normal(key, (row * r + column) as u64)).collect()).collect();
    orthonormalise(&mut rows);
    let half = r / 2;
    let mix = |of: u64, n: usize| -> Vec<Vec<f64>> {
        let key = random::key(&[key, of]);
        let rows_of = rows.iter().skip(of as usize - 2).step_by(2);
        let odd: Vec<&Vec<f64>> = rows_of.take(half).collect();
        let number = |row: usize, part: usize| random::normal(key, (row * half + part) as u64) / 10.0;
        let one = |row: usize| -> Vec<f64> {
            (0..r).map(|column| (0..half).map(|part| number(row, part) * odd[part][column]).sum()).collect()
        };
        (0..n).map(one).collect()
    };
    let (a, b) = (mix(2, features), mix(3, out));
    let transposed = (0..r).flat_map(|column| a.iter().map(move |row| row[column] as f32));
    [transposed.collect(), b.into_iter().flatten().map(|x| x as f32).collect()]
}

/// Returns OLoRA's `A [r, in]` and `B [out, r]`: the first rows of `R` and columns of `Q` of `weight = Q·R [out, in]`.
pub(super) fn olora_init<B: Backend>(weight: Tensor<B, 2>, r: usize) -> Factors<B> {
    // A detached leaf still requires a gradient.
    let weight = weight.detach().set_require_grad(false).cast(DType::F32);
    let ([out, _], device) = (weight.dims(), weight.device());
    let columns = weight.clone().slice(s![.., 0..r]).transpose().into_data();
    let columns: Vec<f64> = columns.iter::<f64>().collect();
    let mut q: Vec<Vec<f64>> = columns.chunks_exact(out).map(<[f64]>::to_vec).collect();
    orthonormalise(&mut q);
    let q = q.into_iter().flatten().map(|x| x as f32).collect::<Vec<_>>();
    let q = Tensor::<B, 2>::from_data(TensorData::new(q, [r, out]), (&device, DType::F32));
    Factors { a: q.clone().matmul(weight), b: q.transpose() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(values: &[f32]) -> (f64, f64) {
        let n = values.len() as f64;
        let mean = values.iter().map(|&x| x as f64).sum::<f64>() / n;
        (mean, (values.iter().map(|&x| (x as f64).powi(2)).sum::<f64>() / n).sqrt())
    }

    #[test]
    fn initial_values_have_the_statistics_of_peft() {
        let (out, features, r) = (300, 400, 8);
        let bound = 1.0 / (features as f64).sqrt();
        // Initialization and standard deviations of A and B; that of a uniform distribution is its bound / √3.
        for (init, a, b) in [
            (InitLoraWeights::True, bound / 3f64.sqrt(), 0.0),
            (InitLoraWeights::Gaussian, 1.0 / r as f64, 0.0),
            (InitLoraWeights::False, bound / 3f64.sqrt(), 1.0 / (r as f64).sqrt() / 3f64.sqrt()),
            (InitLoraWeights::Orthogonal, 0.1 * 0.5f64.sqrt(), 0.1 * 0.5f64.sqrt()),
        ] {
            let [found_a, found_b] = initial_values(&init, [out, features], r, 7);
            assert_eq!((found_a.len(), found_b.len()), (r * features, out * r));
            for (found, expected) in [(&found_a, a), (&found_b, b)] {
                let (mean, deviation) = moments(found);
                assert!(mean.abs() < 0.06 * expected.max(1e-9), "{init:?}: mean {mean}");
                assert!((deviation - expected).abs() <= 0.05 * expected, "{init:?}: {deviation} against {expected}");
            }
            assert_ne!(initial_values(&init, [out, features], r, 8)[0], found_a, "{init:?}: another key");
        }
    }

    #[test]
    fn orthogonal_init_changes_nothing() {
        let (out, features, r) = (20, 30, 6);
        let [a, b] = initial_values(&InitLoraWeights::Orthogonal, [out, features], r, 3);
        let product = |o: usize, i: usize| (0..r).map(|k| b[o * r + k] * a[k * features + i]).sum::<f32>();
        let largest = (0..out).flat_map(|o| (0..features).map(move |i| (o, i))).map(|(o, i)| product(o, i).abs());
        assert!(largest.fold(0.0, f32::max) < 1e-7);
    }
}
