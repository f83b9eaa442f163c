//! The gradient of the token table, in one buffer: tensor operations add to a copy of a table of zeros.

use super::buffer::{contiguous, integers, tensor, values};
use burn_flex::FlexTensor;

pub(super) fn backward(rows: usize, ids: FlexTensor, dy: FlexTensor) -> FlexTensor {
    let dy = contiguous(dy);
    let [_, features] = dy.layout().shape().dims();
    let mut table = vec![0.0; rows * features];
    for (id, from) in integers(ids.into_data()).into_iter().zip(values(&dy).chunks_exact(features)) {
        let to = &mut table[id as usize * features..][..features];
        to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
    }
    tensor(table, &[rows, features])
}
