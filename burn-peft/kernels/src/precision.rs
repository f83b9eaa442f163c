//! Numeric formats of the factors of a matrix product.

/// Numeric format of the factors of a matrix product. Accumulators and results are f32 in every case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MatmulPrecision {
    /// The factors are f32.
    #[default]
    F32,
    /// Both factors are rounded to bf16.
    Bf16,
    /// Both factors are rounded to f16. Values beyond its range become infinite, so training needs a loss scale.
    F16,
}
