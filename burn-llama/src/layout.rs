//! Which token stands where in a batch.

use crate::kernel::Visibility;
use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};
use burn_peft::{Pass, Token};
use std::{ops::Range, sync::Arc};

/// The slots of a batch of `rows` × `length`: to which sequence each belongs and at which position.
///
/// Padding is a segment of its own, so that no slot ever sees nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The number of rows.
    pub rows: usize,
    /// Slots per row.
    pub length: usize,
    /// `[rows · length]`; 0 is padding.
    pub segments: Vec<i32>,
    /// `[rows · length]`; counted from 0 in every segment.
    pub positions: Vec<i32>,
}

impl Layout {
    /// One sequence per row, padded on the right to the longest.
    pub fn padded(lengths: &[usize]) -> Self {
        Self::packed(&lengths.iter().map(|&n| vec![n]).collect::<Vec<_>>())
    }

    /// Several sequences per row, one after the other, padded on the right to the longest row.
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

    /// Sequences of the given lengths, all in one row if `packed`, else each in its own.
    pub fn of(lengths: &[usize], packed: bool) -> Self {
        if packed { Self::packed(&[lengths.to_vec()]) } else { Self::padded(lengths) }
    }

    /// The slots that hold a token, in order, each with the sequence it belongs to (counted over all rows) and its place there.
    pub fn slots(&self) -> impl Iterator<Item = (usize, Token)> {
        let (mut sequence, mut last) = (0, None);
        self.segments.iter().zip(&self.positions).enumerate().filter(|(_, (segment, _))| **segment != 0).map(
            move |(slot, (&segment, &position))| {
                let own = (slot / self.length, segment);
                sequence += u64::from(last.is_some_and(|last| last != own));
                last = Some(own);
                (slot, Token { row: sequence, index: position as u32 })
            },
        )
    }

    /// The name of every slot for the noise of a pass, sequences counted from `first`. Slots without a token share a name.
    pub fn tokens(&self, first: u64) -> Arc<[Token]> {
        let mut tokens = vec![Token { row: first, index: u32::MAX }; self.segments.len()];
        for (slot, token) in self.slots() {
            tokens[slot] = Token { row: first + token.row, ..token };
        }
        tokens.into()
    }

    /// One more token for every row, at the given positions, all in segment 1.
    pub fn next(positions: &[usize]) -> Self {
        let rows = positions.len();
        Self { rows, length: 1, segments: vec![1; rows], positions: positions.iter().map(|&p| p as i32).collect() }
    }

    /// Every position of a row later by its number, as after that many virtual tokens.
    pub(crate) fn shifted(&self, by: impl Fn(usize) -> usize) -> Self {
        let later = |(slot, position): (usize, &i32)| position + by(slot / self.length) as i32;
        Self { positions: self.positions.iter().enumerate().map(later).collect(), ..self.clone() }
    }

    /// The layout with slots in front of every sequence, those of a row for the virtual tokens of its range, and for each slot its
    /// source: the slot that it had, or `rows · length + j` for the `j`-th virtual token. Rows are padded again to the longest, with
    /// sources that do not matter.
    pub(crate) fn preceded(&self, ranges: &[Range<usize>]) -> (Self, Vec<i32>) {
        let mut rows: Vec<Vec<(i32, i32, i32)>> = Vec::with_capacity(self.rows);
        let slots = (self.rows * self.length) as i32;
        for (row, front) in ranges.iter().enumerate() {
            let (mut new, mut last) = (Vec::new(), 0);
            for slot in row * self.length..(row + 1) * self.length {
                let (segment, position) = (self.segments[slot], self.positions[slot]);
                if segment == 0 {
                    continue;
                }
                if segment != last {
                    new.extend(front.clone().enumerate().map(|(j, source)| (segment, j as i32, slots + source as i32)));
                    last = segment;
                }
                new.push((segment, position + front.len() as i32, slot as i32));
            }
            rows.push(new);
        }
        let length = rows.iter().map(Vec::len).max().unwrap_or(0);
        for row in &mut rows {
            let used = row.len();
            row.extend((0..length - used).map(|position| (0, position as i32, 0)));
        }
        let all = || rows.iter().flatten();
        let layout = Self {
            rows: self.rows,
            length,
            segments: all().map(|slot| slot.0).collect(),
            positions: all().map(|slot| slot.1).collect(),
        };
        (layout, all().map(|slot| slot.2).collect())
    }

    /// The largest position, plus one.
    pub fn span(&self) -> usize {
        self.positions.iter().max().map_or(0, |&p| p as usize + 1)
    }
}

/// What every block of one forward pass needs: rotations and visibility, on the device.
#[derive(Debug, Clone)]
pub struct Context<B: Backend> {
    /// Rows of the batch.
    pub rows: usize,
    /// New slots per row.
    pub length: usize,
    /// `[rows · length, head_dim / 2]`.
    pub cos: Tensor<B, 2>,
    /// `[rows · length, head_dim / 2]`.
    pub sin: Tensor<B, 2>,
    /// Who sees whom, keys of the past included.
    pub visibility: Visibility<B>,
}

/// What is still wanted of the last layer once every token's keys have been seen: only these go through its output projection
/// and its MLP.
#[derive(Debug, Clone)]
pub struct Tail<B: Backend> {
    /// Their slots in the context, `[n]`.
    pub slots: Tensor<B, 1, Int>,
    /// The pass over them.
    pub pass: Pass,
}

impl<B: Backend> Tail<B> {
    /// The given slots of a pass.
    pub fn new(slots: Vec<i32>, pass: &Pass, device: &B::Device) -> Self {
        let (pass, n) = (pass.at(&slots), slots.len());
        Self { slots: Tensor::from_data(TensorData::new(slots, [n]), (device, DType::I32)), pass }
    }
}

/// Integers on the device, `[rows, values.len() / rows]`.
pub(crate) fn ints<B: Backend>(values: Vec<i32>, rows: usize, device: &B::Device) -> Tensor<B, 2, Int> {
    let columns = values.len() / rows.max(1);
    Tensor::from_data(TensorData::new(values, [rows, columns]), (device, DType::I32))
}
