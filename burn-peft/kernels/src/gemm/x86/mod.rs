//! GEMM for x86-64 in the structure of GotoBLAS and BLIS. The micro-kernels use AVX-512, on f32 or on pairs of bf16
//! whose products are accumulated in f32; AMX tiles on such pairs where the machine has them, with f32 split into three
//! bf16 terms (bf16x3); and AVX2 for everything else.
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
mod bf16x3;
mod micro_kernel;
mod pack;

use super::{GemmOutput, Matrix, MatrixData, Threads};
use crate::{
    MatmulPrecision,
    instructions::{InstructionSet, has_avx2, max_instruction_set},
};
use rayon::prelude::*;
use std::cell::Cell;

/// NR: columns of B that a micro-kernel processes at a time, two registers of 512 bits.
const NR: usize = 32;
/// MR: rows of A that a micro-kernel processes at a time.
const MR: usize = 12;
/// KC: words along k that are accumulated in registers before the sum is stored.
const KC: usize = 768;
/// KC where there are more words along k than the first number: the second. It is small enough that a whole weight is
/// packed at a time to this depth, so memory is read in its order.
const LONG_K_KC: [usize; 2] = [1 << 12, 192];
/// Words of B that a thread packs at a time: they fill half of its L2 cache.
const PACKED_B_WORDS: usize = 1 << 17;
/// Words of B that a thread packs at a time with AVX2: machines without AVX-512 have smaller caches.
const PACKED_B_WORDS_AVX2: usize = 1 << 16;
/// The largest number of words along k for which AMX tiles load C and continue its sums. Longer sums would accumulate
/// too much rounding error, so each KC block is then accumulated from zero and added to C.
const LOAD_C_MAX_WORDS: usize = 1 << 10;
/// KC for bf16x3 operands.
const KC_BF16X3: usize = 288;
/// Words of B that a thread packs at a time as bf16x3.
const PACKED_B_WORDS_BF16X3: usize = 1 << 18;
/// Products with fewer rows or columns are not worth splitting operands into bf16x3 terms.
const MIN_SIZE_BF16X3: usize = 96;
/// Up to this many rows of A, B is read in place where possible: packing would not pay.
const UNPACKED_B_MAX_ROWS: usize = 2 * MR;
/// The smallest number of rows of A that is worth a task of its own.
const MIN_TASK_ROWS: usize = 8 * MR;
/// Products with fewer multiply-adds run on the calling thread.
const PARALLEL_MIN_FMAS: usize = 1 << 21;

/// Returns true if this machine can run these micro-kernels.
pub(super) fn available() -> bool {
    has_avx2()
}

fn has_avx512() -> bool {
    max_instruction_set() >= InstructionSet::Avx512
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
}

fn has_amx() -> bool {
    max_instruction_set() >= InstructionSet::Amx && amx::available()
}

/// Returns true if an f32 product `[m, k]·[k, n]` uses AMX tiles with operands split into three bf16 terms.
pub(super) fn uses_bf16x3([m, n, k]: [usize; 3]) -> bool {
    has_amx() && m.min(n) >= MIN_SIZE_BF16X3 && k >= 2 * amx::TILE_K
}

/// The micro-kernel of a product, which determines what the packed words are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum MicroKernel {
    /// AVX2: a word is an f32, rounded to this precision.
    Avx2(MatmulPrecision),
    /// AVX-512: a word is an f32.
    Avx512,
    /// AVX-512 BF16: a word is a pair of bf16.
    Avx512Bf16,
    /// AMX tiles: a word is a pair of bf16.
    Amx,
}

impl MicroKernel {
    /// Selects the micro-kernel for a product `[m, k]·[k, n]`, whose shape is given as `[m, n, k]`.
    fn select(compute: MatmulPrecision, shape: [usize; 3]) -> Self {
        match compute {
            MatmulPrecision::F32 if uses_bf16x3(shape) => Self::Amx,
            MatmulPrecision::Bf16 if has_amx() => Self::Amx,
            MatmulPrecision::Bf16 if has_avx512() && is_x86_feature_detected!("avx512bf16") => Self::Avx512Bf16,
            MatmulPrecision::F32 if has_avx512() => Self::Avx512,
            _ => Self::Avx2(compute),
        }
    }

    /// Returns the number of values along k in a word.
    fn k_per_word(self) -> usize {
        if matches!(self, Self::Avx512Bf16 | Self::Amx) { 2 } else { 1 }
    }

    /// Returns MR, the number of rows of A that are processed at a time.
    fn mr(self) -> usize {
        match self {
            Self::Amx => amx::MR,
            Self::Avx2(_) => avx2::MR,
            _ => MR,
        }
    }

    /// Returns the number of rows for which the buffer of a packed micro-panel of A has room.
    fn pack_mr(self) -> usize {
        match self {
            Self::Amx => amx::MR,
            Self::Avx2(_) => avx2::PACK_MR,
            _ => micro_kernel::PACK_MR,
        }
    }

    /// Returns NR, the number of columns of a micro-panel of B.
    fn nr(self) -> usize {
        if matches!(self, Self::Avx2(_)) { avx2::NR } else { NR }
    }

    /// Returns the number of words of B that a thread packs at a time, if each value is split into `terms` bf16 terms.
    fn packed_b_words(self, terms: usize) -> usize {
        match (self, terms) {
            (Self::Avx2(_), _) => PACKED_B_WORDS_AVX2,
            (_, 1) => PACKED_B_WORDS,
            _ => PACKED_B_WORDS_BF16X3,
        }
    }
}

/// An operand, as `count` vectors along k: the rows of A or the columns of B.
#[derive(Clone, Copy)]
struct Operand {
    data: *const u8,
    /// True if the values are bf16, false if they are f32.
    is_bf16: bool,
    /// The number of rows of A or columns of B.
    count: usize,
    /// Strides in values: from one row of A (column of B) to the next, and along k.
    strides: [usize; 2],
    /// The number of bf16 terms into which a value is split when it is packed: 3 for bf16x3, else 1.
    terms: usize,
}

// SAFETY: the pointer stands for a shared slice of plain numbers, which all threads may read at the same time.
unsafe impl Sync for Operand {}

impl Operand {
    fn new(matrix: Matrix<'_>, micro_kernel: MicroKernel, compute: MatmulPrecision) -> Self {
        let (values, half) = match matrix.values {
            MatrixData::F32(values) => (values.as_ptr().cast(), false),
            MatrixData::Bf16(values) => (values.as_ptr().cast(), true),
        };
        let parts = if micro_kernel == MicroKernel::Amx && compute == MatmulPrecision::F32 && !half {
            bf16x3::TERMS
        } else {
            1
        };
        Self { data: values, is_bf16: half, count: matrix.shape[0], strides: matrix.strides, terms: parts }
    }

    /// Returns the address of a value. It may be dereferenced only if the value exists.
    #[inline(always)]
    fn ptr(&self, vector: usize, inner: usize) -> *const u8 {
        let size = if self.is_bf16 { 2 } else { 4 };
        self.data.wrapping_add((vector * self.strides[0] + inner * self.strides[1]) * size)
    }

    /// Estimates the cycles of the product if this operand takes the role of B and `other` that of A, with `k` values
    /// along the inner dimension and `width` columns to a micro-panel.
    fn cost_as_b(&self, other: &Self, k: usize, width: usize) -> usize {
        // Packing that transposes takes twice the time of a copy.
        let pack = self.count * k / if self.strides[0] == 1 { 2 } else { 1 };
        // Strided reads of A wait for memory.
        let read = if other.strides[1] == 1 { 0 } else { other.count * k };
        self.count.div_ceil(width) * other.count * k + pack + read
    }
}

/// The output C in the orientation of the micro-kernel: row stride along A, column stride along B.
#[derive(Clone, Copy)]
struct StridedOutput {
    data: *mut f32,
    strides: [usize; 2],
    accumulate: bool,
    alpha: f32,
}

// SAFETY: every task writes its own block of rows and columns, so no two threads access the same element.
unsafe impl Sync for StridedOutput {}

/// Computes `alpha · a·b` into `out`.
///
/// # Safety
/// [`available`] returns true, the shapes match, and every index of the shapes and strides lies within its slice.
pub(super) unsafe fn gemm(
    out: GemmOutput<'_>,
    a: Matrix<'_>,
    b: Matrix<'_>,
    alpha: f32,
    (threads, compute): (Threads, MatmulPrecision),
) {
    let k = a.shape[1];
    let micro_kernel = MicroKernel::select(compute, [a.shape[0], b.shape[1], k]);
    let [a, b] = [a, b.transposed()].map(|matrix| Operand::new(matrix, micro_kernel, compute));
    let target =
        StridedOutput { data: out.values.as_mut_ptr(), strides: [out.stride, 1], accumulate: out.accumulate, alpha };
    let width = micro_kernel.nr();
    let swapped = micro_kernel != MicroKernel::Amx && a.cost_as_b(&b, k, width) < b.cost_as_b(&a, k, width);
    let (broadcast, vectors, strides) = if swapped { (b, a, [1, out.stride]) } else { (a, b, target.strides) };
    let problem = GemmProblem { a: broadcast, b: vectors, c: StridedOutput { strides, ..target }, k, micro_kernel };
    if threads == Threads::One || broadcast.count * vectors.count * k < PARALLEL_MIN_FMAS {
        return problem.compute_block([0..broadcast.count, 0..problem.num_panels()]);
    }
    let [rows, columns] = problem.task_grid(rayon::current_num_threads());
    (0..rows * columns).into_par_iter().with_max_len(1).for_each(|task| {
        let part = |index: usize, parts: usize, whole: usize| index * whole / parts..(index + 1) * whole / parts;
        let (row, column) = (task % rows, task / rows);
        let panels = problem.num_panels();
        let high = problem.micro_kernel.mr();
        let tiles = part(row, rows, problem.a.count.div_ceil(high));
        problem.compute_block([
            tiles.start * high..(tiles.end * high).min(problem.a.count),
            part(column, columns, panels),
        ]);
    });
}

/// A product whose operands have their roles as A and B.
struct GemmProblem {
    a: Operand,
    b: Operand,
    c: StridedOutput,
    /// The inner dimension, in values.
    k: usize,
    micro_kernel: MicroKernel,
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

impl GemmProblem {
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
        let turned = |along: bool| if along { 3 } else { 2 };
        let stage = self.a.count * turned(self.a.strides[1] != 1);
        let pack = self.b.count * turned(self.b.strides[0] != 1);
        let most = self.a.count.div_ceil(self.micro_kernel.mr());
        let shapes = (1..=tasks.min(panels)).map(|columns| [tasks.div_ceil(columns).min(most), columns]);
        let cost = |&[rows, columns]: &[usize; 2]| {
            let groups = panels.div_ceil(columns).div_ceil(self.panels_per_block());
            (usize::MAX - tasks.min(rows * columns), stage * columns * groups + pack * rows)
        };
        shapes.min_by_key(cost).unwrap_or([1, 1])
    }

    /// Returns the number of micro-panels of B.
    fn num_panels(&self) -> usize {
        self.b.count.div_ceil(self.micro_kernel.nr())
    }

    /// Returns the number of words along k.
    fn k_words(&self) -> usize {
        self.k.div_ceil(self.micro_kernel.k_per_word())
    }

    /// Returns KC, the words along k that are accumulated at a time: blocks of about equal size, in whole registers.
    fn kc(&self) -> usize {
        let words = self.k_words();
        let most = match self.b.terms {
            _ if words > LONG_K_KC[0] => LONG_K_KC[1],
            1 => KC,
            _ => KC_BF16X3,
        };
        words.div_ceil(words.div_ceil(most)).next_multiple_of(16)
    }

    /// Returns the number of micro-panels of B that are packed at a time.
    fn panels_per_block(&self) -> usize {
        let parts = self.b.terms;
        (self.micro_kernel.packed_b_words(parts) / (self.kc() * self.micro_kernel.nr() * parts)).max(1)
    }

    /// Computes the block of C that belongs to a range of rows of A and a range of micro-panels of B.
    fn compute_block(&self, [rows, panels]: [std::ops::Range<usize>; 2]) {
        let (pair, high) = (self.micro_kernel.k_per_word(), self.micro_kernel.mr());
        let (words, depth) = (self.k_words(), self.kc());
        let step = self.panels_per_block().min(panels.len()).max(1);
        let width = self.micro_kernel.nr();
        let panel = depth * width * self.b.terms;
        let room = step * panel;
        // SAFETY: `MicroKernel::select` chooses `Amx` only after `has_amx` returned true, and the guard of an earlier
        // call on this thread was dropped when that call returned.
        let _tiles = (self.micro_kernel == MicroKernel::Amx).then(|| unsafe { amx::TileRegisters::configure() });
        with_aligned_scratch(room + self.micro_kernel.pack_mr() * depth * self.a.terms, |scratch| {
            let packed_a = scratch.wrapping_add(room);
            for from in panels.clone().step_by(step) {
                let panels = from..panels.end.min(from + step);
                for start in (0..words).step_by(depth) {
                    let inner = [start * pair, self.k.min((start + depth) * pair)];
                    // SAFETY: the scratch memory holds `step` micro-panels of `panel` words and one micro-panel of A;
                    // `rows`, `panels` and `inner` are ranges within the operands and C, and `MicroKernel::select` has
                    // checked the CPU features.
                    unsafe {
                        let room = |index| scratch.add(index * panel);
                        let lies = |panel| rows.len() <= UNPACKED_B_MAX_ROWS && pack::can_use_b_in_place(self, panel);
                        // Only the last micro-panel may be incomplete and need packing where the others are read in
                        // place.
                        let lying = panels.clone().take_while(|&panel| lies(panel)).count();
                        pack::pack_b(self, panels.start + lying..panels.end, inner, (room(lying), panel));
                        for row in rows.clone().step_by(high) {
                            let tile = row..rows.end.min(row + high);
                            let next = if tile.end < rows.end { tile.end } else { rows.start };
                            let left = pack::pack_a(self, (tile.clone(), next), inner, packed_a);
                            for (index, column) in panels.clone().enumerate() {
                                let right = match index < lying {
                                    true => pack::b_in_place(self, column, inner),
                                    false => micro_kernel::MicroPanelB { words: room(index), stride: width },
                                };
                                micro_kernel::compute_tile(self, (left, right), inner, (tile.clone(), column));
                            }
                        }
                    }
                }
            }
        });
    }
}
