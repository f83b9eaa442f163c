//! The loops around the micro-kernels: the division of a product into tasks, of their operands into packed blocks, and
//! of those into tiles.

use super::{
    super::Threads,
    micro_kernel::MicroKernel,
    operands::{MicroPanelB, Operand, OutputTile, PackBuffer, RowBlock, StridedOutput, TileTask},
};
use rayon::prelude::*;
use std::{cell::Cell, ops::Range};

/// KC: words along k that are accumulated in registers before the sum is stored.
const KC: usize = 768;
/// KC for bf16x3 operands.
const KC_BF16X3: usize = 288;
/// KC where there are more than [`LONG_K_WORDS`] words along k. It is small enough that a whole weight is packed at a
/// time to this depth, so memory is read in its order.
const KC_LONG_K: usize = 192;
/// The number of words along k above which KC is [`KC_LONG_K`].
const LONG_K_WORDS: usize = 1 << 12;
/// Words of B that a thread packs at a time as bf16x3.
const PACKED_B_WORDS_BF16X3: usize = 1 << 18;
/// Up to this many rows of A, B is read in place where possible: packing would not pay.
const UNPACKED_B_MAX_ROWS: usize = 24;
/// The smallest number of rows of A that is worth a task of its own.
const MIN_TASK_ROWS: usize = 96;
/// Products with fewer multiply-adds run on the calling thread.
const PARALLEL_MIN_FMAS: usize = 1 << 21;

/// A product whose operands have their roles as A and B.
pub(super) struct GemmProblem<K> {
    kernel: K,
    a: Operand,
    b: Operand,
    c: StridedOutput,
    /// The inner dimension, in values.
    k: usize,
}

/// Packed operands of a thread.
#[derive(Clone, Copy)]
struct PackBuffers {
    a: *mut u32,
    b: PackBuffer,
}

impl<K: MicroKernel> GemmProblem<K> {
    /// Creates the product of `a`, as rows, and `b`, as columns, with `k` values along the inner dimension. Either
    /// takes the role of A, whichever costs less.
    pub(super) fn new(kernel: K, a: Operand, b: Operand, k: usize, c: StridedOutput) -> Self {
        if K::CAN_TRANSPOSE_C && cost_as_b::<K>(&a, &b, k) < cost_as_b::<K>(&b, &a, k) {
            let [down, across] = c.strides;
            return Self { kernel, a: b, b: a, c: StridedOutput { strides: [across, down], ..c }, k };
        }
        Self { kernel, a, b, c, k }
    }

    /// Computes the product.
    ///
    /// # Safety
    /// The CPU has the instructions of the micro-kernel, every index of the shapes and strides lies within its memory,
    /// and nothing else accesses C.
    pub(super) unsafe fn compute(&self, threads: Threads) {
        let panels = self.num_panels();
        if threads == Threads::One || self.a.count * self.b.count * self.k < PARALLEL_MIN_FMAS {
            // SAFETY: the conditions are the caller's, and the block is the whole of C.
            return unsafe { self.compute_block(0..self.a.count, 0..panels) };
        }
        let [rows, columns] = self.task_grid(rayon::current_num_threads());
        (0..rows * columns).into_par_iter().with_max_len(1).for_each(|task| {
            let part = |index: usize, parts: usize, whole: usize| index * whole / parts..(index + 1) * whole / parts;
            let (row, column) = (task % rows, task / rows);
            let tiles = part(row, rows, self.a.count.div_ceil(K::MR));
            let block = tiles.start * K::MR..(tiles.end * K::MR).min(self.a.count);
            // SAFETY: the conditions are the caller's, and every task has a block of its own.
            unsafe { self.compute_block(block, part(column, columns, panels)) };
        });
    }

    /// Returns the number of tasks along the rows of A and along the columns of B, for tasks of about equal size.
    fn task_grid(&self, threads: usize) -> [usize; 2] {
        let panels = self.num_panels();
        if self.b.terms > 1 {
            return self.task_grid_bf16x3(panels, 2 * threads);
        }
        let columns = if panels < 2 * threads {
            1
        } else {
            let least = panels.div_ceil(self.panels_per_block()).max(2 * threads);
            least.next_multiple_of(threads).min(panels)
        };
        let rows = (2 * threads).div_ceil(columns).min(self.a.count.div_ceil(MIN_TASK_ROWS)).max(1);
        [rows, columns]
    }

    /// Returns the number of tasks along A and along B where splitting into bf16x3 terms costs most: as many tasks as
    /// possible, in the shape that splits the fewest values repeatedly.
    fn task_grid_bf16x3(&self, panels: usize, tasks: usize) -> [usize; 2] {
        let cost_per_value = |transposes: bool| if transposes { 3 } else { 2 };
        let pack_a = self.a.count * cost_per_value(self.a.strides[1] != 1);
        let pack_b = self.b.count * cost_per_value(self.b.strides[0] != 1);
        let max_rows = self.a.count.div_ceil(K::MR);
        let shapes = (1..=tasks.min(panels)).map(|columns| [tasks.div_ceil(columns).min(max_rows), columns]);
        let cost = |&[rows, columns]: &[usize; 2]| {
            let groups = panels.div_ceil(columns).div_ceil(self.panels_per_block());
            (usize::MAX - tasks.min(rows * columns), pack_a * columns * groups + pack_b * rows)
        };
        shapes.min_by_key(cost).unwrap_or([1, 1])
    }

    /// Returns the number of micro-panels of B.
    fn num_panels(&self) -> usize {
        self.b.count.div_ceil(K::NR)
    }

    /// Returns the number of words along k.
    fn k_words(&self) -> usize {
        self.k.div_ceil(K::K_PER_WORD)
    }

    /// Returns KC, the words along k that are accumulated at a time: blocks of about equal size, in whole registers.
    fn kc(&self) -> usize {
        let words = self.k_words();
        let max = match self.b.terms {
            _ if words > LONG_K_WORDS => KC_LONG_K,
            1 => KC,
            _ => KC_BF16X3,
        };
        words.div_ceil(words.div_ceil(max)).next_multiple_of(16)
    }

    /// Returns the number of micro-panels of B that are packed at a time.
    fn panels_per_block(&self) -> usize {
        let words = if self.b.terms > 1 { PACKED_B_WORDS_BF16X3 } else { K::PACKED_B_WORDS };
        (words / (self.kc() * K::NR * self.b.terms)).max(1)
    }

    /// Computes the block of C that belongs to a range of rows of A and a range of micro-panels of B.
    ///
    /// # Safety
    /// The conditions of [`GemmProblem::compute`] hold, and no other thread accesses the block.
    unsafe fn compute_block(&self, rows: Range<usize>, panels: Range<usize>) {
        let (words, kc) = (self.k_words(), self.kc());
        let step = self.panels_per_block().min(panels.len()).max(1);
        let panel_words = kc * K::NR * self.b.terms;
        // SAFETY: the CPU has the instructions by the caller's guarantee, and the state of an earlier call on this
        // thread was dropped when that call returned.
        let _state = unsafe { self.kernel.prepare_thread() };
        with_aligned_scratch(step * panel_words + K::PACK_MR * kc * self.a.terms, |scratch| {
            let buffers = PackBuffers {
                a: scratch.wrapping_add(step * panel_words),
                b: PackBuffer { words: scratch, panel_words },
            };
            for first in panels.clone().step_by(step) {
                for start in (0..words).step_by(kc) {
                    let k = start * K::K_PER_WORD..self.k.min((start + kc) * K::K_PER_WORD);
                    // SAFETY: the buffers hold `step` micro-panels of B and one of A; the ranges lie within the
                    // operands and C, and the other conditions are the caller's.
                    unsafe { self.compute_panels(rows.clone(), first..panels.end.min(first + step), k, buffers) };
                }
            }
        });
    }

    /// Adds the products of some rows of A with some micro-panels of B, over a range of k, to C.
    ///
    /// # Safety
    /// The buffers have room for these micro-panels of B and one of A, the ranges lie within the operands and C, and
    /// the conditions of [`GemmProblem::compute_block`] hold.
    #[inline(always)]
    unsafe fn compute_panels(&self, rows: Range<usize>, panels: Range<usize>, k: Range<usize>, buffers: PackBuffers) {
        let (words, product_words) = (k.len().div_ceil(K::K_PER_WORD), self.k_words());
        // Only the last micro-panel may be incomplete and need packing where the others are read in place.
        let in_place = panels.clone().take_while(|&panel| self.reads_in_place(rows.len(), panel)).count();
        // SAFETY: the caller guarantees the ranges, the buffers and the CPU features, which are the conditions of the
        // micro-kernel; a micro-panel is read in place only if `reads_in_place` returned true for it.
        unsafe {
            let to = buffers.b.skip_panels(in_place);
            self.kernel.pack_b(&self.b, panels.start + in_place..panels.end, k.clone(), to);
            for row in rows.clone().step_by(K::MR) {
                let tile = row..rows.end.min(row + K::MR);
                let next = if tile.end < rows.end { tile.end } else { rows.start };
                let block = RowBlock { rows: tile.clone(), next };
                let a = self.kernel.pack_a(&self.a, block, k.clone(), buffers.a);
                for (index, panel) in panels.clone().enumerate() {
                    let b = match index < in_place {
                        true => self.panel_in_place(panel, k.start),
                        false => self.packed_panel(buffers.b.skip_panels(index)),
                    };
                    let output = self.output_tile(tile.start, panel, k.start > 0);
                    output.prefetch(tile.len());
                    let task = TileTask { a, b, rows: tile.len(), words, product_words };
                    self.kernel.compute_tile(task, output);
                }
            }
        }
    }

    /// Returns true if a micro-panel of B is read in place for so many rows of A: it is complete, f32, and its columns
    /// are adjacent.
    fn reads_in_place(&self, rows: usize, panel: usize) -> bool {
        rows <= UNPACKED_B_MAX_ROWS
            && self.kernel.reads_f32_in_place()
            && !self.b.is_bf16
            && self.b.strides[0] == 1
            && (panel + 1) * K::NR <= self.b.count
    }

    /// Returns a micro-panel of B in place, from value `k` on.
    #[inline(always)]
    fn panel_in_place(&self, panel: usize, k: usize) -> MicroPanelB {
        MicroPanelB { words: self.b.ptr(panel * K::NR, k).cast(), stride: self.b.strides[1], terms: 1 }
    }

    /// Returns a packed micro-panel of B.
    #[inline(always)]
    fn packed_panel(&self, buffer: PackBuffer) -> MicroPanelB {
        MicroPanelB { words: buffer.words, stride: K::NR, terms: self.b.terms }
    }

    /// Returns the tile of C at a row of A and a micro-panel of B; it accumulates if C does or if the tile `continues`
    /// a sum.
    #[inline(always)]
    fn output_tile(&self, row: usize, panel: usize, continues: bool) -> OutputTile {
        let StridedOutput { data, strides: [row_stride, column_stride], accumulate, alpha } = self.c;
        let start = panel * K::NR;
        OutputTile {
            data: data.wrapping_add(row * row_stride + start * column_stride),
            row_stride,
            column_stride,
            columns: K::NR.min(self.b.count - start),
            accumulate: accumulate || continues,
            alpha,
        }
    }
}

/// Estimates the cycles of the product if `b` takes the role of B and `a` that of A, with `k` values along the inner
/// dimension.
fn cost_as_b<K: MicroKernel>(b: &Operand, a: &Operand, k: usize) -> usize {
    // Packing that transposes takes twice the time of a copy.
    let pack = b.count * k / if b.strides[0] == 1 { 2 } else { 1 };
    // Strided reads of A wait for memory.
    let read = if a.strides[1] == 1 { 0 } else { a.count * k };
    b.count.div_ceil(K::NR) * a.count * k + pack + read
}

thread_local! {
    static SCRATCH: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
}

/// Runs `work` with uninitialized memory for `n` words, aligned to a cache line, which stays with the thread.
fn with_aligned_scratch<R>(n: usize, work: impl FnOnce(*mut u32) -> R) -> R {
    const LINE: usize = 64;
    let mut scratch = SCRATCH.take();
    if scratch.capacity() < n + LINE {
        scratch = Vec::with_capacity(n + LINE);
    }
    let start = scratch.as_mut_ptr();
    let result = work(start.wrapping_add(start.align_offset(LINE)));
    SCRATCH.set(scratch);
    result
}
