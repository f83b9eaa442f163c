//! Matrix products of a linear layer on Flex's own buffers: no output is cleared before it is written, and no weight is
//! copied, whatever its format.

mod dense;
mod linear;
mod spinning_pool;

use crate::{
    LinearKernels, MatmulPrecision, PackedWeight,
    instructions::vectorized,
    linear_kernels::{add_accumulated, float_dtype, portable, portable_packed},
    weight_rows::WeightRows,
};
use burn::{
    backend::Flex,
    module::ParamId,
    tensor::{DType, FloatDType, Shape, TensorData, TensorMetadata, ops::FloatTensorOps},
};
use burn_flex::FlexTensor;
use rayon::prelude::*;
use spinning_pool::with_spinning_pool;

impl LinearKernels for Flex {
    fn linear_forward(x: FlexTensor, weight: FlexTensor, _: Option<ParamId>, precision: MatmulPrecision) -> FlexTensor {
        match x.dtype() {
            DType::F64 => portable::forward::<Self>(x, weight, precision),
            _ => in_f32(x, |x| linear::forward(x, &WeightRows::from_floats(weight), precision)),
        }
    }

    fn linear_backward_input(
        dy: FlexTensor,
        weight: FlexTensor,
        accumulate_into: Option<FlexTensor>,
        precision: MatmulPrecision,
    ) -> FlexTensor {
        match dy.dtype() {
            DType::F32 => linear::backward_input(&dy, &WeightRows::from_floats(weight), accumulate_into, precision),
            DType::F64 => {
                add_accumulated::<Self>(portable::backward_input::<Self>(dy, weight, precision), accumulate_into)
            }
            _ => add_accumulated::<Self>(
                in_f32(dy, |dy| linear::backward_input(dy, &WeightRows::from_floats(weight), None, precision)),
                accumulate_into,
            ),
        }
    }

    fn linear_backward_weight(x: FlexTensor, dy: FlexTensor, precision: MatmulPrecision) -> FlexTensor {
        if x.dtype() == DType::F64 {
            return portable::backward_weight::<Self>(x, dy, precision);
        }
        let dy = to_f32(dy);
        in_f32(x, |x| {
            dense::with_matrix(x, |x| dense::with_matrix(&dy, |dy| dense::matmul(dy.transposed(), x, precision)))
        })
    }

    fn unpack(weight: &PackedWeight<Self>) -> FlexTensor {
        linear::unpack(&WeightRows::from_packed(weight))
    }

    fn packed_forward(x: FlexTensor, weight: &PackedWeight<Self>, precision: MatmulPrecision) -> FlexTensor {
        match x.dtype() {
            DType::F64 => portable_packed::forward(x, weight, precision),
            _ => in_f32(x, |x| linear::forward(x, &WeightRows::from_packed(weight), precision)),
        }
    }

    fn packed_backward_input(
        dy: FlexTensor,
        weight: &PackedWeight<Self>,
        accumulate_into: Option<FlexTensor>,
        precision: MatmulPrecision,
    ) -> FlexTensor {
        match dy.dtype() {
            DType::F32 => linear::backward_input(&dy, &WeightRows::from_packed(weight), accumulate_into, precision),
            DType::F64 => {
                add_accumulated::<Self>(portable_packed::backward_input(dy, weight, precision), accumulate_into)
            }
            _ => add_accumulated::<Self>(
                in_f32(dy, |dy| linear::backward_input(dy, &WeightRows::from_packed(weight), None, precision)),
                accumulate_into,
            ),
        }
    }

    fn add(mut x: FlexTensor, y: FlexTensor) -> FlexTensor {
        let y = y.to_contiguous();
        match unique_values_mut(&mut x).filter(|_| y.dtype() == DType::F32) {
            Some(x) => x.par_chunks_mut(ADD_CHUNK).zip(y.storage::<f32>().par_chunks(ADD_CHUNK)).for_each(|(x, y)| {
                vectorized(
                    #[inline(always)]
                    || x.iter_mut().zip(y).for_each(|(x, y)| *x += y),
                );
            }),
            None => return Self::float_add(x, y),
        }
        x
    }

    fn with_spinning_pool<R>(work: impl FnOnce() -> R) -> R {
        with_spinning_pool(work)
    }

    /// Copies in place; Flex's own slice assignment copies the target first.
    fn overwrite(mut target: FlexTensor, values: FlexTensor) -> FlexTensor {
        assert_eq!((target.dtype(), target.shape()), (DType::F32, values.shape()), "types or shapes differ");
        let values = values.to_contiguous();
        match unique_values_mut(&mut target) {
            Some(held) => held.copy_from_slice(values.storage()),
            None => return values,
        }
        target
    }
}

/// Values that a task adds at a time.
const ADD_CHUNK: usize = 1 << 14;

/// Returns the values of a contiguous f32 tensor if it spans its whole buffer and no other tensor shares it.
fn unique_values_mut(x: &mut FlexTensor) -> Option<&mut [f32]> {
    let whole = x.dtype() == DType::F32 && x.is_contiguous();
    let n = x.layout().num_elements();
    if whole { x.try_storage_mut::<f32>().filter(|held| held.len() == n) } else { None }
}

/// Creates a tensor from the given values.
fn tensor(values: Vec<f32>, shape: [usize; 2]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, Shape::from(shape)))
}

/// Casts a tensor to f32. It is f64 only if an f64 weight meets activations of another type.
fn to_f32(x: FlexTensor) -> FlexTensor {
    if x.dtype() == DType::F32 { x } else { Flex::float_cast(x, FloatDType::F32) }
}

/// Runs `work` on `x` in f32 and casts the result back to the type of `x`.
fn in_f32(x: FlexTensor, work: impl FnOnce(&FlexTensor) -> FlexTensor) -> FlexTensor {
    let dtype = x.dtype();
    let result = work(&to_f32(x));
    if dtype == DType::F32 { result } else { Flex::float_cast(result, float_dtype(dtype)) }
}
