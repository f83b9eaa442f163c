//! Choice of the SIMD instruction set: the widest that the machine has, or a narrower one that the environment sets;
//! and loops compiled for it.

use std::sync::OnceLock;

/// The environment variable that limits the instruction set: `scalar`, `avx2`, `avx512` or `amx`.
const MAX_ISA_VARIABLE: &str = "BURN_PEFT_MAX_ISA";

/// Instruction sets of x86, each of which includes those before it. Other architectures have no such choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum InstructionSet {
    /// The compiler's default for the target.
    Scalar,
    /// Vectors of 256 bits.
    Avx2,
    /// Vectors of 512 bits, with products of bf16 and of bytes where the machine has them.
    Avx512,
    /// Tiles of bf16 (AMX), which also multiply f32 split into three bf16 terms.
    Amx,
}

/// Returns the widest instruction set that the kernels may use. Instructions that the machine lacks are not used in any
/// case.
pub(crate) fn max_instruction_set() -> InstructionSet {
    static ALLOWED: OnceLock<InstructionSet> = OnceLock::new();
    *ALLOWED.get_or_init(|| match std::env::var(MAX_ISA_VARIABLE).as_deref() {
        Err(_) | Ok("" | "amx") => InstructionSet::Amx,
        Ok("avx512") => InstructionSet::Avx512,
        Ok("avx2") => InstructionSet::Avx2,
        Ok("scalar") => InstructionSet::Scalar,
        Ok(other) => {
            eprintln!(
                "{MAX_ISA_VARIABLE}={other}: expected scalar, avx2, avx512 or amx; the instruction set is not limited"
            );
            InstructionSet::Amx
        }
    })
}

/// Returns true if the machine has, and may use, the 256-bit instructions of our kernels: AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx2() -> bool {
    max_instruction_set() >= InstructionSet::Avx2
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Returns true if the machine has, and may use, the 512-bit instructions that all our kernels need: AVX-512F, BW and
/// VL.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx512() -> bool {
    max_instruction_set() >= InstructionSet::Avx512
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
}

/// Returns the instruction set for which `pulp` compiles generic loops.
#[inline]
fn simd_arch() -> pulp::Arch {
    static VECTORS: OnceLock<pulp::Arch> = OnceLock::new();
    *VECTORS.get_or_init(|| match max_instruction_set() {
        InstructionSet::Scalar => pulp::Arch::Scalar,
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx2 => pulp::x86::V3::try_new().map_or(pulp::Arch::Scalar, pulp::Arch::V3),
        _ => pulp::Arch::new(),
    })
}

/// Runs `work` compiled for the widest SIMD instructions that it may use on this machine. Only functions that are
/// `#[inline(always)]` are compiled for them along with `work`.
#[inline(always)]
pub fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    simd_arch().dispatch(work)
}

/// Runs `work`, which is generic over the vector type, with the widest vectors that it may use on this machine.
#[inline(always)]
pub fn dispatch_simd<W: pulp::WithSimd>(work: W) -> W::Output {
    simd_arch().dispatch(work)
}
