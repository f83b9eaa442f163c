//! Attention in tiles: a block of queries, of all heads that share a key head, against the span of keys visible to it.
//! Only the log-sum-exp of the scores is kept (Dao, 2023, arXiv:2307.08691).

mod tile;

use super::{
    buffer::{contiguous, tensor, uninit_vec, values},
    key_ranges::KeyRanges,
    vector_ops::add,
};
use crate::kernel::{AttentionMask, AttentionOutput};
use burn::backend::Flex;
use burn_flex::FlexTensor;
use burn_peft_kernels::gemm::Matrix;
use rayon::prelude::*;
use std::ops::Range;
use tile::AttentionTile;

/// The number of rows of scores in a tile: queries times the heads that share a key head.
const TILE_ROWS: usize = 192;
/// The number of queries whose partial gradients of keys and values are accumulated by one thread. It is fixed, so that
/// the order of summation does not depend on the number of threads.
const QUERIES_PER_PARTIAL: usize = 512;

/// The index of a key head of a row of the batch.
#[derive(Debug, Clone, Copy)]
struct HeadIndex {
    row: usize,
    head: usize,
}

/// The sizes of one attention call.
#[derive(Debug, Clone, Copy)]
struct AttentionShape {
    queries: usize,
    keys: usize,
    /// The number of query heads that share a key head.
    group: usize,
    kv_heads: usize,
    dim: usize,
}

impl AttentionShape {
    fn of(q: &FlexTensor, k: &FlexTensor) -> Self {
        let [_, queries, heads, dim] = q.layout().shape().dims();
        let [_, keys, kv_heads, _] = k.layout().shape().dims();
        Self { queries, keys, group: heads / kv_heads, kv_heads, dim }
    }

    /// Returns the number of queries of a tile.
    fn queries_per_tile(&self) -> usize {
        (TILE_ROWS / self.group).max(1)
    }

    /// Splits the queries `range` into tiles.
    fn tiles(self, range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let (block, end) = (self.queries_per_tile(), range.end);
        range.step_by(block).map(move |from| from..end.min(from + block))
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// Returns the index of the key head that is the `index`-th of all rows.
    fn head_index(&self, index: usize) -> HeadIndex {
        HeadIndex { row: index / self.kv_heads, head: index % self.kv_heads }
    }

    /// Returns the range of the values of one query in the buffers of queries and outputs: all heads that share a key
    /// head.
    fn group_range(&self, HeadIndex { row, head }: HeadIndex, query: usize) -> Range<usize> {
        let width = self.group * self.dim;
        let start = ((row * self.queries + query) * self.kv_heads + head) * width;
        start..start + width
    }

    /// Returns the keys (or values) `range` of one head as a matrix, `[range.len(), dim]`.
    fn head_matrix<'a>(&self, x: KvView<'a>, index: HeadIndex, range: &Range<usize>) -> Matrix<'a> {
        let stride = self.kv_heads * self.dim;
        let shape = [range.len(), self.dim];
        if range.is_empty() {
            return Matrix::new(&[], shape);
        }
        let start = index.row * x.row_stride + range.start * stride + index.head * self.dim;
        Matrix::strided(&x.values[start..], shape, stride)
    }

    /// Returns the index of query 0 of one head of the group in the log-sum-exp, `[rows, kv_heads, group, queries]`.
    fn lse_index(&self, HeadIndex { row, head }: HeadIndex, member: usize) -> usize {
        ((row * self.kv_heads + head) * self.group + member) * self.queries
    }
}

/// A view of keys or values `[rows, keys, kv_heads, dim]`, possibly the used part of a larger buffer.
#[derive(Debug, Clone, Copy)]
struct KvView<'a> {
    values: &'a [f32],
    /// The stride from one row to the next.
    row_stride: usize,
}

impl<'a> KvView<'a> {
    fn of(tensor: &'a FlexTensor) -> Self {
        let layout = tensor.layout();
        Self { values: &tensor.storage::<f32>()[layout.start_offset()..], row_stride: layout.strides()[0] as usize }
    }
}

/// Makes the keys of each row contiguous; copies nothing if only the row stride is larger than a row.
fn contiguous_rows(tensor: FlexTensor) -> FlexTensor {
    let [_, _, heads, dim]: [usize; 4] = tensor.layout().shape().dims();
    let in_order = tensor.layout().strides()[1..] == [(heads * dim) as isize, dim as isize, 1];
    if in_order && tensor.layout().strides()[0] >= 0 { tensor } else { contiguous(tensor) }
}

/// A buffer into which parallel tasks write disjoint ranges.
struct DisjointSlices(*mut f32);
// SAFETY: the pointer is used only through `write`, whose contract rules out that two tasks access the same values.
unsafe impl Sync for DisjointSlices {}

impl DisjointSlices {
    /// Calls `work` with a range of the buffer.
    ///
    /// # Safety
    /// The range must lie in the buffer, which must outlive the call, and nothing else may access the range meanwhile.
    unsafe fn write(&self, at: Range<usize>, work: impl FnOnce(&mut [f32])) {
        // SAFETY: the range lies in the live buffer and nothing else accesses it, so the mutable slice is valid and
        // unique.
        work(unsafe { std::slice::from_raw_parts_mut(self.0.add(at.start), at.len()) });
    }
}

/// The inputs of the forward pass.
#[derive(Debug, Clone, Copy)]
struct AttentionInputs<'a> {
    /// The queries, `[rows, queries, heads, dim]`.
    q: &'a [f32],
    k: KvView<'a>,
    v: KvView<'a>,
}

/// The inputs of the backward pass.
#[derive(Debug, Clone, Copy)]
struct BackwardInputs<'a> {
    qkv: AttentionInputs<'a>,
    /// The log-sum-exp of the scores, `[rows, kv_heads, group, queries]`.
    lse: &'a [f32],
    /// The gradient of the output, in the shape of the queries.
    dy: &'a [f32],
}

pub(super) fn forward([q, k, v]: [FlexTensor; 3], mask: &AttentionMask<Flex>) -> AttentionOutput<Flex> {
    let (q, k, v) = (contiguous(q), contiguous_rows(k), contiguous_rows(v));
    let (sizes, rows) = (AttentionShape::of(&q, &k), q.layout().shape()[0]);
    let visible = KeyRanges::of_batch(mask);
    let lse_len = rows * sizes.kv_heads * sizes.group * sizes.queries;
    // SAFETY: the tiles of all rows and heads cover both buffers, and each tile writes its part of them.
    let (mut output, mut lse) = unsafe { (uninit_vec(values(&q).len()), uninit_vec(lse_len)) };
    let (out, sums) = (DisjointSlices(output.as_mut_ptr()), DisjointSlices(lse.as_mut_ptr()));
    let tiles: Vec<_> = sizes.tiles(0..sizes.queries).collect();
    (0..rows * sizes.kv_heads * tiles.len()).into_par_iter().for_each(|task| {
        let index = sizes.head_index(task / tiles.len());
        let inputs = AttentionInputs { q: values(&q), k: KvView::of(&k), v: KvView::of(&v) };
        let tile = AttentionTile::new(sizes, index, tiles[task % tiles.len()].clone(), &visible[index.row]);
        tile.forward(inputs, &out, &sums);
    });
    let shape = q.layout().shape().to_vec();
    let lse = tensor(lse, &[rows, sizes.kv_heads, sizes.group, sizes.queries]);
    AttentionOutput { output: tensor(output, &shape), lse }
}

/// The partial gradients of keys and values from one block of queries.
struct PartialKvGradients {
    index: HeadIndex,
    /// The keys that the queries attend to.
    span: Range<usize>,
    /// The gradients of the keys and of the values, `[2, span, dim]`.
    gradients: Vec<f32>,
}

impl PartialKvGradients {
    /// Adds the gradients to those of all keys and of all values.
    fn add_to(&self, sizes: AttentionShape, dk: &mut [f32], dv: &mut [f32]) {
        let (HeadIndex { row, head }, stride) = (self.index, sizes.kv_heads * sizes.dim);
        let (dk_part, dv_part) = self.gradients.split_at(self.gradients.len() / 2);
        for (whole, part) in [(dk, dk_part), (dv, dv_part)] {
            for (key, part) in self.span.clone().zip(part.chunks_exact(sizes.dim)) {
                let start = (row * sizes.keys + key) * stride + head * sizes.dim;
                add(&mut whole[start..start + sizes.dim], part);
            }
        }
    }
}

pub(super) fn backward(
    qkv: [FlexTensor; 3],
    mask: &AttentionMask<Flex>,
    lse: FlexTensor,
    dy: FlexTensor,
) -> [FlexTensor; 3] {
    let ([q, k, v], [lse, dy]) = (qkv.map(contiguous), [lse, dy].map(contiguous));
    let (sizes, rows) = (AttentionShape::of(&q, &k), q.layout().shape()[0]);
    let visible = KeyRanges::of_batch(mask);
    // SAFETY: the tiles of all rows and heads cover the buffer, and each tile writes its part of it.
    let mut dq = unsafe { uninit_vec(values(&q).len()) };
    let gradient = DisjointSlices(dq.as_mut_ptr());
    let blocks: Vec<_> = (0..sizes.queries)
        .step_by(QUERIES_PER_PARTIAL)
        .map(|from| from..sizes.queries.min(from + QUERIES_PER_PARTIAL))
        .collect();
    let qkv = AttentionInputs { q: values(&q), k: KvView::of(&k), v: KvView::of(&v) };
    let inputs = BackwardInputs { qkv, lse: values(&lse), dy: values(&dy) };
    let partial = |task: usize| {
        let (index, block) = (sizes.head_index(task / blocks.len()), blocks[task % blocks.len()].clone());
        let visible = &visible[index.row];
        let span = visible.span(block.clone());
        let gradients = vec![0.0; 2 * span.len() * sizes.dim];
        let mut partial = PartialKvGradients { index, span, gradients };
        for queries in sizes.tiles(block) {
            AttentionTile::new(sizes, index, queries, visible).backward(inputs, &gradient, &mut partial);
        }
        partial
    };
    let partials: Vec<PartialKvGradients> =
        (0..rows * sizes.kv_heads * blocks.len()).into_par_iter().map(partial).collect();
    let (mut dk, mut dv) = (vec![0.0; values(&k).len()], vec![0.0; values(&v).len()]);
    partials.iter().for_each(|partial| partial.add_to(sizes, &mut dk, &mut dv));
    let (shape, kv_shape) = (q.layout().shape().to_vec(), k.layout().shape().to_vec());
    [tensor(dq, &shape), tensor(dk, &kv_shape), tensor(dv, &kv_shape)]
}
