//! The test cases: kernels with their inputs, computed by host code and by a backend's kernels.

mod table;

pub use table::table;

use crate::{
    blocks::PackedRows,
    host::{self, HostAttentionMask},
};
use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend, bf16, f16, ops::FloatTensor};
use burn_llama::kernel::{AttentionMask, CrossEntropyInputs, CrossEntropyOptions, Kernels, Targets};
use burn_peft::random;
use burn_peft_kernels::{MatmulPrecision, WeightMatrix};
use burn_zero::segment::DynTensor;

/// A float input of a kernel.
#[derive(Clone)]
pub struct Input {
    pub values: Vec<f64>,
    pub shape: Vec<usize>,
    /// The type in which the input is stored; f32 stands for the type in which the kernel runs.
    pub dtype: DType,
    pub trained: bool,
}

/// A kernel with the inputs that have no gradient.
#[derive(Clone)]
pub enum Kernel {
    Embed {
        ids: Vec<i32>,
    },
    RmsNorm {
        epsilon: f64,
    },
    Rope {
        cos: Vec<f64>,
        sin: Vec<f64>,
    },
    SwiGlu,
    Linear,
    /// `x + n·Vᵀ + n·Wᵀ` with the normalized `n` of `x`: the gradients of `x` and `n` are sums of several terms.
    Joined {
        epsilon: f64,
    },
    /// A product with packed rows, and the decoded rows.
    Packed(PackedRows),
    Attention(HostAttentionMask),
    CrossEntropy {
        ids: Vec<i32>,
        weights: Vec<f64>,
    },
}

/// One test case: a kernel with its inputs.
#[derive(Clone)]
pub struct Case {
    pub name: String,
    pub kernel: Kernel,
    pub inputs: Vec<Input>,
    /// The gradient of the first output.
    pub dy: Vec<f64>,
}

/// The device, types and memory layout with which a case is evaluated.
pub struct EvaluationContext<'a, B: Backend> {
    pub device: &'a B::Device,
    pub dtype: DType,
    /// True if inputs are slices of larger tensors, so that their values are not contiguous.
    pub views: bool,
    pub compute: MatmulPrecision,
}

/// Returns `n` pseudo-random numbers in `±scale`, seeded by `name`, each exact in f32.
pub fn numbers(name: &str, n: usize, scale: f64) -> Vec<f64> {
    let key = random::key_from_str(name);
    (0..n).map(|i| ((2.0 * random::uniform(key, i as u64) - 1.0) * scale) as f32 as f64).collect()
}

pub fn floats<B: Backend>(values: &[f64], dtype: DType, device: &B::Device) -> Tensor<B, 1> {
    let data = TensorData::new(values.to_vec(), [values.len()]).convert_dtype(dtype);
    Tensor::from_data(data, (device, dtype))
}

fn ints<B: Backend>(values: &[i32], rows: usize, device: &B::Device) -> Tensor<B, 2, Int> {
    let data = TensorData::new(values.to_vec(), [rows, values.len() / rows]);
    Tensor::from_data(data, (device, DType::I32))
}

/// Returns the values in the given shape, as a contiguous tensor or as a view of a larger one.
fn shaped<B: Backend>(x: &Tensor<B, 1>, shape: &[usize], views: bool) -> FloatTensor<B> {
    fn shaped<B: Backend, const D: usize>(x: &Tensor<B, 1>, shape: [usize; D], views: bool) -> FloatTensor<B> {
        let x = x.clone().reshape(shape);
        let x = if views {
            Tensor::cat(vec![x.zeros_like(), x], D - 1).narrow(D - 1, shape[D - 1], shape[D - 1])
        } else {
            x
        };
        x.into_primitive().tensor()
    }
    match *shape {
        [a] => shaped(x, [a], views),
        [a, b] => shaped(x, [a, b], views),
        [a, b, c] => shaped(x, [a, b, c], views),
        [a, b, c, d] => shaped(x, [a, b, c, d], views),
        _ => panic!("no kernel takes {shape:?}"),
    }
}

impl Case {
    /// Computes the outputs with host code; the first is the one that has a gradient.
    pub fn host(&self, inputs: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let (x, last) = (&inputs[0], &inputs[inputs.len() - 1]);
        let features = *self.inputs[0].shape.last().unwrap();
        match &self.kernel {
            Kernel::Embed { ids } => vec![host::embed(x, features, ids)],
            Kernel::RmsNorm { epsilon } => vec![host::rms_norm(x, last, *epsilon)],
            Kernel::Rope { cos, sin } => {
                let shape = self.inputs[0].shape.as_slice().try_into().unwrap();
                vec![host::rope(x, shape, cos, sin)]
            }
            Kernel::SwiGlu => vec![host::swiglu(x, last)],
            Kernel::Linear => vec![host::linear(x, last, features)],
            Kernel::Joined { epsilon } => {
                let n = host::rms_norm(x, &inputs[1], *epsilon);
                let (v, w) = (host::linear(&n, &inputs[2], features), host::linear(&n, last, features));
                vec![x.iter().zip(v).zip(w).map(|((x, v), w)| x + v + w).collect()]
            }
            Kernel::Packed(rows) => vec![host::linear(x, &rows.values, features), rows.values.clone()],
            Kernel::Attention(sight) => {
                let heads = [self.inputs[0].shape[2], self.inputs[1].shape[2], features];
                host::attention([x, &inputs[1], last], sight, heads).into()
            }
            Kernel::CrossEntropy { ids, weights } => host::cross_entropy(x, last, features, ids, weights).into(),
        }
    }

    /// Computes the outputs with the backend's kernel.
    pub fn run<B: Kernels>(&self, inputs: &[Tensor<B, 1>], place: &EvaluationContext<'_, B>) -> Vec<Tensor<B, 1>> {
        let input = |index: usize| shaped(&inputs[index], &self.inputs[index].shape, place.views);
        let (device, tokens) = (place.device, self.inputs[0].shape[0]);
        let outputs = match &self.kernel {
            Kernel::Embed { ids } => {
                let ids = ints::<B>(ids, 1, device).squeeze_dim::<1>(0);
                vec![B::embed(input(0), ids.into_primitive())]
            }
            Kernel::RmsNorm { epsilon } => vec![B::rms_norm(input(0), input(1), *epsilon)],
            Kernel::Rope { cos, sin } => {
                let shape = [tokens, cos.len() / tokens];
                let table = |x: &[f64]| shaped(&floats::<B>(x, place.dtype, device), &shape, place.views);
                vec![B::rope(input(0), table(cos), table(sin))]
            }
            Kernel::SwiGlu => vec![B::swiglu(input(0), input(1), place.compute)],
            Kernel::Linear => vec![B::linear_forward(input(0), input(1), None, place.compute)],
            Kernel::Joined { epsilon } => {
                let n = B::rms_norm(input(0), input(1), *epsilon);
                let [v, w] = [2, 3].map(|index| B::linear_forward(n.clone(), input(index), None, place.compute));
                vec![B::add(B::add(v, input(0)), w)]
            }
            Kernel::Packed(rows) => {
                let rows = rows.on(device);
                vec![B::packed_forward(input(0), &rows, place.compute), B::unpack(&rows)]
            }
            Kernel::Attention(sight) => {
                let found = B::flash_attention([input(0), input(1), input(2)], &visibility(sight, device));
                vec![found.output, found.lse]
            }
            Kernel::CrossEntropy { ids, weights } => {
                let ids = ints::<B>(ids, 1, device).squeeze_dim::<1>(0);
                let targets = Targets { ids, weights: floats(weights, place.dtype, device) };
                let inputs = CrossEntropyInputs { hidden: input(0), head: WeightMatrix::Dense(input(1)), targets };
                let options = CrossEntropyOptions {
                    hidden_gradient: self.inputs[0].trained,
                    head_gradient: self.inputs[1].trained,
                    precision: place.compute,
                };
                let found = B::linear_cross_entropy(inputs, options);
                vec![found.losses, found.lse]
            }
        };
        outputs.into_iter().map(|output| DynTensor::<B>::from_primitive(output).flatten()).collect()
    }

    /// Returns the values of all inputs.
    pub fn values(&self) -> Vec<Vec<f64>> {
        self.inputs.iter().map(|input| input.values.clone()).collect()
    }
}

fn visibility<B: Backend>(sight: &HostAttentionMask, device: &B::Device) -> AttentionMask<B> {
    let ids = |values: &[i32]| ints(values, sight.rows, device);
    AttentionMask {
        query_segments: ids(&sight.query_segments),
        query_positions: ids(&sight.query_positions),
        key_segments: ids(&sight.key_segments),
        key_positions: ids(&sight.key_positions),
        window: sight.window,
    }
}

/// A builder of test cases.
pub struct CaseBuilder {
    pub name: String,
    inputs: Vec<Input>,
}

impl CaseBuilder {
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), inputs: Vec::new() }
    }

    pub fn input(self, shape: &[usize], scale: f64) -> Self {
        self.stored(shape, scale, DType::F32, true)
    }

    fn frozen(self, shape: &[usize], scale: f64) -> Self {
        self.stored(shape, scale, DType::F32, false)
    }

    fn stored(mut self, shape: &[usize], scale: f64, dtype: DType, trained: bool) -> Self {
        let values = numbers(&format!("{}.{}", self.name, self.inputs.len()), shape.iter().product(), scale);
        let stored = |x: f64| match dtype {
            DType::BF16 => bf16::from_f64(x).to_f64(),
            DType::F16 => f16::from_f64(x).to_f64(),
            _ => x,
        };
        let values = values.into_iter().map(stored).collect();
        self.inputs.push(Input { values, shape: shape.to_vec(), dtype, trained });
        self
    }

    pub fn case(self, kernel: Kernel) -> Case {
        let mut case = Case { name: self.name, kernel, inputs: self.inputs, dy: Vec::new() };
        case.dy = numbers(&format!("{}.dy", case.name), case.host(&case.values())[0].len(), 1.0);
        case
    }
}

/// Builds an attention case with the visibility `sight` and the sizes `[heads, kv_heads, dim]`.
pub fn attention(name: &str, sight: HostAttentionMask, [heads, kv_heads, dim]: [usize; 3]) -> Case {
    let (rows, queries, keys) = (sight.rows, sight.queries(), sight.keys());
    CaseBuilder::new(format!("attention {name}, heads {heads}/{kv_heads} of {dim}"))
        .input(&[rows, queries, heads, dim], 2.0)
        .input(&[rows, keys, kv_heads, dim], 2.0)
        .input(&[rows, keys, kv_heads, dim], 1.0)
        .case(Kernel::Attention(sight))
}

/// The runs of consecutive tokens in one row of a batch: (segment, first position, length).
type SegmentRuns<'a> = &'a [(i32, i32, i32)];

/// Builds the visibility of rows of keys, past ones followed by new ones; the new ones are also the queries.
pub fn sight(rows: &[(SegmentRuns<'_>, SegmentRuns<'_>)], window: Option<usize>) -> HostAttentionMask {
    let mut sight = HostAttentionMask { rows: rows.len(), window, ..HostAttentionMask::default() };
    for (past, new) in rows {
        for &(segment, first, length) in past.iter().chain(*new) {
            sight.key_segments.extend((0..length).map(|_| segment));
            sight.key_positions.extend(first..first + length);
        }
        for &(segment, first, length) in *new {
            sight.query_segments.extend((0..length).map(|_| segment));
            sight.query_positions.extend(first..first + length);
        }
    }
    sight
}

/// Builds the visibility of sequences of these lengths, packed into one row.
pub fn packed(lengths: &[i32]) -> HostAttentionMask {
    let runs: Vec<_> = lengths.iter().enumerate().map(|(index, &n)| (index as i32 + 1, 0, n)).collect();
    sight(&[(&[], &runs)], None)
}
