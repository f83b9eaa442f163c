//! Products by vectors of 512 bits, of f32 or of pairs of bf16 whose products are summed in f32; by tiles of such pairs where the
//! machine has them, f32 as three bf16 each; by vectors of 256 bits where it has no others for what is to be computed.
//!
//! One side is the *vector* side: as many of its vectors as fill two registers lie side by side. The other is the *broadcast*
//! side: some of its values are multiplied with all of them. Either side of the product can be either; the one that costs
//! less is taken. Panels of the vector side are packed by the thread that uses them and stay in its second-level cache; the
//! broadcast side is read where it lies unless its type must change. A *word* is what a lane holds: an f32, or two bf16 that
//! follow each other along the inner dimension.
//!
//! Every element is summed in the order of the inner dimension, whatever the number of threads, and whatever the shape of the
//! product but for one thing: products of f32 with few rows or columns are made by vectors where others are made by tiles.

mod micro;
mod narrow;
mod pack;
mod parts;
mod tiles;
mod vectors;

use super::{Matrix, Output, Threads, Values};
use crate::kernel::{
    Compute,
    instructions::{Instructions, allowed, is_narrow},
};
use rayon::prelude::*;
use std::cell::Cell;

/// Vectors of the vector side that are multiplied at a time: two registers of 512 bits.
const WIDTH: usize = 32;
/// Values of the broadcast side that meet them.
const ROWS: usize = 12;
/// Words of the inner dimension that are summed before the sum is stored.
const DEPTH: usize = 768;
/// The same where there are more words than the first: so few that a whole weight, these words deep, is packed at a time, which
/// reads it in the order of memory.
const SHORT: [usize; 2] = [1 << 12, 192];
/// Words of the vector side that a thread packs at a time: they fill half of its second-level cache.
const PACKED: usize = 1 << 17;
/// The same where vectors have 256 bits: such machines have smaller ones.
const NARROW_PACKED: usize = 1 << 16;
/// Where there are more words than this, tiles sum apart what is summed at a time: sums as long would round too often.
const CARRIED: usize = 1 << 10;
/// The depth and the panels of words in parts.
const PARTS_DEPTH: usize = 288;
const PARTS_PACKED: usize = 1 << 18;
/// Products with fewer vectors on a side do not pay for making parts of the other.
const PARTS_LEAST: usize = 96;
/// So many rows of the broadcast side are not worth a copy of what they meet.
const FEW: usize = 2 * ROWS;
/// Rows of the broadcast side that are worth a task of their own.
const TASK_ROWS: usize = 8 * ROWS;
/// Multiplications that are worth waking other threads.
const PARALLEL: usize = 1 << 21;

/// Whether this machine has the instructions.
pub(super) fn available() -> bool {
    is_narrow()
}

fn is_wide() -> bool {
    allowed() >= Instructions::Avx512
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
}

fn has_tiles() -> bool {
    allowed() >= Instructions::Amx && tiles::available()
}

/// Whether a product `[m, k]·[k, n]` of f32 is made by tiles of their parts.
pub(super) fn in_parts([m, n, k]: [usize; 3]) -> bool {
    has_tiles() && m.min(n) >= PARTS_LEAST && k >= 2 * tiles::WORDS
}

/// What words are and what multiplies them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Arithmetic {
    /// An f32 each, by vectors of 256 bits, rounded to what is told.
    Narrow(Compute),
    /// An f32 each, by vectors.
    F32,
    /// A pair of bf16, by vectors.
    Pairs,
    /// A pair of bf16, by tiles.
    Tiles,
}

impl Arithmetic {
    /// What suits a product `[m, k]·[k, n]`.
    fn of(compute: Compute, shape: [usize; 3]) -> Self {
        match compute {
            Compute::F32 if in_parts(shape) => Self::Tiles,
            Compute::Bf16 if has_tiles() => Self::Tiles,
            Compute::Bf16 if is_wide() && is_x86_feature_detected!("avx512bf16") => Self::Pairs,
            Compute::F32 if is_wide() => Self::F32,
            _ => Self::Narrow(compute),
        }
    }

    /// Inner values in a word.
    fn pair(self) -> usize {
        if matches!(self, Self::Pairs | Self::Tiles) { 2 } else { 1 }
    }

    /// Rows of the broadcast side that meet a panel at a time.
    fn rows(self) -> usize {
        match self {
            Self::Tiles => tiles::ROWS,
            Self::Narrow(_) => narrow::ROWS,
            _ => ROWS,
        }
    }

    /// Rows for which a stage has room.
    fn staged(self) -> usize {
        match self {
            Self::Tiles => tiles::ROWS,
            Self::Narrow(_) => narrow::STAGE,
            _ => micro::STAGE,
        }
    }

    /// Vectors of a panel.
    fn width(self) -> usize {
        if matches!(self, Self::Narrow(_)) { narrow::WIDTH } else { WIDTH }
    }

    /// Words that a thread packs at a time, in so many parts.
    fn packed(self, parts: usize) -> usize {
        match (self, parts) {
            (Self::Narrow(_), _) => NARROW_PACKED,
            (_, 1) => PACKED,
            _ => PARTS_PACKED,
        }
    }
}

/// One operand, as vectors along the inner dimension.
#[derive(Clone, Copy)]
struct Side {
    values: *const u8,
    /// Whether the values are bf16, else f32.
    half: bool,
    /// The number of vectors.
    count: usize,
    /// In values: from one vector to the next, and along a vector.
    strides: [usize; 2],
    /// The words that a pair of values becomes.
    parts: usize,
}

// SAFETY: it stands for a shared slice, which every thread may read.
unsafe impl Sync for Side {}

impl Side {
    fn new(matrix: Matrix<'_>, arithmetic: Arithmetic, compute: Compute) -> Self {
        let (values, half) = match matrix.values {
            Values::F32(values) => (values.as_ptr().cast(), false),
            Values::Bf16(values) => (values.as_ptr().cast(), true),
        };
        let parts = if arithmetic == Arithmetic::Tiles && compute == Compute::F32 && !half { parts::PARTS } else { 1 };
        Self { values, half, count: matrix.shape[0], strides: matrix.strides, parts }
    }

    /// Where a value lies, if it exists.
    #[inline(always)]
    fn at(&self, vector: usize, inner: usize) -> *const u8 {
        let size = if self.half { 2 } else { 4 };
        self.values.wrapping_add((vector * self.strides[0] + inner * self.strides[1]) * size)
    }

    /// About how many cycles the product takes with this side as the vector side and `other` as the broadcast side, `k` deep, in
    /// panels of `width` vectors.
    fn cost(&self, other: &Self, k: usize, width: usize) -> usize {
        // Turning rows to columns takes twice the time of a copy.
        let pack = self.count * k / if self.strides[0] == 1 { 2 } else { 1 };
        // Reading across rows waits for memory.
        let read = if other.strides[1] == 1 { 0 } else { other.count * k };
        self.count.div_ceil(width) * other.count * k + pack + read
    }
}

/// Where the results go: `[broadcast side, vector side]` with strides.
#[derive(Clone, Copy)]
struct Target {
    values: *mut f32,
    strides: [usize; 2],
    add: bool,
    factor: f32,
}

// SAFETY: every task writes elements of its own.
unsafe impl Sync for Target {}

/// `factor · a·b` into `out`, all of which fit.
///
/// # Safety
/// [`available`] said so, and every index of the shapes and strides lies in its slice.
pub(super) unsafe fn product(
    out: Output<'_>,
    a: Matrix<'_>,
    b: Matrix<'_>,
    factor: f32,
    (threads, compute): (Threads, Compute),
) {
    let k = a.shape[1];
    let arithmetic = Arithmetic::of(compute, [a.shape[0], b.shape[1], k]);
    let [a, b] = [a, b.transposed()].map(|matrix| Side::new(matrix, arithmetic, compute));
    let target = Target { values: out.values.as_mut_ptr(), strides: [out.stride, 1], add: out.add, factor };
    let width = arithmetic.width();
    let turned = arithmetic != Arithmetic::Tiles && a.cost(&b, k, width) < b.cost(&a, k, width);
    let (broadcast, vectors, strides) = if turned { (b, a, [1, out.stride]) } else { (a, b, target.strides) };
    let work = Work { broadcast, vectors, target: Target { strides, ..target }, k, arithmetic };
    if threads == Threads::One || broadcast.count * vectors.count * k < PARALLEL {
        return work.part([0..broadcast.count, 0..work.all_panels()]);
    }
    let [rows, columns] = work.split(rayon::current_num_threads());
    (0..rows * columns).into_par_iter().with_max_len(1).for_each(|task| {
        let part = |index: usize, parts: usize, whole: usize| index * whole / parts..(index + 1) * whole / parts;
        let (row, column) = (task % rows, task / rows);
        let panels = work.all_panels();
        let high = work.arithmetic.rows();
        let tiles = part(row, rows, work.broadcast.count.div_ceil(high));
        work.part([tiles.start * high..(tiles.end * high).min(work.broadcast.count), part(column, columns, panels)]);
    });
}

/// A product, its sides in their roles.
struct Work {
    broadcast: Side,
    vectors: Side,
    target: Target,
    /// Inner values.
    k: usize,
    arithmetic: Arithmetic,
}

thread_local! {
    static SCRATCH: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
}

/// Runs `work` with memory for `n` words that starts at a cache line and stays with the thread.
fn with_words<R>(n: usize, work: impl FnOnce(*mut u32) -> R) -> R {
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

impl Work {
    /// The number of parts of the broadcast and of the vector side that make tasks of like size for so many threads.
    fn split(&self, threads: usize) -> [usize; 2] {
        let panels = self.all_panels();
        if self.vectors.parts > 1 {
            return self.split_in_parts(panels, 2 * threads);
        }
        let columns = if panels < 2 * threads {
            1
        } else {
            let least = panels.div_ceil(self.panels()).max(2 * threads);
            least.next_multiple_of(threads).min(panels)
        };
        let rows = (2 * threads).div_ceil(columns).min(self.broadcast.count.div_ceil(TASK_ROWS)).max(1);
        [rows, columns]
    }

    /// The same where making parts costs most: as many tasks as there may be, of such a shape that as few as possible are made.
    fn split_in_parts(&self, panels: usize, tasks: usize) -> [usize; 2] {
        let turned = |along: bool| if along { 3 } else { 2 };
        let stage = self.broadcast.count * turned(self.broadcast.strides[1] != 1);
        let pack = self.vectors.count * turned(self.vectors.strides[0] != 1);
        let most = self.broadcast.count.div_ceil(self.arithmetic.rows());
        let shapes = (1..=tasks.min(panels)).map(|columns| [tasks.div_ceil(columns).min(most), columns]);
        let cost = |&[rows, columns]: &[usize; 2]| {
            let groups = panels.div_ceil(columns).div_ceil(self.panels());
            (usize::MAX - tasks.min(rows * columns), stage * columns * groups + pack * rows)
        };
        shapes.min_by_key(cost).unwrap_or([1, 1])
    }

    /// Panels of the vector side.
    fn all_panels(&self) -> usize {
        self.vectors.count.div_ceil(self.arithmetic.width())
    }

    /// Words of the inner dimension.
    fn words(&self) -> usize {
        self.k.div_ceil(self.arithmetic.pair())
    }

    /// Words of the inner dimension that are summed at a time: parts of like size, whole registers.
    fn depth(&self) -> usize {
        let words = self.words();
        let most = match self.vectors.parts {
            _ if words > SHORT[0] => SHORT[1],
            1 => DEPTH,
            _ => PARTS_DEPTH,
        };
        words.div_ceil(words.div_ceil(most)).next_multiple_of(16)
    }

    /// Panels of the vector side that are packed at a time.
    fn panels(&self) -> usize {
        let parts = self.vectors.parts;
        (self.arithmetic.packed(parts) / (self.depth() * self.arithmetic.width() * parts)).max(1)
    }

    /// The product of some rows of the broadcast side with some panels of the vector side.
    fn part(&self, [rows, panels]: [std::ops::Range<usize>; 2]) {
        let (pair, high) = (self.arithmetic.pair(), self.arithmetic.rows());
        let (words, depth) = (self.words(), self.depth());
        let step = self.panels().min(panels.len()).max(1);
        let width = self.arithmetic.width();
        let panel = depth * width * self.vectors.parts;
        let room = step * panel;
        // SAFETY: they are available where this arithmetic is chosen, and this thread comes here once at a time.
        let _tiles = (self.arithmetic == Arithmetic::Tiles).then(|| unsafe { tiles::Tiles::take() });
        with_words(room + self.arithmetic.staged() * depth * self.broadcast.parts, |scratch| {
            let stage = scratch.wrapping_add(room);
            for from in panels.clone().step_by(step) {
                let panels = from..panels.end.min(from + step);
                for start in (0..words).step_by(depth) {
                    let inner = [start * pair, self.k.min((start + depth) * pair)];
                    // SAFETY: the scratch has room for these panels and a stage, and all indices exist.
                    unsafe {
                        let room = |index| scratch.add(index * panel);
                        let lies = |panel| rows.len() <= FEW && pack::lies(self, panel);
                        // Only the last may not lie in its place where others do.
                        let lying = panels.clone().take_while(|&panel| lies(panel)).count();
                        pack::panels(self, panels.start + lying..panels.end, inner, (room(lying), panel));
                        for row in rows.clone().step_by(high) {
                            let tile = row..rows.end.min(row + high);
                            let next = if tile.end < rows.end { tile.end } else { rows.start };
                            let left = pack::stage(self, (tile.clone(), next), inner, stage);
                            for (index, column) in panels.clone().enumerate() {
                                let right = match index < lying {
                                    true => pack::where_it_lies(self, column, inner),
                                    false => micro::Right { words: room(index), stride: width },
                                };
                                micro::tile(self, (left, right), inner, (tile.clone(), column));
                            }
                        }
                    }
                }
            }
        });
    }
}
