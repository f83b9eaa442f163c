//! A model of a few small matrices as a list of segments.

use crate::lost;
use burn::{
    backend::{Autodiff, Flex},
    module::{Module, ModuleVisitor, Param},
    tensor::{
        Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use burn_zero::segment::{DynTensor, Segments, TrainSegments};
use std::collections::BTreeMap;

pub(crate) type TrainBackend = Autodiff<Flex>;

const SIZE: usize = 42;
const WIDE: usize = 72;

/// The variant of the model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ModelVariant {
    /// True if the last matrix is tied to the first.
    pub(crate) tied: bool,
    /// True if the second matrix is frozen.
    pub(crate) frozen: bool,
}

/// A model of four matrices of unequal shapes and a vector of three values.
#[derive(Module, Debug)]
pub(crate) struct Stack<B: Backend> {
    table: Param<Tensor<B, 2>>,
    up: Param<Tensor<B, 2>>,
    down: Param<Tensor<B, 2>>,
    /// The output matrix; none if it is tied to the table.
    head: Option<Param<Tensor<B, 2>>>,
    tiny: Param<Tensor<B, 1>>,
}

impl ModelVariant {
    pub(crate) fn stack(self) -> Stack<TrainBackend> {
        let matrix = |number: usize, [rows, columns]: [usize; 2]| {
            let value = |i: usize| (((number * 7919 + i * 104_729) % 1009) as f32 / 1009.0 - 0.5) / 3.0;
            let values: Vec<f32> = (0..rows * columns).map(value).collect();
            let flat = Tensor::<TrainBackend, 1>::from_floats(values.as_slice(), &Default::default());
            Param::from_tensor(flat.reshape([rows, columns]))
        };
        let up = matrix(1, [SIZE, WIDE]);
        Stack {
            table: matrix(0, [SIZE, SIZE]),
            up: if self.frozen { up.set_require_grad(false) } else { up },
            down: matrix(2, [WIDE, SIZE]),
            head: (!self.tied).then(|| matrix(3, [SIZE, SIZE])),
            tiny: Param::from_tensor(Tensor::from_floats([0.5, 1.0, 1.5], &Default::default())),
        }
    }

    /// Returns the padded numbers of trainable and of frozen values. Of these matrices only the head and the vector
    /// share a bucket; a parameter starts at a multiple of 256, and a bucket is padded until every rank has the same
    /// number of blocks.
    pub(crate) fn padded(self, world: usize) -> (usize, usize) {
        let bucket = |sizes: &[usize]| {
            let blocks: usize = sizes.iter().map(|size| size.div_ceil(256)).sum();
            blocks.div_ceil(world) * world * 256
        };
        let (square, wide) = (SIZE * SIZE, SIZE * WIDE);
        let end = if self.tied { bucket(&[3]) } else { bucket(&[square, 3]) };
        let learns = bucket(&[square]) + bucket(&[wide]) + end;
        if self.frozen { (learns, bucket(&[wide])) } else { (learns + bucket(&[wide]), 0) }
    }
}

/// Returns one row of inputs and targets.
pub(crate) fn rows(number: usize) -> Vec<Tensor<TrainBackend, 2>> {
    let row = |shift: usize| {
        let values: Vec<f32> = (0..SIZE).map(|i| ((number * 31 + i * 17 + shift) % 23) as f32 / 23.0 - 0.5).collect();
        Tensor::<TrainBackend, 1>::from_floats(values.as_slice(), &Default::default()).reshape([1, SIZE])
    };
    vec![row(0), row(5)]
}

impl<B: Backend> Segments<B> for Stack<B> {
    type Batch = Vec<Tensor<B, 2>>;

    fn segments(&self) -> usize {
        4
    }

    fn forward_segment(&self, segment: usize, batch: &Self::Batch, inputs: Vec<DynTensor<B>>) -> Vec<DynTensor<B>> {
        lost::in_segment::<B>();
        let x = inputs.into_iter().next().map_or_else(|| batch[0].clone(), DynTensor::tensor::<2>);
        vec![DynTensor::new(match segment {
            0 => x.matmul(self.table.val()).tanh(),
            1 => x.matmul(self.up.val()).tanh(),
            2 => x.matmul(self.down.val()).tanh(),
            _ => {
                let y = x.matmul(self.head.as_ref().unwrap_or(&self.table).val().transpose());
                let y = y.reshape([SIZE / 3, 3]) * self.tiny.val().unsqueeze();
                (y.reshape([1, SIZE]) - batch[1].clone()).powf_scalar(2.0)
            }
        })]
    }
}

fn visit<B: Backend, const D: usize>(name: &str, param: &Param<Tensor<B, D>>, visitor: &mut impl ModuleVisitor<B>) {
    visitor.enter_module(name, "");
    visitor.visit_float(param);
    visitor.exit_module(name, "");
}

impl<B: AutodiffBackend> TrainSegments<B> for Stack<B> {
    fn inner_batch(batch: &Vec<Tensor<B, 2>>) -> Vec<Tensor<B::InnerBackend, 2>> {
        batch.iter().map(|tensor| tensor.clone().inner()).collect()
    }

    fn visit_segment<V: ModuleVisitor<B>>(&self, segment: usize, visitor: &mut V) {
        match segment {
            0 => visit("table", &self.table, visitor),
            1 => visit("up", &self.up, visitor),
            2 => visit("down", &self.down, visitor),
            _ => {
                visit("head", self.head.as_ref().unwrap_or(&self.table), visitor);
                visit("tiny", &self.tiny, visitor);
            }
        }
    }
}

/// Parameters by name.
pub(crate) type Values = BTreeMap<&'static str, Vec<f32>>;

/// Returns the values of all parameters. A parameter that another rank of a pipeline keeps has one value.
pub(crate) fn values(model: &Stack<TrainBackend>) -> Values {
    let matrices = [
        ("table", Some(&model.table)),
        ("up", Some(&model.up)),
        ("down", Some(&model.down)),
        ("head", model.head.as_ref()),
    ];
    let matrices = matrices.into_iter().filter_map(|(name, matrix)| Some((name, matrix?.val().into_data())));
    let all = matrices.chain([("tiny", model.tiny.val().into_data())]);
    all.map(|(name, data)| (name, data.iter::<f32>().collect())).collect()
}
