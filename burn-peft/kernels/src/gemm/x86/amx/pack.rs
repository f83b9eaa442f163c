//! Packing of A for AMX as pairs of bf16.

use super::{
    super::avx512::{gather_words, pack_a_bf16, transpose},
    MicroPanelA, Operand,
};
use std::{arch::x86_64::*, ops::Range};

/// Packs rows as pairs of bf16: the words of a row are adjacent.
///
/// # Safety
/// The conditions of [`MicroKernel::pack_a`](super::MicroKernel::pack_a) hold for [`AmxBf16`](super::AmxBf16),
/// `IS_BF16` is true exactly if A is bf16, and the CPU has AVX-512F, BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn pack_a<const IS_BF16: bool>(
    operand: &Operand,
    rows: Range<usize>,
    k: Range<usize>,
    to: *mut u32,
) -> MicroPanelA {
    // SAFETY: `first` and `count` lie within `rows`, `gather_words` returns zeros beyond the range, and `to` has room
    // for up to [`MR`](super::MR) rows of `depth` words by the caller's guarantee.
    unsafe {
        if operand.strides[1] == 1 {
            return pack_a_bf16::<IS_BF16>(operand, rows, k, to);
        }
        let words = k.len().div_ceil(2);
        let depth = words.next_multiple_of(16);
        for (row, first) in rows.clone().step_by(16).enumerate() {
            let count = (rows.end - first).min(16);
            for word in (0..words).step_by(16) {
                let mut columns = [_mm512_setzero_si512(); 16];
                for (index, column) in columns.iter_mut().enumerate() {
                    *column = gather_words::<IS_BF16, true>(
                        operand,
                        first..first + count,
                        k.start + 2 * (word + index)..k.end,
                    );
                }
                for (index, words) in transpose(columns).into_iter().take(count).enumerate() {
                    _mm512_storeu_si512(to.add((16 * row + index) * depth + word).cast(), words);
                }
            }
        }
        MicroPanelA::new(to, [depth, 1])
    }
}
