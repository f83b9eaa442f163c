//! The test cases: kernels with their inputs, computed by host code and by a backend's kernels.

use crate::{
    blocks::{self, PackedRows},
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
            Kernel::Linear => vec![B::linear_forward(input(0), input(1), place.compute)],
            Kernel::Joined { epsilon } => {
                let n = B::rms_norm(input(0), input(1), *epsilon);
                let [v, w] = [2, 3].map(|index| B::linear_forward(n.clone(), input(index), place.compute));
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

/// Adds embedding cases in which rows are looked up once, several times and never.
fn embeddings(table: &mut Vec<Case>) {
    for (rows, width, n) in [(1, 1, 1), (5, 7, 4), (300, 33, 65)] {
        let ids = (0..n).map(|i| (i * i + 3 * i) % rows).collect();
        let row = CaseBuilder::new(format!("embedding {n} of {rows} × {width}")).input(&[rows as usize, width], 1.0);
        table.push(row.case(Kernel::Embed { ids }));
    }
}

fn rms_norms(table: &mut Vec<Case>) {
    let kernel = Kernel::RmsNorm { epsilon: 1e-5 };
    for (n, width) in [(1, 1), (1, 7), (7, 16), (63, 33), (193, 20), (65, 576)] {
        let row = CaseBuilder::new(format!("rms_norm {n} × {width}")).input(&[n, width], 1.0).input(&[width], 1.5);
        table.push(row.case(kernel.clone()));
    }
    // Rows so small that epsilon dominates, and a row of zeros.
    let mut small = CaseBuilder::new("rms_norm of next to nothing").input(&[4, 6], 3e-3).input(&[6], 1.0);
    small.inputs[0].values[6..12].fill(0.0);
    table.push(small.case(kernel.clone()));
    table
        .push(CaseBuilder::new("rms_norm, weight frozen").input(&[7, 20], 1.0).frozen(&[20], 1.0).case(kernel.clone()));
    for dtype in [DType::BF16, DType::F16] {
        let row = CaseBuilder::new(format!("rms_norm, weight {dtype:?}")).input(&[7, 20], 1.0);
        table.push(row.stored(&[20], 1.0, dtype, false).case(kernel.clone()));
    }
}

fn elementwise(table: &mut Vec<Case>) {
    for (n, heads, dim) in [(1, 1, 2), (7, 3, 10), (65, 2, 64), (600, 1, 6)] {
        let row = CaseBuilder::new(format!("rope {n} × {heads} × {dim}")).input(&[n, heads, dim], 1.0);
        let angles = numbers(&row.name, n * dim / 2, 600.0);
        let exact = |x: f64| x as f32 as f64;
        let cos = angles.iter().map(|angle| exact(angle.cos())).collect();
        table.push(row.case(Kernel::Rope { cos, sin: angles.iter().map(|angle| exact(angle.sin())).collect() }));
    }
    for (n, width) in [(1, 1), (7, 9), (63, 65), (193, 100)] {
        let mut row = CaseBuilder::new(format!("swiglu {n} × {width}")).input(&[n, width], 6.0).input(&[n, width], 1.0);
        // Values at which the logistic function saturates, or its exponential exceeds the range of f32.
        for (value, extreme) in row.inputs[0].values.iter_mut().zip([0.0, -20.0, 20.0, -100.0, 100.0]) {
            *value = extreme;
        }
        table.push(row.case(Kernel::SwiGlu));
    }
}

fn linears(table: &mut Vec<Case>) {
    for (n, features, out) in [(1, 1, 1), (7, 20, 33), (65, 64, 100), (600, 7, 1), (193, 130, 257)] {
        let row = CaseBuilder::new(format!("linear {n} × {features} → {out}"));
        table.push(row.input(&[n, features], 1.0).input(&[out, features], 1.0).case(Kernel::Linear));
    }
    for n in [1, 3, 8] {
        let row = CaseBuilder::new(format!("linear, few rows: {n}")).input(&[n, 197], 1.0);
        table.push(row.input(&[33, 197], 1.0).case(Kernel::Linear));
    }
    for dtype in [DType::BF16, DType::F16] {
        for [n, features] in [[65, 20], [1, 198], [3, 131], [8, 64]] {
            let row = CaseBuilder::new(format!("linear {n} × {features}, weight {dtype:?}")).input(&[n, features], 1.0);
            table.push(row.stored(&[33, features], 1.0, dtype, false).case(Kernel::Linear));
        }
    }
    for [n, features] in [[1, 3], [65, 20], [130, 97]] {
        let row =
            CaseBuilder::new(format!("joined {n} × {features}")).input(&[n, features], 1.0).input(&[features], 1.0);
        let row = row.input(&[features, features], 1.0).input(&[features, features], 1.0);
        table.push(row.case(Kernel::Joined { epsilon: 1e-5 }));
    }
}

fn attentions(table: &mut Vec<Case>) {
    let causal = |n: i32| packed(&[n]);
    for (n, heads) in [
        (1, [1, 1, 2]),
        (7, [2, 2, 6]),
        (63, [3, 1, 20]),
        (64, [8, 1, 16]),
        (65, [8, 1, 6]),
        (193, [6, 2, 10]),
        (600, [3, 1, 20]),
    ] {
        table.push(attention(&format!("of {n}"), causal(n), heads));
    }
    table.push(attention("of 7, group of 200", causal(7), [200, 1, 2]));
    table.push(attention("packed", packed(&[1, 7, 63, 64, 65]), [3, 3, 6]));
    let padded = sight(&[(&[], &[(1, 0, 70)]), (&[], &[(1, 0, 9), (2, 0, 30), (0, 0, 31)])], None);
    table.push(attention("of packed and padded rows", padded, [4, 2, 6]));
    for window in [1, 5, 64] {
        let sight = HostAttentionMask { window: Some(window), ..causal(193) };
        table.push(attention(&format!("in a window of {window}"), sight, [3, 1, 10]));
    }
    let hole = |n| (HostAttentionMask::EMPTY_SEGMENT, 0, n);
    let past = [
        (&[(HostAttentionMask::ANY_SEGMENT, 0, 3), (1, 3, 5), hole(4)][..], &[(1, 8, 7)][..]),
        (&[(HostAttentionMask::ANY_SEGMENT, 0, 3), (1, 3, 9)][..], &[(1, 12, 4), (0, 0, 3)][..]),
        (&[(HostAttentionMask::ANY_SEGMENT, 0, 3), hole(2), (1, 3, 7)][..], &[(1, 10, 7)][..]),
    ];
    table.push(attention("after a prefix and a past with holes", sight(&past, None), [8, 1, 6]));
    table.push(attention("after a prefix and a past, in a window", sight(&past, Some(4)), [3, 1, 6]));
    let decode = [(&[(1, 0, 590), hole(9)][..], &[(1, 590, 1)][..]), (&[(1, 0, 599)][..], &[(1, 599, 1)][..])];
    table.push(attention("of one new token each", sight(&decode, None), [6, 2, 10]));
    let segments = [(&[(HostAttentionMask::ANY_SEGMENT, 0, 5)][..], &[(1, 5, 30), (2, 5, 66), (3, 5, 1)][..])];
    table.push(attention("packed after a prefix", sight(&segments, None), [3, 1, 6]));
    let mut blind = sight(&[(&[], &[(1, 0, 66)]), (&[], &[(1, 0, 66)])], None);
    // Queries 3 and 65 of the first row and all queries of the second see no key.
    (blind.query_segments[3], blind.query_segments[65]) = (9, 9);
    blind.query_segments[66..].fill(9);
    table.push(attention("with queries that see nothing", blind, [3, 1, 6]));
}

fn cross_entropies(table: &mut Vec<Case>) {
    let kernel = |name: &str, n: usize, vocabulary: usize| {
        let ids = numbers(&format!("{name}.ids"), n, 0.5).into_iter().map(|x| ((x + 0.5) * vocabulary as f64) as i32);
        let mut weights = numbers(&format!("{name}.weights"), n, 1.0);
        weights[n / 2] = if n > 1 { 0.0 } else { 1.0 };
        Kernel::CrossEntropy { ids: ids.map(|id| id.clamp(0, vocabulary as i32 - 1)).collect(), weights }
    };
    let row = |name: &str, n: usize, features: usize| {
        CaseBuilder::new(format!("cross-entropy {name}")).input(&[n, features], 1.0)
    };
    for (n, features, vocabulary) in
        [(1, 7, 1), (7, 20, 17), (63, 6, 300), (65, 3, 70_001), (600, 10, 4999), (4100, 3, 11)]
    {
        let name = format!("{n} × {features} → {vocabulary}");
        let case = row(&name, n, features).input(&[vocabulary, features], 1.0).case(kernel(&name, n, vocabulary));
        // Every other case has the same gradient for all losses, for which a backend may have a special path.
        let dy = if n % 2 == 1 { case.dy.clone() } else { vec![0.375; n] };
        table.push(Case { dy, ..case });
    }
    let frozen = row("frozen head", 64, 10).frozen(&[33, 10], 1.0).case(kernel("frozen", 64, 33));
    table.push(Case { name: format!("{} in proportion", frozen.name), dy: vec![-2.5; 64], ..frozen.clone() });
    table.push(frozen);
    let trained = CaseBuilder::new("cross-entropy head alone").frozen(&[64, 10], 1.0).input(&[33, 10], 1.0);
    table.push(trained.case(kernel("head", 64, 33)));
    for dtype in [DType::BF16, DType::F16] {
        let name = format!("head {dtype:?}");
        let row = row(&name, 65, 6).stored(&[4999, 6], 1.0, dtype, false);
        table.push(row.case(kernel(&name, 65, 4999)));
    }
}

/// Returns all test cases.
pub fn table() -> Vec<Case> {
    let mut table = Vec::new();
    embeddings(&mut table);
    rms_norms(&mut table);
    elementwise(&mut table);
    linears(&mut table);
    blocks::products(&mut table);
    attentions(&mut table);
    cross_entropies(&mut table);
    table
}
