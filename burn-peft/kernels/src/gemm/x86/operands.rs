//! The operands of a product as the micro-kernels take them.

use super::super::{Matrix, MatrixData};
use std::{arch::x86_64::*, ops::Range};

/// Steps along k between a prefetch and the read of that memory.
pub(super) const PREFETCH_DISTANCE: usize = 4;

/// An operand, as `count` vectors along k: the rows of A or the columns of B.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    data: *const u8,
    /// True if the values are bf16, false if they are f32.
    pub(super) is_bf16: bool,
    /// The number of rows of A or columns of B.
    pub(super) count: usize,
    /// Strides in values: from one row of A (column of B) to the next, and along k.
    pub(super) strides: [usize; 2],
    /// The number of bf16 terms into which a value is split when it is packed: 3 for bf16x3, else 1.
    pub(super) terms: usize,
}

// SAFETY: the pointer stands for a shared slice of plain numbers, which all threads may read at the same time.
unsafe impl Sync for Operand {}

impl Operand {
    /// Takes the rows of a matrix. Values in f32 are split into `f32_terms` bf16 terms when they are packed.
    pub(super) fn new(matrix: Matrix<'_>, f32_terms: usize) -> Self {
        let (data, is_bf16) = match matrix.values {
            MatrixData::F32(values) => (values.as_ptr().cast(), false),
            MatrixData::Bf16(values) => (values.as_ptr().cast(), true),
        };
        let terms = if is_bf16 { 1 } else { f32_terms };
        Self { data, is_bf16, count: matrix.shape[0], strides: matrix.strides, terms }
    }

    /// Returns the address of a value. It may be dereferenced only if the value exists.
    #[inline(always)]
    pub(super) fn ptr(&self, vector: usize, k: usize) -> *const u8 {
        let size = if self.is_bf16 { 2 } else { 4 };
        self.data.wrapping_add((vector * self.strides[0] + k * self.strides[1]) * size)
    }
}

/// The output C in the orientation of the micro-kernel: row stride along A, column stride along B.
#[derive(Clone, Copy)]
pub(super) struct StridedOutput {
    pub(super) data: *mut f32,
    pub(super) strides: [usize; 2],
    pub(super) accumulate: bool,
    pub(super) alpha: f32,
}

// SAFETY: every task writes its own block of rows and columns, so no two threads access the same element.
unsafe impl Sync for StridedOutput {}

/// Rows of A that are multiplied at a time.
pub(super) struct RowBlock {
    pub(super) rows: Range<usize>,
    /// The first of the rows that are read after these.
    pub(super) next: usize,
}

/// Memory for packed micro-panels of B.
#[derive(Clone, Copy)]
pub(super) struct PackBuffer {
    pub(super) words: *mut u32,
    /// Words from one micro-panel to the next.
    pub(super) panel_words: usize,
}

impl PackBuffer {
    /// Returns the buffer without its first `count` micro-panels.
    #[inline(always)]
    pub(super) fn skip_panels(self, count: usize) -> Self {
        Self { words: self.words.wrapping_add(count * self.panel_words), ..self }
    }
}

/// A micro-panel of A: words with strides from row to row and along k.
#[derive(Clone, Copy)]
pub(super) struct MicroPanelA {
    pub(super) words: *const u32,
    pub(super) strides: [usize; 2],
    /// Offset in words from the first 16 rows to the remaining ones, for AMX tiles.
    pub(super) second_tile_offset: usize,
    /// The first of the rows that are read next, with the same strides; they are prefetched meanwhile.
    pub(super) next_rows: *const u32,
    /// The number of bf16 terms of a value.
    pub(super) terms: usize,
}

impl MicroPanelA {
    /// Creates a micro-panel of one term, after which no particular rows are prefetched.
    pub(super) fn new(words: *const u32, strides: [usize; 2]) -> Self {
        Self { words, strides, second_tile_offset: 16 * strides[0], next_rows: words, terms: 1 }
    }
}

/// A micro-panel of B: NR words at each step along k, and the stride in words from one step to the next.
#[derive(Clone, Copy)]
pub(super) struct MicroPanelB {
    pub(super) words: *const u32,
    pub(super) stride: usize,
    /// The number of bf16 terms of a value.
    pub(super) terms: usize,
}

/// The factors of a tile of C over a range of k.
#[derive(Clone, Copy)]
pub(super) struct TileTask {
    pub(super) a: MicroPanelA,
    pub(super) b: MicroPanelB,
    /// The number of rows of A.
    pub(super) rows: usize,
    /// The number of words along k in the range.
    pub(super) words: usize,
    /// The number of words along k in the whole product.
    pub(super) product_words: usize,
}

/// A tile of C.
#[derive(Clone, Copy)]
pub(super) struct OutputTile {
    pub(super) data: *mut f32,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
    pub(super) columns: usize,
    pub(super) accumulate: bool,
    pub(super) alpha: f32,
}

impl OutputTile {
    /// Prefetches the tile of C for writing while its sums are computed.
    pub(super) fn prefetch(&self, rows: usize) {
        let (lines, line_stride, line_parts) = match self.column_stride {
            1 => (rows, self.row_stride, self.columns.div_ceil(16)),
            _ => (self.columns, self.column_stride, 1),
        };
        for line in 0..lines {
            for part in 0..line_parts {
                let at = self.data.wrapping_add(line * line_stride + 16 * part);
                // SAFETY: a prefetch accesses no memory and may take any address.
                unsafe { _mm_prefetch::<_MM_HINT_ET0>(at.cast()) };
            }
        }
    }
}
