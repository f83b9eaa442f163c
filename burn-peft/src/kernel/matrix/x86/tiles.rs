//! Sums by tile registers (AMX): 32 rows of the broadcast side meet a panel of the vector side, 16 words deep at a time.
//!
//! A word of the left tile is a pair of bf16 of one row, a word of the right tile the pair of one column: the order in which
//! panels and staged rows lie. The instructions are assembly, for want of stable intrinsics.

use super::{
    WIDTH,
    micro::{Left, Right},
};
use std::{arch::asm, marker::PhantomData, sync::OnceLock};

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

/// Loads the two tiles of a part of the left side.
macro_rules! left {
    ($part:literal) => {
        concat!(
            "tileloadd tmm4, [{lower} + {down} + 2048*",
            $part,
            "]\n",
            "tileloadd tmm5, [{upper} + {down} + 2048*",
            $part,
            "]\n",
        )
    };
}

/// Loads the two tiles of a part of the right side, which lie so many bytes apart.
macro_rules! right {
    ($part:literal, $apart:literal) => {
        concat!(
            "tileloadd tmm6, [{right} + {line} + 2048*",
            $part,
            "]\n",
            "tileloadd tmm7, [{right} + {line} + 2048*",
            $part,
            " + ",
            $apart,
            "]\n",
        )
    };
}

/// Asks for four lines of the right side.
macro_rules! fetch {
    ($at:literal, $line:literal) => {
        concat!(
            "prefetcht0 [{right} + ",
            $at,
            " + 64*",
            $line,
            "]\n",
            "prefetcht0 [{right} + ",
            $at,
            " + 64*",
            $line,
            " + 64]\n",
            "prefetcht0 [{right} + ",
            $at,
            " + 64*",
            $line,
            " + 128]\n",
            "prefetcht0 [{right} + ",
            $at,
            " + 64*",
            $line,
            " + 192]\n",
        )
    };
}

/// Adds the products of the loaded tiles, and asks for 16 lines of the right side from so many bytes on.
macro_rules! multiply {
    ($at:literal) => {
        concat!(
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            fetch!($at, "0"),
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            fetch!($at, "4"),
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            fetch!($at, "8"),
            "tdpbf16ps tmm3, tmm5, tmm7\n",
            fetch!($at, "12"),
        )
    };
}

/// The sums of blocks of [`WORDS`] words of depth, whose sides go on by `$next` bytes and have rows `$line` bytes apart.
macro_rules! sums {
    (($words:expr, $left:expr, $right:expr), ($out:expr, $stride:expr, $add:expr), $next:expr, $line:expr, $($block:expr),*) => {{
        let upper = $left.words.wrapping_add($left.upper);
        let next: [usize; 2] = $next;
        // SAFETY: by the caller.
        unsafe {
            asm!(
                "test {line:e}, {line:e}",
                "jz 3f",
                "tileloadd tmm0, [{out} + {stride}]",
                "tileloadd tmm1, [{out} + {stride} + 64]",
                "tileloadd tmm2, [{out_upper} + {stride}]",
                "tileloadd tmm3, [{out_upper} + {stride} + 64]",
                "jmp 4f",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "4:",
                "mov {line:e}, {lines}",
                "2:",
                $($block,)*
                "add {lower}, {left_next}",
                "add {upper}, {left_next}",
                "add {right}, {right_next}",
                "dec {count}",
                "jnz 2b",
                "tilestored [{out} + {stride}], tmm0",
                "tilestored [{out} + {stride} + 64], tmm1",
                "tilestored [{out_upper} + {stride}], tmm2",
                "tilestored [{out_upper} + {stride} + 64], tmm3",
                lower = inout(reg) $left.words => _,
                upper = inout(reg) upper => _,
                right = inout(reg) $right.words => _,
                count = inout(reg) $words.div_ceil(WORDS) => _,
                down = in(reg) $left.strides[0] * 4,
                line = inout(reg) usize::from($add) => _,
                lines = const $line,
                out = in(reg) $out,
                out_upper = in(reg) $out.wrapping_add(16 * $stride),
                stride = in(reg) $stride * 4,
                left_next = in(reg) next[0],
                right_next = in(reg) next[1],
                options(nostack),
            );
        }
    }};
}

/// Writes the products of staged rows with a packed panel, so many words deep, or adds them to what is there: [`ROWS`] rows of
/// [`WIDTH`] sums, `stride` apart. The sides have so many parts: of one, the words of a row on the left lie side by side; of more,
/// the tiles of a part follow each other.
///
/// # Safety
/// This thread holds [`Tiles`]; both sides are there, zero from `words` on to the next multiple of [`WORDS`], and so is `out`.
#[inline]
pub(super) unsafe fn multiply(
    words: usize,
    (left, right): (Left, Right),
    parts: [usize; 2],
    (out, stride, add): (*mut f32, usize, bool),
) {
    const ONE: usize = WORDS * 4;
    const BLOCK: usize = WORDS * LINE;
    // The least products come first. Those of a second with a third part are less than what rounding leaves.
    match parts {
        [1, 1] => sums!(
            (words, left, right),
            (out, stride, add),
            [ONE, BLOCK],
            LINE,
            right!("0", "64"),
            left!("0"),
            multiply!("2048")
        ),
        [1, _] => sums!(
            (words, left, right),
            (out, stride, add),
            [ONE, 3 * BLOCK],
            64,
            left!("0"),
            right!("2", "1024"),
            multiply!("6144"),
            right!("1", "1024"),
            multiply!("8192"),
            right!("0", "1024"),
            multiply!("10240")
        ),
        [_, 1] => sums!(
            (words, left, right),
            (out, stride, add),
            [3 * BLOCK, BLOCK],
            LINE,
            right!("0", "64"),
            left!("2"),
            multiply!("2048"),
            left!("1"),
            multiply!("3072"),
            left!("0"),
            multiply!("4096")
        ),
        _ => sums!(
            (words, left, right),
            (out, stride, add),
            [3 * BLOCK, 3 * BLOCK],
            64,
            right!("0", "1024"),
            left!("2"),
            multiply!("6144"),
            left!("1"),
            multiply!("7168"),
            right!("1", "1024"),
            multiply!("8192"),
            left!("0"),
            multiply!("9216"),
            right!("2", "1024"),
            multiply!("10240"),
            right!("0", "1024"),
            multiply!("11264")
        ),
    }
}
