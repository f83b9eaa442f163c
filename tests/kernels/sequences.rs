//! Sequences of operations that Burn's fusion would compute in one kernel, kernels for any number of rows, and decoding with a
//! growing KV cache, compared with Flex. Wrong results of fused kernels were reported for Burn 0.21: a reduction whose
//! result is broadcast (tracel-ai/burn issues 5202 and 5268), and cached decoding (5257 and 5079). With fusion the first
//! token of a decoding was wrong here, too.
//!
//! A software device takes seconds to compile a kernel, so that each number of rows meets one of the other sizes only.

use crate::{
    assert_close, assert_same,
    cases::{CaseBuilder, EvaluationContext, Kernel, attention, floats, numbers, packed},
    evaluate, read,
};
use burn::{
    backend::Flex,
    tensor::{Bool, DType, Tensor, backend::Backend},
};
use burn_llama::{Checkpoint, Llama, generate, kernel::Kernels};
use burn_peft_kernels::MatmulPrecision;
use laws::{fixture, one_backward_at_a_time};

/// Numbers of rows: the borders of 1 and of powers of two, and others between them.
const ROWS: [usize; 16] = [1, 3, 31, 33, 100, 200, 255, 257, 577, 1000, 1500, 1531, 2049, 3001, 4095, 4096];

/// The numbers of rows for which matrix products are tried: for each, autotuning compiles many kernels.
const ROWS_OF_PRODUCTS: [usize; 4] = [1, 31, 33, 257];

#[test]
fn flex() {
    sequences_agree::<Flex>(&Default::default(), 1e-5);
}

#[test]
#[ignore = "is for other devices; on Flex it checks the test itself"]
fn flex_at_length() {
    sequences_agree_at_length::<Flex>(&Default::default(), 1e-5);
}

#[cfg(feature = "vulkan")]
#[test]
fn vulkan() {
    sequences_agree::<burn::backend::Vulkan>(&Default::default(), 1e-4);
}

#[cfg(feature = "vulkan")]
#[test]
#[ignore = "takes many minutes on a software device"]
fn vulkan_at_length() {
    sequences_agree_at_length::<burn::backend::Vulkan>(&Default::default(), 1e-4);
}

#[cfg(feature = "wgpu")]
#[test]
fn wgpu() {
    sequences_agree::<burn::backend::Wgpu>(&Default::default(), 1e-4);
}

#[cfg(feature = "wgpu")]
#[test]
#[ignore = "takes many minutes on a software device"]
fn wgpu_at_length() {
    sequences_agree_at_length::<burn::backend::Wgpu>(&Default::default(), 1e-4);
}

/// Checks what a software device computes within a minute.
fn sequences_agree<B: Kernels>(device: &B::Device, tolerance: f64) {
    masked_softmax::<B>(device, tolerance);
    reductions_are_broadcast::<B>(device, tolerance);
    decoding::<B>(&["gqa_llama3"], 9, device, tolerance);
}

/// Checks the kernels of the model for many numbers of rows, and long decoding.
fn sequences_agree_at_length<B: Kernels>(device: &B::Device, tolerance: f64) {
    decoding::<B>(&["gqa_llama3", "qwen3"], 300, device, tolerance);
    kernels_of_any_number_of_rows::<B>(device, tolerance);
}

fn tensor<B: Backend, const D: usize>(name: &str, shape: [usize; D], device: &B::Device) -> Tensor<B, D> {
    floats::<B>(&numbers(name, shape.iter().product(), 3.0), DType::F32, device).reshape(shape)
}

/// Compares mask, maximum, exponential, sum and quotient over the last dimension. The mask has the scores' shape, or
/// is broadcast over rows and heads.
fn masked_softmax<B: Backend>(device: &B::Device, tolerance: f64) {
    fn softmax<B: Backend>([rows, heads, n]: [usize; 3], mask: [usize; 3], device: &B::Device) -> Vec<f64> {
        let scores = tensor::<B, 3>("scores", [rows, heads, n], device);
        let hidden: Tensor<B, 3, Bool> = tensor::<B, 3>("mask", mask, device).greater_elem(1.0);
        let scores = scores.mask_fill(hidden, -1e9);
        let max = scores.clone().max_dim(2);
        let weights = (scores - max).exp();
        let sum = weights.clone().sum_dim(2);
        read((weights / sum).flatten::<1>(0, 2))
    }
    for (index, rows) in ROWS.into_iter().enumerate() {
        let n = [33, 100][index % 2];
        let mask = if index / 2 % 2 == 0 { [rows, 3, n] } else { [1, 1, n] };
        let found = softmax::<B>([rows, 3, n], mask, device);
        let expected = softmax::<Flex>([rows, 3, n], mask, &Default::default());
        assert_close(&found, &expected, tolerance, &format!("softmax of {rows} × 3 × {n}, mask {mask:?}"));
    }
}

/// Compares sums over the last dimension that are added to tensors of the full shape, with a second reduction behind.
fn reductions_are_broadcast<B: Backend>(device: &B::Device, tolerance: f64) {
    fn run<B: Backend>(rows: usize, n: usize, device: &B::Device) -> Vec<f64> {
        let [x, y] = ["x", "y"].map(|name| tensor::<B, 2>(name, [rows, n], device));
        let bias = tensor::<B, 2>("bias", [rows, 1], device);
        let mean = (x.clone() * y.clone()).mean_dim(1) + bias;
        let centred = y - mean;
        let variance = (centred.clone() * centred.clone()).sum_dim(1) / n as f64;
        read((x * (variance + 1e-5).sqrt().recip() + centred).flatten::<1>(0, 1))
    }
    for (index, rows) in ROWS.into_iter().enumerate() {
        let n = [31, 96][index % 2];
        let (found, expected) = (run::<B>(rows, n, device), run::<Flex>(rows, n, &Default::default()));
        assert_close(&found, &expected, tolerance, &format!("broadcast sums of {rows} × {n}"));
    }
}

/// Compares outputs and gradients of the kernels that see every token, for any number of tokens.
fn kernels_of_any_number_of_rows<B: Kernels>(device: &B::Device, tolerance: f64) {
    let _lock = one_backward_at_a_time();
    let place = EvaluationContext::<B> { device, dtype: DType::F32, views: false, compute: MatmulPrecision::F32 };
    let double = EvaluationContext::<Flex> {
        device: &Default::default(),
        dtype: DType::F64,
        views: false,
        compute: MatmulPrecision::F32,
    };
    let elementwise = ROWS.into_iter().flat_map(|n| {
        [
            CaseBuilder::new(format!("rms_norm, rows: {n}"))
                .input(&[n, 20], 1.0)
                .input(&[20], 1.5)
                .case(Kernel::RmsNorm { epsilon: 1e-5 }),
            CaseBuilder::new(format!("swiglu, rows: {n}"))
                .input(&[n, 33], 4.0)
                .input(&[n, 33], 1.0)
                .case(Kernel::SwiGlu),
        ]
    });
    let products = ROWS_OF_PRODUCTS.into_iter().flat_map(|n| {
        let (ids, weights) = ((0..n as i32).map(|i| i * 7 % 50).collect(), vec![0.5; n]);
        [
            CaseBuilder::new(format!("linear, rows: {n}"))
                .input(&[n, 20], 1.0)
                .input(&[33, 20], 1.0)
                .case(Kernel::Linear),
            CaseBuilder::new(format!("cross-entropy, rows: {n}"))
                .input(&[n, 6], 1.0)
                .input(&[50, 6], 1.0)
                .case(Kernel::CrossEntropy { ids, weights }),
            attention(&format!("of {n} tokens"), packed(&[n as i32]), [6, 2, 10]),
        ]
    });
    for case in elementwise.chain(products) {
        let inputs = case.values();
        let found = evaluate(&case, &inputs, &case.dy, &place);
        let expected = evaluate(&case, &inputs, &case.dy, &double);
        assert_same(&found, &expected, [tolerance; 2], &case.name);
    }
}

/// Compares the logits of decoding token by token, and of all tokens at once, with those of one forward pass on Flex.
fn decoding<B: Kernels>(models: &[&str], tokens: u32, device: &B::Device, tolerance: f64) {
    for name in models {
        let checkpoint = longer(&format!("models/{name}"));
        let checkpoint = Checkpoint::open(checkpoint.path()).unwrap();
        let reference: Llama<Flex> = checkpoint.load(DType::F32, &Default::default()).unwrap();
        let sequence: Vec<u32> = (0..tokens).map(|i| (i * i + 7 * i + 3) % 60).collect();
        let expected = read(generate::logits(&reference, &sequence).unwrap().flatten::<1>(0, 1));
        let model: Llama<B> = checkpoint.load(DType::F32, device).unwrap();
        let mut found: Vec<f64> = Vec::new();
        generate::logits_by_steps(&model, &sequence, |logits| found.extend(logits.iter().map(|&x| f64::from(x))))
            .unwrap();
        assert_close(&found, &expected, tolerance, &format!("{name}: {tokens} tokens, one by one"));
        let whole = read(generate::logits(&model, &sequence).unwrap().flatten::<1>(0, 1));
        assert_close(&whole, &expected, tolerance, &format!("{name}: {tokens} tokens at once"));
    }
}

/// Copies a model and raises the number of its positions to 512.
fn longer(name: &str) -> tempfile::TempDir {
    let (from, to) = (fixture(name), tempfile::tempdir().unwrap());
    std::fs::copy(from.join("model.safetensors"), to.path().join("model.safetensors")).unwrap();
    let config = std::fs::read_to_string(from.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["max_position_embeddings"] = 512.into();
    std::fs::write(to.path().join("config.json"), config.to_string()).unwrap();
    to
}
