//! Products of f32 matrices in host memory: the safe face of the `gemm` crate for kernels that work on Flex's buffers.

use gemm::Parallelism;

/// A matrix `[rows, columns]` in host memory, with any strides.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    values: &'a [f32],
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// Rows of `columns` values that start `stride` values apart.
    ///
    /// # Panics
    /// If `values` ends before the last row does.
    pub fn strided(values: &'a [f32], shape: [usize; 2], stride: usize) -> Self {
        assert!(reach(shape, stride) <= values.len(), "{shape:?} by {stride} does not fit {} values", values.len());
        Self { values, shape, strides: [stride, 1] }
    }

    /// Rows one after the other.
    ///
    /// # Panics
    /// If `values` holds fewer than `shape` asks for.
    pub fn new(values: &'a [f32], shape: [usize; 2]) -> Self {
        Self::strided(values, shape, shape[1])
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

/// `factor · a·b`, `[m, k]·[k, n]`, into `out`.
///
/// # Panics
/// If the inner sizes differ or `out` is too small.
pub fn product(out: Output<'_>, a: Matrix<'_>, b: Matrix<'_>, factor: f32, threads: Threads) {
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
