//! The truncated SVD of a matrix, by subspace iteration (Halko, Martinsson and Tropp, 2011, arXiv:0909.4061).

use super::linalg::{Factors, dot, orthonormalise};
use crate::random;
use burn::tensor::{DType, Tensor, TensorData, backend::Backend};

/// The maximum number of iterations until convergence.
const MAX_ITERATIONS: usize = 100;

/// Computes `A [r, in]` and `B [out, r]` whose product is the best approximation of `weight [out, in]` of rank `r`;
/// each holds the square roots of the singular values. Runs `niter` iterations, or until the singular values converge.
pub(crate) fn low_rank_decomposition<B: Backend>(
    weight: Tensor<B, 2>,
    r: usize,
    niter: Option<usize>,
    key: u64,
) -> Factors<B> {
    let weight = weight.detach().cast(DType::F32);
    let device = weight.device();
    let Subspace { left, small, eigen: Eigen { values, vectors } } = iterate(&weight, r, niter, key);
    let (k, out, features) = (small.len(), left[0].len(), small[0].len());
    let (mut a, mut b) = (Vec::new(), vec![vec![0.0; r]; out]);
    for index in 0..r {
        // This combination of the rows of the small matrix is the singular value times the right singular vector.
        let mix = |rows: &[Vec<f64>], n: usize| -> Vec<f64> {
            (0..n).map(|j| (0..k).map(|i| vectors[i][index] * rows[i][j]).sum()).collect()
        };
        let value = values[index].max(0.0).sqrt();
        let scale = if value > 0.0 { 1.0 / value.sqrt() } else { 0.0 };
        a.push(mix(&small, features).into_iter().map(|x| x * scale).collect::<Vec<f64>>());
        let column = mix(&left, out);
        b.iter_mut().zip(column).for_each(|(row, x)| row[index] = x * value.sqrt());
    }
    Factors { a: tensor(&a, &device), b: tensor(&b, &device) }
}

/// The result of the subspace iteration.
struct Subspace {
    /// Orthonormal directions of outputs, `[k, out]`.
    left: Vec<Vec<f64>>,
    /// The weight in these directions, `[k, in]`.
    small: Vec<Vec<f64>>,
    /// The eigenvalues and eigenvectors of `small·smallᵀ`.
    eigen: Eigen,
}

/// Runs the subspace iteration on `weight [out, in]` with `k` directions, a few more than the rank `r`.
fn iterate<B: Backend>(weight: &Tensor<B, 2>, r: usize, niter: Option<usize>, key: u64) -> Subspace {
    let ([out, features], device) = (weight.dims(), weight.device());
    // Oversampling: with more directions than requested, the requested ones converge sooner.
    let k = (r + r.max(16)).min(out).min(features);
    let mut right: Vec<Vec<f64>> =
        (0..k).map(|i| (0..features).map(|j| random::normal(key, (i * features + j) as u64)).collect()).collect();
    orthonormalise(&mut right);
    let (mut before, mut iteration, mut end) = (f64::INFINITY, 0, niter.map_or(MAX_ITERATIONS, |n| n + 1));
    loop {
        let mut left = rows(tensor(&right, &device).matmul(weight.clone().transpose()));
        orthonormalise(&mut left);
        let small = rows(tensor(&left, &device).matmul(weight.clone()));
        iteration += 1;
        if niter.is_none() || iteration == end {
            let eigen = eigen(&small);
            let now: f64 = eigen.values[..r].iter().sum();
            if niter.is_none() && (now - before).abs() <= 1e-9 * now {
                // The sum converges long before the directions do: their error is the square root of its error, so they
                // need as many iterations again.
                end = end.min(2 * iteration);
            }
            before = now;
            if iteration == end {
                return Subspace { left, small, eigen };
            }
        }
        right = small;
        orthonormalise(&mut right);
    }
}

fn tensor<B: Backend>(rows: &[Vec<f64>], device: &B::Device) -> Tensor<B, 2> {
    let values = rows.iter().flatten().map(|&x| x as f32).collect::<Vec<_>>();
    Tensor::from_data(TensorData::new(values, [rows.len(), rows[0].len()]), (device, DType::F32))
}

fn rows<B: Backend>(x: Tensor<B, 2>) -> Vec<Vec<f64>> {
    let columns = x.dims()[1];
    let values: Vec<f64> = x.into_data().iter::<f64>().collect();
    values.chunks_exact(columns).map(<[f64]>::to_vec).collect()
}

/// Eigenvalues, largest first, and the eigenvectors as columns.
struct Eigen {
    values: Vec<f64>,
    vectors: Vec<Vec<f64>>,
}

/// Computes the eigenvalues and eigenvectors of `M·Mᵀ` by Jacobi rotations.
fn eigen(m: &[Vec<f64>]) -> Eigen {
    let k = m.len();
    let mut s: Vec<Vec<f64>> = m.iter().map(|row| m.iter().map(|other| dot(row, other)).collect()).collect();
    let mut v: Vec<Vec<f64>> = (0..k).map(|i| (0..k).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    let total: f64 = s.iter().flatten().map(|x| x * x).sum();
    for _ in 0..60 {
        let off: f64 = (0..k).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| s[i][j] * s[i][j]).sum();
        if off <= 1e-26 * total {
            break;
        }
        for p in 0..k {
            for q in p + 1..k {
                rotate(&mut s, &mut v, p, q);
            }
        }
    }
    let mut order: Vec<usize> = (0..k).collect();
    order.sort_by(|&i, &j| s[j][j].total_cmp(&s[i][i]));
    let vectors = v.iter().map(|row| order.iter().map(|&i| row[i]).collect()).collect();
    Eigen { values: order.iter().map(|&i| s[i][i]).collect(), vectors }
}

/// Applies the Jacobi rotation that makes `s[p][q]` zero, and accumulates it in `v`.
fn rotate(s: &mut [Vec<f64>], v: &mut [Vec<f64>], p: usize, q: usize) {
    if s[p][q] == 0.0 {
        return;
    }
    let theta = (s[q][q] - s[p][p]) / (2.0 * s[p][q]);
    let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
    let t = if theta == 0.0 { 1.0 } else { t };
    let cos = 1.0 / (t * t + 1.0).sqrt();
    let sin = t * cos;
    let turn = |row: &mut Vec<f64>| (row[p], row[q]) = (cos * row[p] - sin * row[q], sin * row[p] + cos * row[q]);
    s.iter_mut().for_each(turn);
    v.iter_mut().for_each(turn);
    let (before, rest) = s.split_at_mut(q);
    for (x, y) in before[p].iter_mut().zip(&mut rest[0]) {
        (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use burn::{backend::Flex, tensor::s};

    #[test]
    fn the_principal_part_leaves_the_rest_orthogonal_to_it() {
        let (device, r) = (Default::default(), 5);
        let values: Vec<f32> = (0..60 * 90).map(|i| random::normal(1, i) as f32).collect();
        let weight = Tensor::<Flex, 2>::from_data(TensorData::new(values, [60, 90]), (&device, DType::F32));
        let Factors { a, b } = low_rank_decomposition(weight.clone(), r, None, 3);
        let rest = weight - b.clone().matmul(a.clone());
        let largest = |x: Tensor<Flex, 2>| x.abs().max().into_scalar();
        // The residual is orthogonal to the singular vectors on both sides.
        assert!(largest(rest.clone().matmul(a.clone().transpose())) < 1e-3);
        assert!(largest(b.clone().transpose().matmul(rest)) < 1e-3);
        let gram = a.clone().matmul(a.transpose());
        let other = b.clone().transpose().matmul(b);
        // The Gram matrices of both factors have the singular values on their diagonals, in order.
        assert!(largest(gram.clone() - other) < 1e-3);
        let diagonal: Vec<f32> = (0..r).map(|i| gram.clone().slice(s![i..i + 1, i..i + 1]).into_scalar()).collect();
        assert!(diagonal.windows(2).all(|pair| pair[0] >= pair[1]), "{diagonal:?}");
        assert!(largest(gram.clone()) - diagonal[0] < 1e-3);
    }
}
