//! Micro-kernels for AMX tile registers: 32 rows of A are multiplied with a micro-panel of B, 16 words along k at a
//! time.
//!
//! A word of an A tile is a pair of bf16 of one row, a word of a B tile the pair of one column, which is the order of
//! the packed operands. The instructions are written in assembly because there are no stable intrinsics.

use super::{NR, Rows, TileTask};
use std::{arch::asm, marker::PhantomData, sync::OnceLock};

/// Words along k in a tile.
pub(in super::super) const TILE_K: usize = 16;
/// Bytes from one row of a micro-panel of B, or of C, to the next.
const ROW_BYTES: usize = NR * 4;

/// Returns true if this machine has AMX and the operating system grants its use, which is requested once.
pub(in super::super) fn available() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| cpu_has_amx() && request_amx())
}

/// Returns true if CPUID reports AMX-TILE and AMX-BF16.
fn cpu_has_amx() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    let last = std::arch::x86_64::__cpuid(0).eax;
    last >= 7 && std::arch::x86_64::__cpuid_count(7, 0).edx & (BF16 | TILE) == BF16 | TILE
}

/// Asks the kernel for permission to use the tile registers and returns true if it is granted.
#[cfg(target_os = "linux")]
fn request_amx() -> bool {
    // A process must ask Linux for permission before it uses tile data: see arch_prctl(2).
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the system call takes two integers, accesses no memory of this process and changes nothing but its
    // permission to use tile data.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request_amx() -> bool {
    false
}

/// Configuration of the tile registers in the format of `ldtilecfg`: eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Guard that holds the configured tile registers of this thread until it is dropped.
pub(in super::super) struct TileRegisters(PhantomData<*const ()>);

impl TileRegisters {
    /// Configures the tile registers of this thread.
    ///
    /// # Safety
    /// [`available`] returns true, and no other [`TileRegisters`] exists on this thread.
    pub(super) unsafe fn configure() -> Self {
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        row_bytes[..8].fill(64);
        rows[..8].fill(16);
        let layout = TileConfig { palette: 1, start: 0, reserved: [0; 14], row_bytes, rows };
        // SAFETY: the CPU has AMX by the caller's guarantee, and `layout` is a valid 64-byte configuration of palette
        // 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &layout, options(nostack, readonly, preserves_flags)) };
        Self(PhantomData)
    }
}

impl Drop for TileRegisters {
    fn drop(&mut self) {
        // SAFETY: the tile registers of this thread were configured when the guard was created, and the guard cannot
        // move to another thread because it is not `Send`.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// Loads the two A tiles of a bf16 term.
macro_rules! load_a {
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

/// Loads the two B tiles of a bf16 term, which lie `$apart` bytes apart.
macro_rules! load_b {
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

/// Prefetches four cache lines of B.
macro_rules! prefetch_b {
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

/// Multiplies the loaded tiles into the accumulators and prefetches 16 cache lines of B from `$at` bytes on.
macro_rules! multiply_tiles {
    ($at:literal) => {
        concat!(
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            prefetch_b!($at, "0"),
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            prefetch_b!($at, "4"),
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            prefetch_b!($at, "8"),
            "tdpbf16ps tmm3, tmm5, tmm7\n",
            prefetch_b!($at, "12"),
        )
    };
}

/// Accumulates blocks of [`TILE_K`] words along k. A block of A and of B takes `$next` bytes, and rows of a B tile lie
/// `$line` bytes apart.
macro_rules! accumulate_steps {
    ($task:expr, $out:expr, $accumulate:expr, $next:expr, $line:expr, $($block:expr),*) => {{
        let upper = $task.a.words.wrapping_add($task.a.second_tile_offset);
        let next: [usize; 2] = $next;
        // SAFETY: the caller of `accumulate` guarantees the tile registers, both micro-panels up to the next multiple
        // of `TILE_K`, and the output tile; the block touches no other memory but prefetches.
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
                lower = inout(reg) $task.a.words => _,
                upper = inout(reg) upper => _,
                right = inout(reg) $task.b.words => _,
                count = inout(reg) $task.words.div_ceil(TILE_K) => _,
                down = in(reg) $task.a.strides[0] * 4,
                line = inout(reg) usize::from($accumulate) => _,
                lines = const $line,
                out = in(reg) $out.data,
                out_upper = in(reg) $out.data.wrapping_add(16 * $out.stride),
                stride = in(reg) $out.stride * 4,
                left_next = in(reg) next[0],
                right_next = in(reg) next[1],
                options(nostack),
            );
        }
    }};
}

/// Multiplies a packed micro-panel of A with one of B and writes the result, or adds it if `accumulate`, to
/// [`MR`](super::MR) rows of [`NR`] values. With one bf16 term the words of a row of A are adjacent; with several the
/// tiles of a block follow each other term by term.
///
/// # Safety
/// This thread holds [`TileRegisters`]; both micro-panels hold the words of the task, followed by zeros up to the next
/// multiple of [`TILE_K`], and all rows of `out` are writable.
#[inline]
pub(super) unsafe fn accumulate(task: TileTask, out: Rows, accumulate: bool) {
    const ONE: usize = TILE_K * 4;
    const BLOCK: usize = TILE_K * ROW_BYTES;
    // The product of the two leading terms, the largest, comes last. Products of a second with a third term, and of two
    // third terms, are below the rounding error and left out.
    match [task.a.terms, task.b.terms] {
        [1, 1] => accumulate_steps!(
            task,
            out,
            accumulate,
            [ONE, BLOCK],
            ROW_BYTES,
            load_b!("0", "64"),
            load_a!("0"),
            multiply_tiles!("2048")
        ),
        [1, _] => accumulate_steps!(
            task,
            out,
            accumulate,
            [ONE, 3 * BLOCK],
            64,
            load_a!("0"),
            load_b!("2", "1024"),
            multiply_tiles!("6144"),
            load_b!("1", "1024"),
            multiply_tiles!("8192"),
            load_b!("0", "1024"),
            multiply_tiles!("10240")
        ),
        [_, 1] => accumulate_steps!(
            task,
            out,
            accumulate,
            [3 * BLOCK, BLOCK],
            ROW_BYTES,
            load_b!("0", "64"),
            load_a!("2"),
            multiply_tiles!("2048"),
            load_a!("1"),
            multiply_tiles!("3072"),
            load_a!("0"),
            multiply_tiles!("4096")
        ),
        _ => accumulate_steps!(
            task,
            out,
            accumulate,
            [3 * BLOCK, 3 * BLOCK],
            64,
            load_b!("0", "1024"),
            load_a!("2"),
            multiply_tiles!("6144"),
            load_a!("1"),
            multiply_tiles!("7168"),
            load_b!("1", "1024"),
            multiply_tiles!("8192"),
            load_a!("0"),
            multiply_tiles!("9216"),
            load_b!("2", "1024"),
            multiply_tiles!("10240"),
            load_b!("0", "1024"),
            multiply_tiles!("11264")
        ),
    }
}
