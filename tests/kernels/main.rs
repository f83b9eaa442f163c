//! Tests of every kernel on every backend: outputs equal plain f64 host code, gradients equal its finite differences,
//! packed sequences equal separate ones, NaN propagates, and results are bit for bit the same with any number of
//! threads.
//!
//! The fallback tensor operations, for backends without kernels of their own, run here in f64 on Flex (whose own
//! kernels are f32). They are first compared with the host code, then serve as reference for every element of an f32
//! gradient.
#![cfg(feature = "flex")]

mod blocks;
mod cases;
mod host;
mod sequences;

use burn::{
    backend::{Autodiff, Flex},
    tensor::{DType, Tensor, backend::Backend, bf16, f16},
};
use burn_llama::kernel::Kernels;
use burn_peft_kernels::{Codec, MatmulPrecision};
use cases::{Case, EvaluationContext, Kernel, attention, floats, numbers, packed, table};
use laws::one_backward_at_a_time;
use std::{
    collections::HashSet,
    mem::{Discriminant, discriminant},
    sync::OnceLock,
};

/// The result of a case: outputs, and the gradients of the trained inputs.
#[derive(Debug, Clone, PartialEq)]
struct Evaluation {
    outputs: Vec<Vec<f64>>,
    gradients: Vec<Option<Vec<f64>>>,
}

/// Runs the forward pass of a case, and the backward pass from the output gradient `dy`.
fn evaluate<B: Kernels>(case: &Case, inputs: &[Vec<f64>], dy: &[f64], place: &EvaluationContext<'_, B>) -> Evaluation {
    let EvaluationContext { device, dtype, views, compute } = *place;
    let place = EvaluationContext::<Autodiff<B>> { device, dtype, views, compute };
    let leaves = case.inputs.iter().zip(inputs).map(|(input, values)| {
        let dtype = if input.dtype == DType::F32 { place.dtype } else { input.dtype };
        floats::<Autodiff<B>>(values, dtype, place.device).set_require_grad(input.trained)
    });
    let leaves: Vec<_> = leaves.collect();
    let outputs = case.run(&leaves, &place);
    let loss = outputs[0].clone() * floats(dy, place.dtype, place.device);
    let mut grads = loss.sum().backward();
    let gradient = |leaf: &Tensor<Autodiff<B>, 1>| leaf.grad_remove(&mut grads).map(read);
    Evaluation { gradients: leaves.iter().map(gradient).collect(), outputs: outputs.into_iter().map(read).collect() }
}

fn read<B: Backend>(x: Tensor<B, 1>) -> Vec<f64> {
    x.into_data().convert::<f64>().into_vec().unwrap()
}

/// Asserts that two arrays differ by at most `tolerance` of the largest value expected.
fn assert_close(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(0.1, |max: f64, x| max.max(x.abs()));
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let apart = (found - expected).abs() / scale;
        assert!(apart <= tolerance, "{what}, element {index}: {found} against {expected}, {apart:e} apart");
    }
}

/// Asserts that outputs and gradients differ by at most the two tolerances.
fn assert_same(found: &Evaluation, expected: &Evaluation, tolerances: [f64; 2], what: &str) {
    for (index, (found, expected)) in found.outputs.iter().zip(&expected.outputs).enumerate() {
        assert_close(found, expected, tolerances[0], &format!("{what}: output {index}"));
    }
    for (index, (found, expected)) in found.gradients.iter().zip(&expected.gradients).enumerate() {
        let what = format!("{what}: gradient of input {index}");
        assert_eq!(found.is_some(), expected.is_some(), "{what}");
        if let (Some(found), Some(expected)) = (found, expected) {
            assert_close(found, expected, tolerances[1], &what);
        }
    }
}

/// Returns all cases with their expected results.
fn truth() -> &'static [(Case, Evaluation)] {
    static TRUTH: OnceLock<Vec<(Case, Evaluation)>> = OnceLock::new();
    TRUTH.get_or_init(|| {
        let place = EvaluationContext::<Flex> {
            device: &Default::default(),
            dtype: DType::F64,
            views: false,
            compute: MatmulPrecision::F32,
        };
        let truth = |case: Case| {
            let inputs = case.values();
            let found = evaluate(&case, &inputs, &case.dy, &place);
            let expected = Evaluation { outputs: case.host(&inputs), gradients: found.gradients.clone() };
            assert_same(&found, &expected, [1e-12; 2], &format!("{} by tensor operations", case.name));
            (case, expected)
        };
        table().into_iter().map(truth).collect()
    })
}

/// Returns the directions for finite differences: every coordinate of a short input, or random signs for all
/// coordinates of a long one.
fn directions(name: &str, n: usize) -> Vec<Vec<f64>> {
    if n <= 42 {
        return (0..n).map(|i| (0..n).map(|j| f64::from(i == j)).collect()).collect();
    }
    let signs = |index: usize| numbers(&format!("{name}.{index}"), n, 1.0).iter().map(|x| x.signum()).collect();
    (0..2).map(signs).collect()
}

#[test]
fn gradients_are_the_finite_differences_of_host_code() {
    let _lock = one_backward_at_a_time();
    for (case, truth) in truth() {
        let loss = |inputs: &[Vec<f64>]| case.host(inputs)[0].iter().zip(&case.dy).map(|(y, dy)| y * dy).sum::<f64>();
        for (index, gradient) in truth.gradients.iter().enumerate() {
            let Some(gradient) = gradient else { continue };
            let values = &case.inputs[index].values;
            let mean = values.iter().map(|x| x.abs()).sum::<f64>() / values.len() as f64;
            let step = 1e-4 * if mean > 0.0 { mean } else { 1.0 };
            let floor = 1e-9 * gradient.iter().fold(1.0, |max: f64, x| max.max(x.abs()));
            for direction in directions(&format!("{}.{index}", case.name), gradient.len()) {
                let moved = |step: f64| {
                    let mut inputs = case.values();
                    inputs[index].iter_mut().zip(&direction).for_each(|(x, d)| *x += step * d);
                    loss(&inputs)
                };
                let expected = (moved(step) - moved(-step)) / (2.0 * step);
                let terms = gradient.iter().zip(&direction).map(|(g, d)| g * d);
                let (found, size): (f64, f64) = (terms.clone().sum(), terms.map(f64::abs).sum());
                let apart = (found - expected).abs();
                let name = &case.name;
                assert!(apart <= 1e-6 * size + floor, "{name}: input {index}: {found} against {expected}");
            }
        }
    }
}

/// The selection of cases to test.
#[cfg_attr(not(any(feature = "vulkan", feature = "wgpu")), allow(dead_code))]
enum CaseSelection {
    All,
    /// One case per kernel: the largest of the small ones. Where kernels are compiled for every shape by a software
    /// device, all cases would take hours.
    OneEach,
}

impl CaseSelection {
    fn of<'a>(&self, table: &'a [(Case, Evaluation)]) -> Vec<&'a (Case, Evaluation)> {
        if matches!(self, Self::All) {
            return table.iter().collect();
        }
        let mut chosen: Vec<&(Case, Evaluation)> = Vec::new();
        let small = table
            .iter()
            .filter(|(case, _)| case.dy.len() <= 600 && case.inputs.iter().all(|input| input.dtype == DType::F32));
        for row in small {
            match chosen.iter_mut().find(|(case, _)| kind(case) == kind(&row.0)) {
                Some(best) if best.0.dy.len() < row.0.dy.len() => *best = row,
                Some(_) => {}
                None => chosen.push(row),
            }
        }
        let kinds: HashSet<_> = table.iter().map(|(case, _)| kind(case)).collect();
        assert_eq!(chosen.len(), kinds.len(), "a kernel has no small case");
        chosen
    }
}

/// Returns a key that identifies a kernel; for packed rows it includes the codec.
fn kind(case: &Case) -> (Discriminant<Kernel>, Option<Codec>) {
    let codec = if let Kernel::Packed(rows) = &case.kernel { Some(rows.codec) } else { None };
    (discriminant(&case.kernel), codec)
}

/// The differences that are tolerated, relative to the largest value.
#[derive(Clone, Copy)]
struct Tolerances {
    general: f64,
    /// The tolerance for products of packed rows with up to eight rows of activations.
    few_rows: f64,
}

impl Tolerances {
    #[cfg_attr(not(any(feature = "tch", feature = "cuda", feature = "vulkan", feature = "wgpu")), allow(dead_code))]
    fn uniform(tolerance: f64) -> Self {
        Self { general: tolerance, few_rows: tolerance }
    }
}

/// Checks the properties that hold on every backend, in f32.
fn laws<B: Kernels>(device: &B::Device, tolerances: Tolerances, extent: CaseSelection) {
    let Tolerances { general: tolerance, few_rows } = tolerances;
    let _lock = one_backward_at_a_time();
    let place = EvaluationContext::<B> { device, dtype: DType::F32, views: false, compute: MatmulPrecision::F32 };
    for (case, truth) in extent.of(truth()) {
        let inputs = case.values();
        let found = evaluate(case, &inputs, &case.dy, &place);
        let fixed = matches!(case.kernel, Kernel::Packed(_)) && case.inputs[0].shape[0] <= 8;
        assert_same(&found, truth, [if fixed { few_rows } else { tolerance }, tolerance], &case.name);
        let apart = evaluate(case, &inputs, &case.dy, &EvaluationContext { views: true, ..place });
        assert_same(&apart, &found, [tolerance; 2], &format!("{} of views", case.name));
        if case.dy.len() < 6000 {
            nan_shows(case, &place);
        }
    }
    let lengths: &[i32] = if matches!(extent, CaseSelection::All) { &[1, 7, 63, 64, 65, 193] } else { &[1, 7] };
    packed_is_separate(lengths, &place, tolerance);
}

/// Checks that products in half precision equal products of factors rounded to half precision. The tolerance, relative
/// to the largest value, is `exact` where only sums are rounded afterwards, and one unit in the last place of the half
/// type where intermediate gradients are rounded again.
fn products_of_halves<B: Kernels>(device: &B::Device, compute: MatmulPrecision, exact: f64) {
    let _lock = one_backward_at_a_time();
    let place = EvaluationContext::<B> { device, dtype: DType::F32, views: false, compute };
    let (rounded, digit): (fn(f64) -> f64, f64) = match compute {
        MatmulPrecision::F16 => (|x| f16::from_f64(x).to_f64(), 1.0 / 1024.0),
        _ => (|x| bf16::from_f64(x).to_f64(), 1.0 / 128.0),
    };
    let double = EvaluationContext::<Flex> {
        device: &Default::default(),
        dtype: DType::F64,
        views: false,
        compute: MatmulPrecision::F32,
    };
    for (mut case, _) in truth().iter().cloned() {
        let tolerances = match case.kernel {
            Kernel::Linear => [exact; 2],
            Kernel::CrossEntropy { .. } | Kernel::SwiGlu => [exact, exact.max(digit)],
            // The reference does not round the decoded rows to half precision; only the kernel does.
            Kernel::Packed(_) => [exact.max(digit); 2],
            _ => continue,
        };
        let round = |x: &mut f64| *x = rounded(*x);
        case.inputs.iter_mut().flat_map(|input| &mut input.values).chain(&mut case.dy).for_each(round);
        let inputs = case.values();
        let expected = evaluate(&case, &inputs, &case.dy, &double);
        let found = evaluate(&case, &inputs, &case.dy, &place);
        assert_same(&found, &expected, tolerances, &format!("{} in {compute:?}", case.name));
        if case.dy.len() < 6000 {
            nan_shows(&case, &place);
        }
    }
}

/// Checks that a NaN in any input propagates to every output that depends on it, and a NaN in the output gradient to
/// all gradients.
fn nan_shows<B: Kernels>(case: &Case, place: &EvaluationContext<'_, B>) {
    for (index, input) in case.inputs.iter().enumerate() {
        let mut inputs = case.values();
        inputs[index][input.values.len() * 3 / 4] = f64::NAN;
        let found = evaluate(case, &inputs, &case.dy, place);
        for (output, (found, expected)) in found.outputs.iter().zip(case.host(&inputs)).enumerate() {
            let hidden = found.iter().zip(&expected).position(|(found, expected)| expected.is_nan() && !found.is_nan());
            assert_eq!(hidden, None, "{}: a NaN in input {index} does not show in output {output}", case.name);
        }
    }
    let blind = |sight: &host::HostAttentionMask, row, query| (0..sight.keys()).all(|key| !sight.sees(row, query, key));
    let mut dy = case.dy.clone();
    dy[0] = f64::NAN;
    match &case.kernel {
        Kernel::Attention(sight) if blind(sight, 0, 0) => return,
        _ => {}
    }
    for (index, gradient) in evaluate(case, &case.values(), &dy, place).gradients.iter().enumerate() {
        let shows = gradient.as_ref().is_none_or(|gradient| gradient.iter().any(|x| x.is_nan()));
        assert!(shows, "{}: a NaN from behind does not show in the gradient of input {index}", case.name);
    }
}

/// Checks that packed sequences do not see each other: outputs and gradients equal those of each sequence alone.
fn packed_is_separate<B: Kernels>(lengths: &[i32], place: &EvaluationContext<'_, B>, tolerance: f64) {
    let heads = [6, 2, 10];
    let together = attention("packed", packed(lengths), heads);
    let whole = evaluate(&together, &together.values(), &together.dy, place);
    let mut start = 0;
    for &length in lengths {
        let mut alone = attention("alone", packed(&[length]), heads);
        let total = lengths.iter().sum::<i32>() as usize;
        let part = |values: &[f64]| {
            let width = values.len() / total;
            values[start * width..(start + length as usize) * width].to_vec()
        };
        let inputs: Vec<_> = together.inputs.iter().map(|input| part(&input.values)).collect();
        alone.dy = part(&together.dy);
        let found = evaluate(&alone, &inputs, &alone.dy, place);
        let what = format!("a sequence of {length} in a row of {lengths:?}");
        assert_close(&part(&whole.outputs[0]), &found.outputs[0], tolerance, &what);
        for (whole, found) in whole.gradients.iter().zip(&found.gradients) {
            assert_close(&part(whole.as_ref().unwrap()), found.as_ref().unwrap(), tolerance, &what);
        }
        start += length as usize;
    }
}

#[test]
fn flex() {
    // Activations of up to eight rows may be rounded to 16-bit fixed point.
    laws::<Flex>(&Default::default(), Tolerances { general: 3e-6, few_rows: 4e-5 }, CaseSelection::All);
    products_of_halves::<Flex>(&Default::default(), MatmulPrecision::Bf16, 3e-6);
    products_of_halves::<Flex>(&Default::default(), MatmulPrecision::F16, 3e-6);
}

#[cfg(feature = "tch")]
#[test]
fn tch() {
    laws::<burn::backend::LibTorch>(&Default::default(), Tolerances::uniform(1e-5), CaseSelection::All);
    // LibTorch also rounds the outputs of its products.
    products_of_halves::<burn::backend::LibTorch>(&Default::default(), MatmulPrecision::Bf16, 1.0 / 64.0);
    products_of_halves::<burn::backend::LibTorch>(&Default::default(), MatmulPrecision::F16, 1.0 / 128.0);
}

#[cfg(feature = "vulkan")]
#[test]
fn vulkan() {
    laws::<burn::backend::Vulkan>(&Default::default(), Tolerances::uniform(1e-4), CaseSelection::OneEach);
}

#[cfg(feature = "wgpu")]
#[test]
fn wgpu() {
    laws::<burn::backend::Wgpu>(&Default::default(), Tolerances::uniform(1e-4), CaseSelection::OneEach);
}

#[cfg(feature = "cuda")]
#[test]
fn cuda() {
    laws::<burn::backend::Cuda>(&Default::default(), Tolerances::uniform(1e-2), CaseSelection::All);
}

#[test]
fn results_on_flex_do_not_depend_on_the_number_of_threads() {
    let _lock = one_backward_at_a_time();
    let place = EvaluationContext::<Flex> {
        device: &Default::default(),
        dtype: DType::F32,
        views: false,
        compute: MatmulPrecision::F32,
    };
    let [one, two, three] = [1, 2, 3].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap());
    for case in table() {
        let run = || evaluate(&case, &case.values(), &case.dy, &place);
        let expected = one.install(run);
        for pool in [&two, &three] {
            assert!(pool.install(run) == expected, "{}: {} threads", case.name, pool.current_num_threads());
        }
    }
}
