//! The products of a linear layer on Flex's own buffers: nothing is cleared before it is written, and no weight is copied,
//! whatever it is stored in.

mod dense;
mod dots;
pub mod few;
mod floats;
#[cfg(target_arch = "x86_64")]
mod integers;
mod rows;

use super::{Compute, LinearKernels, awake::awake, by_tensors, float_dtype, scratch::vectorized};
use crate::packed::{self, Packed};
use burn::{
    backend::Flex,
    tensor::{DType, FloatDType, Shape, TensorData, TensorMetadata, ops::FloatTensorOps},
};
use burn_flex::FlexTensor;
use rayon::prelude::*;
use rows::Rows;

impl LinearKernels for Flex {
    fn linear_forward(x: FlexTensor, weight: FlexTensor, compute: Compute) -> FlexTensor {
        match x.dtype() {
            DType::F64 => by_tensors::forward::<Self>(x, weight, compute),
            _ => in_f32(x, |x| rows::forward(x, &Rows::floats(weight), compute)),
        }
    }

    fn linear_backward_input(
        dy: FlexTensor,
        weight: FlexTensor,
        found: Option<FlexTensor>,
        compute: Compute,
    ) -> FlexTensor {
        match dy.dtype() {
            DType::F32 => rows::backward_input(&dy, &Rows::floats(weight), found, compute),
            DType::F64 => super::added::<Self>(by_tensors::backward_input::<Self>(dy, weight, compute), found),
            _ => super::added::<Self>(
                in_f32(dy, |dy| rows::backward_input(dy, &Rows::floats(weight), None, compute)),
                found,
            ),
        }
    }

    fn linear_backward_weight(x: FlexTensor, dy: FlexTensor, compute: Compute) -> FlexTensor {
        if x.dtype() == DType::F64 {
            return by_tensors::backward_weight::<Self>(x, dy, compute);
        }
        let dy = float(dy);
        in_f32(x, |x| {
            dense::with_matrix(x, |x| dense::with_matrix(&dy, |dy| dense::product(dy.transposed(), x, compute)))
        })
    }

    fn unpack(weight: &Packed<Self>) -> FlexTensor {
        Rows::packed(weight).unpack()
    }

    fn packed_forward(x: FlexTensor, weight: &Packed<Self>, compute: Compute) -> FlexTensor {
        match x.dtype() {
            DType::F64 => packed::forward(x, weight, compute),
            _ => in_f32(x, |x| rows::forward(x, &Rows::packed(weight), compute)),
        }
    }

    fn packed_backward_input(
        dy: FlexTensor,
        weight: &Packed<Self>,
        found: Option<FlexTensor>,
        compute: Compute,
    ) -> FlexTensor {
        match dy.dtype() {
            DType::F32 => rows::backward_input(&dy, &Rows::packed(weight), found, compute),
            DType::F64 => super::added::<Self>(packed::backward_input(dy, weight, compute), found),
            _ => super::added::<Self>(
                in_f32(dy, |dy| rows::backward_input(dy, &Rows::packed(weight), None, compute)),
                found,
            ),
        }
    }

    fn add(mut x: FlexTensor, y: FlexTensor) -> FlexTensor {
        let y = y.to_contiguous();
        match own_values(&mut x).filter(|_| y.dtype() == DType::F32) {
            Some(x) => x.par_chunks_mut(PART).zip(y.storage::<f32>().par_chunks(PART)).for_each(|(x, y)| {
                vectorized(
                    #[inline(always)]
                    || x.iter_mut().zip(y).for_each(|(x, y)| *x += y),
                );
            }),
            None => return Self::float_add(x, y),
        }
        x
    }

    fn at_work<R>(work: impl FnOnce() -> R) -> R {
        awake(work)
    }

    /// Flex's own assignment of a slice copies what it assigns to.
    fn overwrite(mut target: FlexTensor, values: FlexTensor) -> FlexTensor {
        assert_eq!((target.dtype(), target.shape()), (DType::F32, values.shape()), "what is overwritten and by what");
        let values = values.to_contiguous();
        match own_values(&mut target) {
            Some(held) => held.copy_from_slice(values.storage()),
            None => return values,
        }
        target
    }
}

/// Values that a thread takes at a time.
const PART: usize = 1 << 14;

/// The values of a tensor of f32 that nobody else holds, in order and nothing beside them.
fn own_values(x: &mut FlexTensor) -> Option<&mut [f32]> {
    let whole = x.dtype() == DType::F32 && x.is_contiguous();
    let n = x.layout().num_elements();
    if whole { x.try_storage_mut::<f32>().filter(|held| held.len() == n) } else { None }
}

/// A tensor of the given values.
fn tensor(values: Vec<f32>, shape: [usize; 2]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, Shape::from(shape)))
}

/// In f32; f64 only where a weight of f64 meets activations that are not.
fn float(x: FlexTensor) -> FlexTensor {
    if x.dtype() == DType::F32 { x } else { Flex::float_cast(x, FloatDType::F32) }
}

/// Runs `work` on f32 and gives the result the type of `x`.
fn in_f32(x: FlexTensor, work: impl FnOnce(&FlexTensor) -> FlexTensor) -> FlexTensor {
    let dtype = x.dtype();
    let result = work(&float(x));
    if dtype == DType::F32 { result } else { Flex::float_cast(result, float_dtype(dtype)) }
}
