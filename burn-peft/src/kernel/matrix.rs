//! Products of matrices in host memory, for kernels that work on Flex's buffers: our own where the machine has vectors of 512 or
//! 256 bits that we know, else those of the `gemm` crate.

#[cfg(target_arch = "x86_64")]
mod x86;

use super::{Compute, scratch::with_scratch};
use burn::tensor::{bf16, f16};
use gemm::Parallelism;
use half::slice::HalfFloatSliceExt;

/// The values of a [`Matrix`].
#[derive(Debug, Clone, Copy)]
pub(crate) enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

/// A matrix `[rows, columns]` in host memory, with any strides.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    values: Values<'a>,
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// Rows of `columns` values that start `stride` values apart.
    ///
    /// # Panics
    /// If `values` ends before the last row does.
    pub fn strided(values: &'a [f32], shape: [usize; 2], stride: usize) -> Self {
        fits(values.len(), shape, stride);
        Self { values: Values::F32(values), shape, strides: [stride, 1] }
    }

    /// Rows one after the other.
    ///
    /// # Panics
    /// If `values` holds fewer than `shape` asks for.
    pub fn new(values: &'a [f32], shape: [usize; 2]) -> Self {
        Self::strided(values, shape, shape[1])
    }

    /// [`Matrix::new`] of bf16, which are widened where they are read. Where [`widens`] says no, that is a copy.
    ///
    /// # Panics
    /// As there.
    pub fn of_bf16(values: &'a [bf16], shape: [usize; 2]) -> Self {
        fits(values.len(), shape, shape[1]);
        Self { values: Values::Bf16(values), shape, strides: [shape[1], 1] }
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn rows(self, rows: std::ops::Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.shape[0], "{rows:?} of {} rows", self.shape[0]);
        let from = rows.start * self.strides[0];
        let values = match self.values {
            Values::F32(values) => Values::F32(values.get(from..).unwrap_or_default()),
            Values::Bf16(values) => Values::Bf16(values.get(from..).unwrap_or_default()),
        };
        Self { values, shape: [rows.len(), self.shape[1]], ..self }
    }

    /// `[rows, columns]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The same values as `[columns, rows]`.
    pub fn transposed(self) -> Self {
        let ([rows, columns], [down, right]) = (self.shape, self.strides);
        Self { shape: [columns, rows], strides: [right, down], ..self }
    }
}

fn fits(found: usize, shape: [usize; 2], stride: usize) {
    assert!(reach(shape, stride) <= found, "{shape:?} by {stride} does not fit {found} values");
}

/// The number of values that a matrix with unit column stride spans.
fn reach([rows, columns]: [usize; 2], stride: usize) -> usize {
    if rows == 0 || columns == 0 { 0 } else { (rows - 1) * stride + columns }
}

/// Where a product goes: rows of the product's width that start `stride` values apart.
#[derive(Debug)]
pub struct Output<'a> {
    /// The buffer.
    pub values: &'a mut [f32],
    /// From one row to the next, at least the product's width.
    pub stride: usize,
    /// Whether the product is added to what is there.
    pub add: bool,
}

/// Who works on a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread: the caller runs several products at once.
    One,
    /// The whole rayon pool, if the product is large enough to pay.
    All,
}

/// Whether this machine reads bf16 where they lie.
pub fn widens() -> bool {
    by_vectors()
}

/// Whether our own products serve.
fn by_vectors() -> bool {
    #[cfg(target_arch = "x86_64")]
    return x86::available();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `factor · a·b`, `[m, k]·[k, n]`, into `out`.
///
/// # Panics
/// If the inner sizes differ or `out` is too small.
pub fn product(out: Output<'_>, a: Matrix<'_>, b: Matrix<'_>, factor: f32, threads: Threads) {
    product_in(Compute::F32, out, a, b, factor, threads);
}

/// [`product`], computed as told.
///
/// # Panics
/// As there.
pub fn product_in(compute: Compute, out: Output<'_>, a: Matrix<'_>, b: Matrix<'_>, factor: f32, threads: Threads) {
    let ([m, k], [inner, n]) = (a.shape, b.shape);
    assert_eq!(k, inner, "[{m}, {k}]·[{inner}, {n}] is no product");
    assert!(out.stride >= n && reach([m, n], out.stride) <= out.values.len(), "the product [{m}, {n}] does not fit");
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        let rows = out.values.chunks_mut(out.stride).take(m).filter(|_| !out.add);
        return rows.for_each(|row| row[..n].fill(0.0));
    }
    #[cfg(target_arch = "x86_64")]
    if by_vectors() {
        // SAFETY: it is available; the constructors and the assertions above hold every index within its slice.
        return unsafe { x86::product(out, a, b, factor, (threads, compute)) };
    }
    match compute {
        Compute::F32 => plain(a, None, |a| plain(b, None, |b| by_gemm(out, a, b, factor, threads))),
        _ => plain(a, Some(compute), |a| {
            plain(b, Some(compute), |b| product(out, a.matrix(), b.matrix(), factor, threads));
        }),
    }
}

/// Runs `work` on the matrix in f32: itself, or a copy that is widened, or rounded to what products are computed in.
fn plain(matrix: Matrix<'_>, rounded: Option<Compute>, work: impl FnOnce(Plain<'_>)) {
    let Matrix { values, shape, strides } = matrix;
    let spanned = (shape[0] - 1) * strides[0] + (shape[1] - 1) * strides[1] + 1;
    if let (Values::F32(values), None) = (values, rounded) {
        return work(Plain { values, shape, strides });
    }
    with_scratch(spanned, |copy| {
        match values {
            Values::F32(values) => copy.copy_from_slice(&values[..spanned]),
            Values::Bf16(values) => values[..spanned].convert_to_f32_slice(copy),
        }
        match rounded {
            Some(Compute::F16) => {
                let mut halves = [f16::ZERO; 256];
                for part in copy.chunks_mut(halves.len()) {
                    let halves = &mut halves[..part.len()];
                    halves.convert_from_f32_slice(part);
                    halves.convert_to_f32_slice(part);
                }
            }
            Some(Compute::Bf16) => copy.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32()),
            Some(Compute::F32) | None => {}
        }
        work(Plain { values: copy, shape, strides });
    });
}

/// A [`Matrix`] of f32.
struct Plain<'a> {
    values: &'a [f32],
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a> Plain<'a> {
    fn matrix(self) -> Matrix<'a> {
        Matrix { values: Values::F32(self.values), shape: self.shape, strides: self.strides }
    }
}

fn by_gemm(out: Output<'_>, a: Plain<'_>, b: Plain<'_>, factor: f32, threads: Threads) {
    let ([m, k], n) = (a.shape, b.shape[1]);
    let parallelism = match threads {
        Threads::All if m * n * k >= 1 << 21 => Parallelism::Rayon(0),
        _ => Parallelism::None,
    };
    // SAFETY: the constructors and the assertions above hold every index within its slice.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.values.as_mut_ptr(),
            1,
            out.stride as isize,
            out.add,
            a.values.as_ptr(),
            a.strides[1] as isize,
            a.strides[0] as isize,
            b.values.as_ptr(),
            b.strides[1] as isize,
            b.strides[0] as isize,
            1.0,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests;
