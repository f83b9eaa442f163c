//! Operations on registers of 512 bits.

use std::arch::x86_64::*;

/// Returns the mask of the first `n` of 16 lanes.
#[inline(always)]
pub(in super::super) fn lane_mask(n: usize) -> __mmask16 {
    if n >= 16 { !0 } else { (1 << n) - 1 }
}

/// Transposes 16 rows of 16 words.
///
/// # Safety
/// The CPU has AVX-512F.
#[inline(always)]
pub(in super::super) unsafe fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    // SAFETY: the intrinsics only work on registers, and the CPU has AVX-512F by the caller's guarantee.
    unsafe {
        let mut pairs = rows;
        for i in (0..16).step_by(2) {
            pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        // Lane l of register 4·g + c holds column 4·l + c of the rows 4·g to 4·g + 3.
        let mut fours = rows;
        for i in (0..16).step_by(4) {
            fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
            fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
            fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
            fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
        }
        let mut columns = rows;
        for c in 0..4 {
            let [a, b, c2, d] = [fours[c], fours[4 + c], fours[8 + c], fours[12 + c]];
            let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
            let (even2, odd2) = (_mm512_shuffle_i32x4::<0x88>(c2, d), _mm512_shuffle_i32x4::<0xdd>(c2, d));
            columns[c] = _mm512_shuffle_i32x4::<0x88>(even, even2);
            columns[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd, odd2);
            columns[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even, even2);
            columns[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd, odd2);
        }
        columns
    }
}
