//! The places of tokens in a batch, and which of them see each other.

use burn::tensor::{
    Bool, DType, Int, Tensor, TensorData,
    backend::{AutodiffBackend, Backend},
    s,
};
use burn_peft::{ForwardContext, TokenPosition};
use std::{ops::Range, sync::Arc};

/// The slots of a batch of `rows` × `length`: the sequence (segment) of each and its position there.
///
/// Padding is a segment of its own, so that every slot can attend to at least one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceLayout {
    /// The number of rows.
    pub rows: usize,
    /// The number of slots per row.
    pub length: usize,
    /// The segment of each slot, `[rows · length]`; 0 is padding.
    pub segments: Vec<i32>,
    /// The position of each slot, `[rows · length]`; counted from 0 in every segment.
    pub positions: Vec<i32>,
}

/// A layout with slots for virtual tokens.
pub(crate) struct VirtualTokenLayout {
    pub(crate) layout: SequenceLayout,
    /// The embedding of each slot: its old slot, or `rows · length + j` for the `j`-th virtual token. Those of padding
    /// are arbitrary.
    pub(crate) sources: Vec<i32>,
}

/// A slot of a layout with virtual tokens.
struct Slot {
    segment: i32,
    position: i32,
    /// The embedding of the slot, as in [`VirtualTokenLayout::sources`].
    source: i32,
}

impl SequenceLayout {
    /// Lays out one sequence per row, padded on the right to the longest.
    pub fn padded(lengths: &[usize]) -> Self {
        Self::packed(&lengths.iter().map(|&n| vec![n]).collect::<Vec<_>>())
    }

    /// Packs several sequences into each row, one after the other, padded on the right to the longest row.
    pub fn packed(rows: &[Vec<usize>]) -> Self {
        let length = rows.iter().map(|row| row.iter().sum()).max().unwrap_or(0);
        let (mut segments, mut positions) = (Vec::new(), Vec::new());
        for row in rows {
            let used: usize = row.iter().sum();
            for (segment, &n) in row.iter().enumerate() {
                segments.extend(std::iter::repeat_n(segment as i32 + 1, n));
                positions.extend(0..n as i32);
            }
            segments.extend(std::iter::repeat_n(0, length - used));
            positions.extend(0..(length - used) as i32);
        }
        Self { rows: rows.len(), length, segments, positions }
    }

    /// Lays out sequences of the given lengths: all in one row if `packed`, otherwise each in its own row.
    pub fn from_lengths(lengths: &[usize], packed: bool) -> Self {
        if packed { Self::packed(&[lengths.to_vec()]) } else { Self::padded(lengths) }
    }

    /// Returns the slots that hold a token, in order, each with its sequence (counted over all rows) and its index
    /// there.
    pub fn slots(&self) -> impl Iterator<Item = (usize, TokenPosition)> {
        let (mut sequence, mut last) = (0, None);
        self.segments.iter().zip(&self.positions).enumerate().filter(|(_, (segment, _))| **segment != 0).map(
            move |(slot, (&segment, &position))| {
                let own = (slot / self.length, segment);
                sequence += u64::from(last.is_some_and(|last| last != own));
                last = Some(own);
                (slot, TokenPosition { row: sequence, index: position as u32 })
            },
        )
    }

    /// Returns the token identity of every slot, which keys its dropout, with sequences counted from `first`. Slots
    /// without a token share one identity.
    pub fn dropout_tokens(&self, first: u64) -> Arc<[TokenPosition]> {
        let mut tokens = vec![TokenPosition { row: first, index: u32::MAX }; self.segments.len()];
        for (slot, token) in self.slots() {
            tokens[slot] = TokenPosition { row: first + token.row, ..token };
        }
        tokens.into()
    }

    /// Lays out one more token for every row, at the given positions, all in segment 1.
    pub(crate) fn next_token(positions: &[usize]) -> Self {
        let rows = positions.len();
        Self { rows, length: 1, segments: vec![1; rows], positions: positions.iter().map(|&p| p as i32).collect() }
    }

    /// Adds to every position of a row the offset `by(row)`, the number of virtual tokens before it.
    pub(crate) fn with_position_offsets(&self, by: impl Fn(usize) -> usize) -> Self {
        let later = |(slot, position): (usize, &i32)| position + by(slot / self.length) as i32;
        Self { positions: self.positions.iter().enumerate().map(later).collect(), ..self.clone() }
    }

    /// Inserts slots for virtual tokens in front of every sequence, those of the row's range. Rows are padded again to
    /// the longest.
    pub(crate) fn with_virtual_tokens(&self, ranges: &[Range<usize>]) -> VirtualTokenLayout {
        let mut rows: Vec<Vec<Slot>> = Vec::with_capacity(self.rows);
        let slots = (self.rows * self.length) as i32;
        for (row, front) in ranges.iter().enumerate() {
            let (mut new, mut last) = (Vec::new(), 0);
            for slot in row * self.length..(row + 1) * self.length {
                let (segment, position) = (self.segments[slot], self.positions[slot]);
                if segment == 0 {
                    continue;
                }
                if segment != last {
                    let virtual_tokens = front.clone().enumerate();
                    new.extend(virtual_tokens.map(|(j, token)| Slot {
                        segment,
                        position: j as i32,
                        source: slots + token as i32,
                    }));
                    last = segment;
                }
                new.push(Slot { segment, position: position + front.len() as i32, source: slot as i32 });
            }
            rows.push(new);
        }
        let length = rows.iter().map(Vec::len).max().unwrap_or(0);
        for row in &mut rows {
            let used = row.len();
            row.extend((0..length - used).map(|position| Slot { segment: 0, position: position as i32, source: 0 }));
        }
        let all = || rows.iter().flatten();
        let layout = Self {
            rows: self.rows,
            length,
            segments: all().map(|slot| slot.segment).collect(),
            positions: all().map(|slot| slot.position).collect(),
        };
        VirtualTokenLayout { layout, sources: all().map(|slot| slot.source).collect() }
    }

    /// Returns the largest position plus one.
    pub(crate) fn num_positions(&self) -> usize {
        self.positions.iter().max().map_or(0, |&p| p as usize + 1)
    }
}

/// The attention mask by segments and positions. A query attends to a key of its own segment (or of the segment
/// [`AttentionMask::ANY_SEGMENT`]) at its own position or before, and within the sliding window if there is one.
#[derive(Debug, Clone)]
pub struct AttentionMask<B: Backend> {
    /// The segment of each query, `[rows, queries]`.
    pub query_segments: Tensor<B, 2, Int>,
    /// The position of each query, `[rows, queries]`.
    pub query_positions: Tensor<B, 2, Int>,
    /// The segment of each key, `[rows, keys]`.
    pub key_segments: Tensor<B, 2, Int>,
    /// The position of each key, `[rows, keys]`.
    pub key_positions: Tensor<B, 2, Int>,
    /// The sliding window: a query attends only to the last `window` positions, its own included.
    pub window: Option<usize>,
}

impl<B: Backend> AttentionMask<B> {
    /// The segment of keys that are visible to every query of their row, such as a trained prefix.
    pub const ANY_SEGMENT: i32 = -1;
    /// The segment of slots that hold no key.
    pub const EMPTY_SEGMENT: i32 = -2;

    /// Returns true for the masked pairs of the given queries and the first `keys` keys:
    /// `[rows, 1, 1, queries.len(), keys]`.
    pub(crate) fn masked(&self, queries: Range<usize>, keys: usize) -> Tensor<B, 5, Bool> {
        let q = |ids: &Tensor<B, 2, Int>| ids.clone().slice(s![.., queries.clone()]).unsqueeze_dim::<3>(2);
        let k = |ids: &Tensor<B, 2, Int>| ids.clone().slice(s![.., ..keys]).unsqueeze_dim::<3>(1);
        let shape = [self.query_segments.dims()[0], queries.len(), keys];
        let key_segments = k(&self.key_segments).expand(shape);
        let other_segment = key_segments.clone().not_equal(q(&self.query_segments).expand(shape));
        let other_segment = other_segment.bool_and(key_segments.not_equal_elem(Self::ANY_SEGMENT));
        let distance = q(&self.query_positions).expand(shape) - k(&self.key_positions).expand(shape);
        let mut masked = other_segment.bool_or(distance.clone().lower_elem(0));
        if let Some(window) = self.window {
            masked = masked.bool_or(distance.greater_equal_elem(window as i32));
        }
        masked.unsqueeze_dims::<5>(&[1, 1])
    }
}

impl<B: AutodiffBackend> AttentionMask<B> {
    /// Returns the same mask for the backend without autodiff.
    pub(crate) fn inner(&self) -> AttentionMask<B::InnerBackend> {
        AttentionMask {
            query_segments: self.query_segments.clone().inner(),
            query_positions: self.query_positions.clone().inner(),
            key_segments: self.key_segments.clone().inner(),
            key_positions: self.key_positions.clone().inner(),
            window: self.window,
        }
    }
}

/// The inputs of attention that all blocks of one forward pass share: rotary tables and attention mask, on the device.
#[derive(Debug, Clone)]
pub struct AttentionContext<B: Backend> {
    /// The number of rows of the batch.
    pub rows: usize,
    /// The number of new slots per row.
    pub length: usize,
    /// Cosines of the rotary angles, `[rows · length, head_dim / 2]`.
    pub cos: Tensor<B, 2>,
    /// Sines of the rotary angles, `[rows · length, head_dim / 2]`.
    pub sin: Tensor<B, 2>,
    /// The attention mask, keys in the KV cache included.
    pub attention_mask: AttentionMask<B>,
}

#[cfg(feature = "zero")]
impl<B: AutodiffBackend> AttentionContext<B> {
    /// Returns the same inputs for the backend without autodiff.
    pub(crate) fn inner(&self) -> AttentionContext<B::InnerBackend> {
        AttentionContext {
            rows: self.rows,
            length: self.length,
            cos: self.cos.clone().inner(),
            sin: self.sin.clone().inner(),
            attention_mask: self.attention_mask.inner(),
        }
    }
}

/// The slots whose final hidden states are needed. Only these go through the output projection and the MLP of the last
/// layer, since no later layer needs keys of the others.
#[derive(Debug, Clone)]
pub struct OutputSlots<B: Backend> {
    /// The slots, as indices into those of the batch, `[n]`.
    pub slots: Tensor<B, 1, Int>,
    /// The forward context of these slots.
    pub forward_context: ForwardContext,
}

impl<B: Backend> OutputSlots<B> {
    /// Selects the given slots of a forward pass.
    pub(crate) fn new(slots: Vec<i32>, forward_context: &ForwardContext, device: &B::Device) -> Self {
        let forward_context = forward_context.select(&slots);
        Self { slots: index_tensor(slots, device), forward_context }
    }
}

#[cfg(feature = "zero")]
impl<B: AutodiffBackend> OutputSlots<B> {
    /// Returns the same slots for the backend without autodiff.
    pub(crate) fn inner(&self) -> OutputSlots<B::InnerBackend> {
        OutputSlots { slots: self.slots.clone().inner(), forward_context: self.forward_context.clone() }
    }
}

/// The segments and the positions of the slots of one row.
#[derive(Debug, Clone, Copy)]
pub struct RowSlots<'a> {
    /// The segment of each slot.
    pub segments: &'a [i32],
    /// The position of each slot.
    pub positions: &'a [i32],
}

/// Returns the integers as a tensor on the device, `[rows, values.len() / rows]`.
pub(crate) fn int_tensor<B: Backend>(values: Vec<i32>, rows: usize, device: &B::Device) -> Tensor<B, 2, Int> {
    let columns = values.len() / rows.max(1);
    Tensor::from_data(TensorData::new(values, [rows, columns]), (device, DType::I32))
}

/// Returns the indices as a tensor on the device, `[values.len()]`.
pub(crate) fn index_tensor<B: Backend>(values: Vec<i32>, device: &B::Device) -> Tensor<B, 1, Int> {
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), (device, DType::I32))
}
