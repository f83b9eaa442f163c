//! GEMM for x86-64 in the structure of GotoBLAS and BLIS. The micro-kernels ([`MicroKernel`]) use AVX-512, on f32 or on
//! pairs of bf16 whose products are accumulated in f32; AMX tiles on such pairs where the machine has them, with f32
//! split into three bf16 terms (bf16x3); and AVX2 for everything else.
//!
//! The operands have the roles of BLIS: a row of NR elements of B fills two vector registers, and elements of A are
//! broadcast and multiplied with them. Either matrix can take either role (if they are swapped, the kernel computes the
//! transpose of C); the cheaper assignment is chosen. Micro-panels of B are packed by the thread that uses them and
//! stay in its L2 cache; A is read in place unless its type must change. A *word* is the content of a 32-bit lane: an
//! f32, or two bf16 that are adjacent along k.
//!
//! Every element is accumulated in the order of k, independent of the number of threads. It is also independent of the
//! shape of the product, with one exception: f32 products with few rows or columns use AVX-512 where larger ones use
//! AMX tiles.

mod amx;
mod avx2;
mod avx512;
mod micro_kernel;
mod operands;
mod problem;

use super::{GemmOptions, GemmOutput, Matrix};
use crate::{
    MatmulPrecision,
    instructions::{InstructionSet, has_avx2, has_avx512, max_instruction_set},
};
use amx::{AmxBf16, AmxF32x3};
use avx2::Avx2;
use avx512::{Avx512Bf16, Avx512F32};
use micro_kernel::MicroKernel;
use operands::{Operand, StridedOutput};
use problem::GemmProblem;

/// Products with fewer rows or columns are not worth splitting operands into bf16x3 terms.
const MIN_SIZE_BF16X3: usize = 96;

/// Returns true if this machine can run these micro-kernels.
pub(super) fn available() -> bool {
    has_avx2()
}

fn has_amx() -> bool {
    max_instruction_set() >= InstructionSet::Amx && amx::available()
}

/// Returns true if an f32 product `[m, k]·[k, n]` uses AMX tiles with operands split into three bf16 terms.
pub(super) fn uses_bf16x3([m, n, k]: [usize; 3]) -> bool {
    has_amx() && m.min(n) >= MIN_SIZE_BF16X3 && k >= 2 * amx::TILE_K
}

/// Computes `alpha · a·b` into `out` with the micro-kernel that suits the machine, the precision and the shape.
///
/// # Safety
/// [`available`] returns true, the shapes match, and every index of the shapes and strides lies within its slice.
pub(super) unsafe fn gemm(out: GemmOutput<'_>, a: Matrix<'_>, b: Matrix<'_>, options: GemmOptions) {
    let shape = [a.shape[0], b.shape[1], a.shape[1]];
    // SAFETY: each arm has checked that the machine has the instructions; the other conditions are the caller's.
    unsafe {
        match options.precision {
            MatmulPrecision::F32 if uses_bf16x3(shape) => gemm_with(AmxF32x3, out, a, b, options),
            MatmulPrecision::Bf16 if has_amx() => gemm_with(AmxBf16, out, a, b, options),
            MatmulPrecision::Bf16 if has_avx512() && is_x86_feature_detected!("avx512bf16") => {
                gemm_with(Avx512Bf16, out, a, b, options);
            }
            MatmulPrecision::F32 if has_avx512() => gemm_with(Avx512F32, out, a, b, options),
            precision => gemm_with(Avx2 { precision }, out, a, b, options),
        }
    }
}

/// Computes `alpha · a·b` into `out` with a micro-kernel.
///
/// # Safety
/// The conditions of [`gemm`] hold, and the CPU has the instructions of the micro-kernel.
unsafe fn gemm_with<K: MicroKernel>(
    kernel: K,
    out: GemmOutput<'_>,
    a: Matrix<'_>,
    b: Matrix<'_>,
    options: GemmOptions,
) {
    let k = a.shape[1];
    let [a, b] = [a, b.transposed()].map(|matrix| Operand::new(matrix, K::F32_TERMS));
    let c = StridedOutput {
        data: out.values.as_mut_ptr(),
        strides: [out.stride, 1],
        accumulate: out.accumulate,
        alpha: options.alpha,
    };
    // SAFETY: the conditions are the caller's, and `out` is borrowed mutably.
    unsafe { GemmProblem::new(kernel, a, b, k, c).compute(options.threads) }
}
