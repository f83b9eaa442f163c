//! Which vector instructions the kernels use: the widest that the machine has, or fewer where the environment says so.

use std::sync::OnceLock;

/// The environment variable that holds the kernels back: `scalar`, `avx2`, `avx512` or `amx`.
const LIMIT: &str = "BURN_PEFT_MAX_ISA";

/// Sets of x86's instructions, each with all that come before it. Other processors have no such choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Instructions {
    /// None but the compiler's own.
    Scalar,
    /// Vectors of 256 bits.
    Avx2,
    /// Vectors of 512 bits, with products of bf16 and of bytes where the machine has them.
    Avx512,
    /// Tiles of bf16, which multiply f32 too, as three bf16 each.
    Amx,
}

/// The most that the kernels may use. What the machine lacks they do not use either way.
pub fn allowed() -> Instructions {
    static ALLOWED: OnceLock<Instructions> = OnceLock::new();
    *ALLOWED.get_or_init(|| match std::env::var(LIMIT).as_deref() {
        Err(_) | Ok("" | "amx") => Instructions::Amx,
        Ok("avx512") => Instructions::Avx512,
        Ok("avx2") => Instructions::Avx2,
        Ok("scalar") => Instructions::Scalar,
        Ok(other) => {
            eprintln!("{LIMIT}={other}: expected scalar, avx2, avx512 or amx; nothing is held back");
            Instructions::Amx
        }
    })
}

/// Whether there are vectors of 256 bits with all that our own products take.
#[cfg(target_arch = "x86_64")]
pub(super) fn is_narrow() -> bool {
    allowed() >= Instructions::Avx2
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// What loops are compiled for.
#[inline]
pub(super) fn vectors() -> pulp::Arch {
    static VECTORS: OnceLock<pulp::Arch> = OnceLock::new();
    *VECTORS.get_or_init(|| match allowed() {
        Instructions::Scalar => pulp::Arch::Scalar,
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => pulp::x86::V3::try_new().map_or(pulp::Arch::Scalar, pulp::Arch::V3),
        _ => pulp::Arch::new(),
    })
}
