//! The interface of the micro-kernels.

use super::operands::{MicroPanelA, Operand, OutputTile, PackBuffer, RowBlock, TileTask};
use std::ops::Range;

/// A micro-kernel, which accumulates one tile of C in registers, and the packing of its operands. A product is compiled
/// for each of them and selects one once.
pub(super) trait MicroKernel: Copy + Send + Sync {
    /// MR: the number of rows of A that are multiplied at a time.
    const MR: usize;
    /// NR: the number of columns of a micro-panel of B.
    const NR: usize;
    /// The number of rows for which the buffer of a packed micro-panel of A has room.
    const PACK_MR: usize;
    /// The number of values along k in a word.
    const K_PER_WORD: usize;
    /// The number of bf16 terms into which an f32 is split when it is packed.
    const F32_TERMS: usize = 1;
    /// The number of words of B that a thread packs at a time, where values are not split into terms: they fill half of
    /// its L2 cache.
    const PACKED_B_WORDS: usize = 1 << 17;
    /// True if the kernel can write a transposed tile of C, so that A and B can exchange their roles.
    const CAN_TRANSPOSE_C: bool = true;

    /// A state of the thread that a block of C needs; the end of the value restores the previous state.
    type ThreadState;

    /// Prepares the thread for a block of C.
    ///
    /// # Safety
    /// The CPU has the instructions of the micro-kernel, and the thread holds no other [`MicroKernel::ThreadState`].
    unsafe fn prepare_thread(self) -> Self::ThreadState;

    /// Returns true if the kernel reads complete micro-panels of an f32 B in place where the columns are adjacent.
    fn reads_f32_in_place(self) -> bool;

    /// Packs micro-panels of B over the range `k`: at each step along k the words of all NR columns, zeros for columns
    /// beyond the last. Pairs are padded with zeros to a multiple of 16 words along k.
    ///
    /// # Safety
    /// `to` has room for all micro-panels, a multiple of 16 steps deep, and is aligned to 64 bytes; `panels` and `k`
    /// lie within B; the CPU has the instructions of the micro-kernel.
    unsafe fn pack_b(self, b: &Operand, panels: Range<usize>, k: Range<usize>, to: PackBuffer);

    /// Returns the micro-panel of A for a block of rows and the range `k`: in place if the kernel can read it there,
    /// else packed into `buffer`.
    ///
    /// # Safety
    /// `buffer` has room for [`MicroKernel::PACK_MR`] rows of the words of the range, padded to a multiple of 16, in
    /// each bf16 term, and is aligned to 64 bytes; the rows and `k` lie within A; the CPU has the instructions of the
    /// micro-kernel.
    unsafe fn pack_a(self, a: &Operand, block: RowBlock, k: Range<usize>, buffer: *mut u32) -> MicroPanelA;

    /// Adds the product of two micro-panels to a tile of C, or writes it.
    ///
    /// # Safety
    /// The micro-panels are those of this micro-kernel and hold the words of the whole range, `tile` lies within C, no
    /// other thread accesses it, the thread holds the state of [`MicroKernel::prepare_thread`], and the CPU has the
    /// instructions of the micro-kernel.
    unsafe fn compute_tile(self, task: TileTask, tile: OutputTile);
}
