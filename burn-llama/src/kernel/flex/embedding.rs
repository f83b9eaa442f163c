//! The gradient of the token embedding in a single buffer; tensor operations would copy a table of zeros to add to it.

use super::buffer::{contiguous, tensor, to_i32, values};
use burn_flex::FlexTensor;

pub(super) fn backward(rows: usize, ids: FlexTensor, dy: FlexTensor) -> FlexTensor {
    let dy = contiguous(dy);
    let [_, features] = dy.layout().shape().dims();
    let mut table = vec![0.0; rows * features];
    for (id, from) in to_i32(ids.into_data()).into_iter().zip(values(&dy).chunks_exact(features)) {
        let to = &mut table[id as usize * features..][..features];
        to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
    }
    tensor(table, &[rows, features])
}
