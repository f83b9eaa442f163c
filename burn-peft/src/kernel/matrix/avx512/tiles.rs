//! Sums by tile registers (AMX): 32 rows of the broadcast side meet a panel of the vector side, 16 words deep at a time.
//!
//! A word of the left tile is a pair of bf16 of one row, a word of the right tile the pair of one column: the order in which
//! panels and staged rows lie. The instructions are assembly, for want of stable intrinsics.

use super::{
    WIDTH,
    micro::{Left, Right},
};
use std::{arch::asm, marker::PhantomData, mem::MaybeUninit, sync::OnceLock};

/// Rows of the broadcast side that meet a panel: two tiles.
pub(super) const ROWS: usize = 32;
/// Words of depth that a tile holds.
pub(super) const WORDS: usize = 16;
/// Bytes from one row of a panel, or of the sums, to the next.
const LINE: usize = WIDTH * 4;

/// Whether this machine has tiles and the system lends them, which it is asked for once.
pub(super) fn available() -> bool {
    static LENT: OnceLock<bool> = OnceLock::new();
    *LENT.get_or_init(|| has_tiles() && lends_tiles())
}

fn has_tiles() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    let last = std::arch::x86_64::__cpuid(0).eax;
    last >= 7 && std::arch::x86_64::__cpuid_count(7, 0).edx & (BF16 | TILE) == BF16 | TILE
}

#[cfg(target_os = "linux")]
fn lends_tiles() -> bool {
    // Linux's arch_prctl(2): a process may use tile data when it has asked for it.
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and changes nothing but what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn lends_tiles() -> bool {
    false
}

/// The layout of the tile registers, as the processor reads it: eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Layout {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The tile registers of this thread, until it is dropped.
pub(super) struct Tiles(PhantomData<*const ()>);

impl Tiles {
    /// Takes them.
    ///
    /// # Safety
    /// They are [`available`], and nobody on this thread holds them.
    pub(super) unsafe fn take() -> Self {
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        row_bytes[..8].fill(64);
        rows[..8].fill(16);
        let layout = Layout { palette: 1, start: 0, reserved: [0; 14], row_bytes, rows };
        // SAFETY: by the caller; this is a layout of palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &layout, options(nostack, readonly, preserves_flags)) };
        Self(PhantomData)
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: this thread has them.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// Sums of [`ROWS`] rows with the columns of a panel.
#[repr(C, align(64))]
pub(super) struct Sums(MaybeUninit<[f32; ROWS * WIDTH]>);

impl Sums {
    /// The products of staged rows with a packed panel, so many words deep.
    ///
    /// # Safety
    /// This thread holds [`Tiles`]; `left` is [`ROWS`] rows whose words lie side by side, those that are not there of any
    /// value, and `right` a packed panel, both zero from `words` on to the next multiple of [`WORDS`].
    #[inline]
    pub(super) unsafe fn new(words: usize, left: Left, right: Right) -> Self {
        let mut sums = Self(MaybeUninit::uninit());
        let upper = left.words.wrapping_add(16 * left.strides[0]);
        // SAFETY: by the caller; the sums have room for four tiles.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm6, [{right} + {line}]",
                "tileloadd tmm4, [{lower} + {down}]",
                "tileloadd tmm7, [{right} + {line} + 64]",
                "tileloadd tmm5, [{upper} + {down}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {lower}, 64",
                "add {upper}, 64",
                "add {right}, {step}",
                "dec {count}",
                "jnz 2b",
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 64], tmm1",
                "tilestored [{sums} + {line} + {half}], tmm2",
                "tilestored [{sums} + {line} + {half} + 64], tmm3",
                lower = inout(reg) left.words => _,
                upper = inout(reg) upper => _,
                right = inout(reg) right.words => _,
                count = inout(reg) words.div_ceil(WORDS) => _,
                down = in(reg) left.strides[0] * 4,
                line = in(reg) LINE,
                sums = in(reg) sums.0.as_mut_ptr(),
                step = const WORDS * LINE,
                half = const 16 * LINE,
                options(nostack),
            );
        }
        sums
    }

    /// The sums from a row on, as words with strides.
    pub(super) fn from(&self, row: usize) -> Left {
        Left::new(self.0.as_ptr().cast::<u32>().wrapping_add(row * WIDTH), [WIDTH, 1])
    }
}
