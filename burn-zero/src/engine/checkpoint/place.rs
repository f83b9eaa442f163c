//! The place of a saved piece in its tensor.

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The place of a saved piece: the values `start` to `start + length` of a flattened rectangle, which begins at `offset`
/// in the tensor of shape `whole`. Ranks that divide a tensor by rows or columns hold rectangles, and ZeRO divides these
/// into flat pieces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "StoredPlace")]
pub(super) struct Place {
    offset: Vec<usize>,
    shape: Vec<usize>,
    pub whole: Vec<usize>,
    start: usize,
    /// None in files of earlier versions: all values of the stored tensor.
    length: Option<usize>,
}

/// A place as it stands in a file.
#[derive(Deserialize)]
#[serde(untagged)]
enum StoredPlace {
    Rectangle {
        offset: Vec<usize>,
        shape: Vec<usize>,
        whole: Vec<usize>,
        start: usize,
        length: usize,
    },
    /// The form of earlier versions: the first value, and the shape of the tensor.
    Flat(usize, Vec<usize>),
}

impl From<StoredPlace> for Place {
    fn from(stored: StoredPlace) -> Self {
        match stored {
            StoredPlace::Rectangle { offset, shape, whole, start, length } => {
                Self { offset, shape, whole, start, length: Some(length) }
            }
            StoredPlace::Flat(start, whole) => Self { start, length: None, ..Self::of_whole(whole) },
        }
    }
}

/// Consecutive values of a piece, and where they stand in the flattened tensor.
pub(super) struct Run {
    /// The values in the tensor.
    pub whole: Range<usize>,
    /// The first of them in the piece.
    pub piece: usize,
}

impl Place {
    /// Returns the place of a whole tensor.
    pub(super) fn of_whole(whole: Vec<usize>) -> Self {
        Self { offset: vec![0; whole.len()], shape: whole.clone(), whole, start: 0, length: None }
    }

    /// Returns the place of the values `range` of a flattened tensor.
    pub(super) fn flat(range: &Range<usize>, whole: Vec<usize>) -> Self {
        Self { start: range.start, length: Some(range.len()), ..Self::of_whole(whole) }
    }

    /// Returns true if a piece of `values` values can stand here.
    pub(super) fn fits(&self, values: usize) -> bool {
        let inside = |((offset, size), whole): ((&usize, &usize), &usize)| {
            offset.checked_add(*size).is_some_and(|end| end <= *whole)
        };
        let ranks = [self.offset.len(), self.shape.len()] == [self.whole.len(); 2];
        let bytes = self.whole.iter().try_fold(4usize, |bytes, &size| bytes.checked_mul(size));
        let size = self.shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        let end = self.start.checked_add(values);
        ranks
            && bytes.is_some()
            && self.offset.iter().zip(&self.shape).zip(&self.whole).all(inside)
            && end.zip(size).is_some_and(|(end, size)| end <= size)
            && self.length.is_none_or(|length| length == values)
    }

    /// Returns the runs of a piece of `values` values, in its order.
    pub(super) fn runs(&self, values: usize) -> impl Iterator<Item = Run> {
        let piece = self.start..self.start + values;
        // Rows of a rectangle as wide as the tensor follow each other: from the last dimension that is cut, each index
        // of the dimensions before it is a run.
        let cut = (0..self.whole.len()).rev().find(|&dim| self.shape[dim] != self.whole[dim]).unwrap_or(0);
        let length = self.shape.iter().skip(cut).product::<usize>().max(1);
        let first = piece.start / length;
        (first..piece.end.div_ceil(length)).map(move |row| {
            let (from, to) = (piece.start.max(row * length), piece.end.min((row + 1) * length));
            let start = self.position(row, cut) + from - row * length;
            Run { whole: start..start + to - from, piece: from - piece.start }
        })
    }

    /// Returns where run `row` begins in the flattened tensor; the dimensions before `cut` count the runs.
    fn position(&self, mut row: usize, cut: usize) -> usize {
        let stride = |dim: usize| self.whole.iter().skip(dim + 1).product::<usize>();
        let mut position: usize = (cut..self.whole.len()).map(|dim| self.offset[dim] * stride(dim)).sum();
        for dim in (0..cut).rev() {
            position += (self.offset[dim] + row % self.shape[dim]) * stride(dim);
            row /= self.shape[dim];
        }
        position
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every rectangle of a tensor, cut into flat pieces, covers its own values of the tensor, once and in order.
    #[test]
    fn the_runs_of_a_piece_are_the_values_of_its_rectangle() {
        for whole in [vec![12], vec![3, 5], vec![2, 3, 4], vec![]] {
            let n: usize = whole.iter().product();
            for case in 0..40 {
                let bounds = |dim: usize| {
                    let (from, size) = ((case * (dim + 3)) % whole[dim], whole[dim]);
                    (from, 1 + (case * 7 + dim) % (size - from))
                };
                let (offset, shape): (Vec<_>, Vec<_>) = (0..whole.len()).map(bounds).unzip();
                let inside = |flat: usize| {
                    let mut rest = flat;
                    (0..whole.len()).rev().all(|dim| {
                        let at = rest % whole[dim];
                        rest /= whole[dim];
                        (offset[dim]..offset[dim] + shape[dim]).contains(&at)
                    })
                };
                let expected: Vec<usize> = (0..n).filter(|&flat| inside(flat)).collect();
                for pieces in 1..=3 {
                    let mut found = Vec::new();
                    for piece in 0..pieces {
                        let cut = |piece: usize| expected.len() * piece / pieces;
                        let (start, length) = (cut(piece), cut(piece + 1) - cut(piece));
                        let (offset, shape, whole) = (offset.clone(), shape.clone(), whole.clone());
                        let place = Place { offset, shape, whole, start, length: Some(length) };
                        assert!(place.fits(length) && !place.fits(length + 1), "{place:?}");
                        for run in place.runs(length) {
                            assert_eq!(run.piece, found.len() - start, "{place:?}");
                            found.extend(run.whole);
                        }
                    }
                    assert_eq!(found, expected, "{offset:?} {shape:?} of {whole:?}");
                }
            }
        }
    }

    #[test]
    fn places_of_earlier_versions_are_read() {
        let old: Place = serde_json::from_str("[256, [3, 200]]").unwrap();
        assert_eq!(old, Place { start: 256, ..Place::of_whole(vec![3, 200]) });
        assert!(old.fits(344) && !old.fits(345));
        let place = Place::flat(&(5..9), vec![2, 6]);
        let text = serde_json::to_string(&place).unwrap();
        assert_eq!(text, r#"{"offset":[0,0],"shape":[2,6],"whole":[2,6],"start":5,"length":4}"#);
        assert_eq!(serde_json::from_str::<Place>(&text).unwrap(), place);
    }
}
