//! Matrix products (GEMM) in host memory, for kernels that work on Flex's buffers: our own micro-kernels on x86-64
//! machines with AVX2 or AVX-512, elsewhere the `gemm` crate.

#[cfg(target_arch = "x86_64")]
mod x86;

use crate::{MatmulPrecision, scratch::with_scratch};
use burn::tensor::{bf16, f16};
use gemm::Parallelism;
use half::slice::HalfFloatSliceExt;

/// The elements of a [`Matrix`].
#[derive(Debug, Clone, Copy)]
pub(crate) enum MatrixData<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

/// A view of a matrix `[rows, columns]` in host memory, with arbitrary strides.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    values: MatrixData<'a>,
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// Creates a view of rows of `columns` values that start `stride` values apart.
    ///
    /// # Panics
    /// If `values` ends before the last row does.
    pub fn strided(values: &'a [f32], shape: [usize; 2], stride: usize) -> Self {
        assert_fits(values.len(), shape, stride);
        Self { values: MatrixData::F32(values), shape, strides: [stride, 1] }
    }

    /// Creates a view of contiguous rows.
    ///
    /// # Panics
    /// If `values` holds fewer values than `shape` requires.
    pub fn new(values: &'a [f32], shape: [usize; 2]) -> Self {
        Self::strided(values, shape, shape[1])
    }

    /// Creates a view of contiguous rows of bf16. Kernels convert them to f32 as they read them if [`reads_bf16`]
    /// returns true, else they convert a copy.
    ///
    /// # Panics
    /// If `values` holds fewer values than `shape` requires.
    pub fn from_bf16(values: &'a [bf16], shape: [usize; 2]) -> Self {
        assert_fits(values.len(), shape, shape[1]);
        Self { values: MatrixData::Bf16(values), shape, strides: [shape[1], 1] }
    }

    /// Returns the view of a range of rows.
    ///
    /// # Panics
    /// If the range ends beyond the last row.
    pub fn rows(self, rows: std::ops::Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.shape[0], "{rows:?} of {} rows", self.shape[0]);
        let from = rows.start * self.strides[0];
        let values = match self.values {
            MatrixData::F32(values) => MatrixData::F32(values.get(from..).unwrap_or_default()),
            MatrixData::Bf16(values) => MatrixData::Bf16(values.get(from..).unwrap_or_default()),
        };
        Self { values, shape: [rows.len(), self.shape[1]], ..self }
    }

    /// Returns `[rows, columns]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Returns the transposed view, `[columns, rows]`.
    pub fn transposed(self) -> Self {
        let ([rows, columns], [down, right]) = (self.shape, self.strides);
        Self { shape: [columns, rows], strides: [right, down], ..self }
    }
}

fn assert_fits(found: usize, shape: [usize; 2], stride: usize) {
    assert!(span(shape, stride) <= found, "{shape:?} with row stride {stride} exceeds {found} values");
}

/// Returns the number of values that a matrix with unit column stride spans.
fn span([rows, columns]: [usize; 2], stride: usize) -> usize {
    if rows == 0 || columns == 0 { 0 } else { (rows - 1) * stride + columns }
}

/// Destination of a product `[m, n]`: `m` rows of `n` values, which start `stride` values apart.
#[derive(Debug)]
pub struct GemmOutput<'a> {
    /// The buffer of the rows.
    pub values: &'a mut [f32],
    /// The number of values from one row to the next (the leading dimension), at least `n`.
    pub stride: usize,
    /// If true, the product is added to the values in the buffer; otherwise it overwrites them.
    pub accumulate: bool,
}

/// The threads that compute a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread alone, for callers that run several products in parallel.
    One,
    /// The whole rayon pool, if the product is large enough to be worth it.
    All,
}

/// How a product is computed.
#[derive(Debug, Clone, Copy)]
pub struct GemmOptions {
    /// The precision to which the factors are rounded.
    pub precision: MatmulPrecision,
    /// The factor of the product.
    pub alpha: f32,
    /// The threads that compute it.
    pub threads: Threads,
}

impl GemmOptions {
    /// Creates the options of a product without a factor, on all threads.
    #[inline]
    pub fn new(precision: MatmulPrecision) -> Self {
        Self { precision, alpha: 1.0, threads: Threads::All }
    }
}

/// Returns true if the kernels of this machine read bf16 operands in place.
pub fn reads_bf16() -> bool {
    has_simd_gemm()
}

/// Returns true if this machine can run our own micro-kernels.
fn has_simd_gemm() -> bool {
    #[cfg(target_arch = "x86_64")]
    return x86::available();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Computes `alpha · a·b`, `[m, k]·[k, n]`, in f32 and writes or adds it to `out`.
///
/// # Panics
/// If the inner dimensions differ or `out` is too small.
pub fn sgemm(out: GemmOutput<'_>, a: Matrix<'_>, b: Matrix<'_>, alpha: f32, threads: Threads) {
    gemm(out, a, b, GemmOptions { precision: MatmulPrecision::F32, alpha, threads });
}

/// Computes `alpha · a·b` as [`sgemm`] does, with the factors rounded to the precision of the options.
///
/// # Panics
/// If the inner dimensions differ or `out` is too small.
pub fn gemm(out: GemmOutput<'_>, a: Matrix<'_>, b: Matrix<'_>, options: GemmOptions) {
    let ([m, k], [inner, n]) = (a.shape, b.shape);
    assert_eq!(k, inner, "the inner dimensions of [{m}, {k}]·[{inner}, {n}] differ");
    assert!(out.stride >= n && span([m, n], out.stride) <= out.values.len(), "the output cannot hold [{m}, {n}]");
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        let rows = out.values.chunks_mut(out.stride).take(m).filter(|_| !out.accumulate);
        return rows.for_each(|row| row[..n].fill(0.0));
    }
    #[cfg(target_arch = "x86_64")]
    if has_simd_gemm() {
        // SAFETY: `has_simd_gemm` has checked the CPU features; the constructors of `Matrix` and the assertions above
        // keep every index of the shapes and strides within its slice.
        return unsafe { x86::gemm(out, a, b, options) };
    }
    let GemmOptions { precision, alpha, threads } = options;
    match precision {
        MatmulPrecision::F32 => with_f32(a, None, |a| with_f32(b, None, |b| gemm_crate(out, a, b, alpha, threads))),
        _ => with_f32(a, Some(precision), |a| {
            with_f32(b, Some(precision), |b| sgemm(out, a.into_matrix(), b.into_matrix(), alpha, threads));
        }),
    }
}

/// Calls `work` with the matrix in f32: the matrix itself, or a copy converted to f32 or rounded to `rounded`.
fn with_f32(matrix: Matrix<'_>, rounded: Option<MatmulPrecision>, work: impl FnOnce(F32Matrix<'_>)) {
    let Matrix { values, shape, strides } = matrix;
    let spanned = (shape[0] - 1) * strides[0] + (shape[1] - 1) * strides[1] + 1;
    if let (MatrixData::F32(values), None) = (values, rounded) {
        return work(F32Matrix { values, shape, strides });
    }
    with_scratch(spanned, |copy| {
        match values {
            MatrixData::F32(values) => copy.copy_from_slice(&values[..spanned]),
            MatrixData::Bf16(values) => values[..spanned].convert_to_f32_slice(copy),
        }
        match rounded {
            Some(MatmulPrecision::F16) => {
                let mut halves = [f16::ZERO; 256];
                for part in copy.chunks_mut(halves.len()) {
                    let halves = &mut halves[..part.len()];
                    halves.convert_from_f32_slice(part);
                    halves.convert_to_f32_slice(part);
                }
            }
            Some(MatmulPrecision::Bf16) => copy.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32()),
            Some(MatmulPrecision::F32) | None => {}
        }
        work(F32Matrix { values: copy, shape, strides });
    });
}

/// A view of an f32 matrix with arbitrary strides.
struct F32Matrix<'a> {
    values: &'a [f32],
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a> F32Matrix<'a> {
    fn into_matrix(self) -> Matrix<'a> {
        Matrix { values: MatrixData::F32(self.values), shape: self.shape, strides: self.strides }
    }
}

fn gemm_crate(out: GemmOutput<'_>, a: F32Matrix<'_>, b: F32Matrix<'_>, alpha: f32, threads: Threads) {
    let ([m, k], n) = (a.shape, b.shape[1]);
    let parallelism = match threads {
        Threads::All if m * n * k >= 1 << 21 => Parallelism::Rayon(0),
        _ => Parallelism::None,
    };
    // SAFETY: the constructors of `Matrix` and the assertions of the caller keep every index of the shapes and strides
    // within its slice, and `out` is borrowed mutably.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.values.as_mut_ptr(),
            1,
            out.stride as isize,
            out.accumulate,
            a.values.as_ptr(),
            a.strides[1] as isize,
            a.strides[0] as isize,
            b.values.as_ptr(),
            b.strides[1] as isize,
            b.strides[0] as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests;
