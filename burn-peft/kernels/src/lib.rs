//! Matrix products of linear layers for [Burn](burn)'s backends, with weights as they are stored: in f32, f16 or bf16,
//! or packed as GGUF blocks or NF4.
//!
//! ```text
//!   x [tokens, in]     weight [out, in]: dense (f32, f16, bf16) or packed (GGUF blocks, NF4)
//!         └─────────┬─────────┘
//!             LinearKernels     y = x·Wᵀ,  dx = dy·W,  dW = dyᵀ·x
//!         ┌─────────┴─────────┐
//!    Flex (CPU)        other backends
//!         │                   └─ tensor operations; packed rows are decoded tile by tile
//!         ├─ up to 8 tokens: gemv on the rows as they are stored
//!         └─ more tokens:    gemm on the rows in place, or on tiles of decoded rows
//! ```
//!
//! The key design decision: a weight is never copied to another type as a whole. A kernel reads it as it is stored, or
//! decodes a few rows at a time into memory that it reuses, so a packed weight needs no more memory than its file.
//!
//! ```
//! use burn::{backend::Flex, tensor::{Distribution, Tensor}};
//! use burn_peft_kernels::{MatmulPrecision, PackedWeight, linear};
//!
//! let device = Default::default();
//! let values: Vec<f32> = (0..2 * 64).map(|i| i as f32 / 64.0 - 1.0).collect();
//! let packed = PackedWeight::<Flex>::nf4(&values, 64, &device).expect("all values are finite");
//! let x = Tensor::<Flex, 2>::random([3, 64], Distribution::Default, &device);
//! let y = packed.linear(x.clone(), MatmulPrecision::F32);
//! assert_eq!(y.dims(), [3, 2]);
//! // The product with the decoded weight, up to the rounding of the sums.
//! let decoded = linear(x, packed.values(), MatmulPrecision::F32);
//! assert!((y - decoded).abs().max().into_scalar() < 1e-3);
//! ```
//!
//! Where to look: [`LinearKernels`] is the extension trait of the backends, and its implementation for
//! [`Autodiff`](burn::backend::Autodiff) the backward pass. [`packed`] holds the formats of packed rows. [`gemm`] and
//! [`gemv`] work on slices in host memory, for other kernels of the Flex backend; [`scratch`] and [`instructions`] are
//! the memory and the instruction sets that they use. The environment variable `BURN_PEFT_MAX_ISA` limits the
//! instruction set to `scalar`, `avx2`, `avx512` or `amx`.
#![deny(missing_docs)]
#![recursion_limit = "256"]

#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "flex")]
pub mod gemm;
#[cfg(feature = "flex")]
pub mod gemv;
#[cfg(feature = "flex")]
pub mod instructions;
mod linear_kernels;
pub mod packed;
mod precision;
#[cfg(feature = "flex")]
pub mod scratch;
#[cfg(all(test, feature = "flex"))]
mod test_random;
#[cfg(feature = "flex")]
mod weight_rows;

pub use linear_kernels::{
    DeferredWeightGradient, LinearKernels, WeightMatrix, add, defer_weight_gradients, linear, linear_param, matmul,
    take_accumulated_gradient,
};
pub use packed::{BlockType, Codec, PackedWeight};
pub use precision::MatmulPrecision;
