//! Benchmarks of the Flex kernels against the fallback tensor operations of other backends, at the sizes of a training
//! step of SmolLM2-135M: four rows of 250 tokens packed into one.
//!
//!     cargo bench -p laws                  # all
//!     cargo bench -p laws -- attention     # some

use burn::{
    backend::Flex,
    tensor::{DType, Int, Tensor, TensorData},
};
use burn_flex::FlexTensor;
use burn_llama::kernel::{
    AttentionMask, CrossEntropyInputs, CrossEntropyOptions, Kernels, RmsNormGradient, Targets, portable,
};
use burn_peft::random;
use burn_peft_kernels::{BlockType, Codec, LinearKernels, MatmulPrecision, PackedWeight, WeightMatrix, matmul};
use criterion::{Criterion, criterion_group, criterion_main};
use std::{hint::black_box, time::Duration};

const ROWS: usize = 4;
const LENGTH: usize = 250;
const TOKENS: usize = ROWS * LENGTH;
const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const HEADS: [usize; 2] = [9, 3];
const DIM: usize = 64;
const VOCABULARY: usize = 49152;
const EPSILON: f64 = 1e-5;

/// Returns a tensor of pseudo-random numbers between -1 and 1.
fn tensor<const D: usize>(seed: u64, shape: [usize; D]) -> FlexTensor {
    let key = random::key(&[seed]);
    let values: Vec<f32> =
        (0..shape.iter().product::<usize>() as u64).map(|at| random::uniform(key, at) as f32 * 2.0 - 1.0).collect();
    Tensor::<Flex, D>::from_data(TensorData::new(values, shape), (&Default::default(), DType::F32))
        .into_primitive()
        .tensor()
}

fn halved(x: FlexTensor) -> FlexTensor {
    Flex::to_bf16(x)
}

fn ints(values: Vec<i32>) -> Tensor<Flex, 1, Int> {
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), (&Default::default(), DType::I32))
}

/// Measures several implementations of the same computation.
fn compare(c: &mut Criterion, name: &str, ways: &mut [(&str, &mut dyn FnMut())]) {
    let mut group = c.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    for (way, work) in ways {
        group.bench_function(*way, |b| b.iter(&mut *work));
    }
}

fn linear(c: &mut Criterion) {
    for (features, out) in [(HIDDEN, HIDDEN), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN)] {
        let (x, w) = (tensor(1, [TOKENS, features]), tensor(2, [out, features]));
        let (dy, half) = (tensor(3, [TOKENS, out]), halved(w.clone()));
        let turned = || Tensor::<Flex, 2>::from_primitive(burn::tensor::TensorPrimitive::Float(w.clone())).transpose();
        compare(
            c,
            &format!("linear {features} to {out}"),
            &mut [
                ("fused", &mut || {
                    drop(black_box(Flex::linear_forward(x.clone(), w.clone(), None, MatmulPrecision::F32)))
                }),
                ("fused, bf16", &mut || {
                    drop(black_box(Flex::linear_forward(x.clone(), half.clone(), None, MatmulPrecision::Bf16)));
                }),
                ("tensor operations", &mut || {
                    let turned = turned().into_primitive().tensor();
                    drop(black_box(matmul::<Flex>(x.clone(), turned, MatmulPrecision::F32)));
                }),
            ],
        );
        compare(
            c,
            &format!("linear {features} to {out}, gradient of the input"),
            &mut [
                ("fused", &mut || {
                    drop(black_box(Flex::linear_backward_input(dy.clone(), w.clone(), None, MatmulPrecision::F32)))
                }),
                ("fused, bf16", &mut || {
                    drop(black_box(Flex::linear_backward_input(dy.clone(), half.clone(), None, MatmulPrecision::Bf16)));
                }),
                ("tensor operations", &mut || {
                    drop(black_box(matmul::<Flex>(dy.clone(), w.clone(), MatmulPrecision::F32)));
                }),
            ],
        );
    }
}

/// Measures one row of activations, as in decoding, with packed weights of random blocks.
fn packed(c: &mut Criterion) {
    for (features, out) in [(HIDDEN, HIDDEN), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN), (HIDDEN, VOCABULARY)] {
        let x = tensor(1, [1, features]);
        for kind in [BlockType::Q4_1, BlockType::Q8_0] {
            let (codec, key) = (Codec::from(kind), random::key(&[2]));
            // Bytes below 64 never form an infinite or NaN half-precision scale.
            let bytes: Vec<u8> =
                (0..(out * codec.row_bytes(features)) as u64).map(|at| random::bits(key, at) as u8 & 63).collect();
            let rows = bytes.chunks_exact(codec.row_bytes(features));
            let weight = PackedWeight::<Flex>::new(codec, features, rows, &Default::default());
            compare(
                c,
                &format!("packed {features} to {out}, one row"),
                &mut [(&codec.to_string(), &mut || {
                    drop(black_box(Flex::packed_forward(x.clone(), &weight, MatmulPrecision::F32)));
                })],
            );
        }
    }
}

fn rms_norm(c: &mut Criterion) {
    let (x, w, dy) = (tensor(1, [TOKENS, HIDDEN]), tensor(2, [HIDDEN]), tensor(3, [TOKENS, HIDDEN]));
    compare(
        c,
        "rms_norm",
        &mut [
            ("fused", &mut || drop(black_box(Flex::rms_norm(x.clone(), w.clone(), EPSILON)))),
            ("tensor operations", &mut || {
                drop(black_box(portable::rms_norm::<Flex>(x.clone(), w.clone(), EPSILON)));
            }),
        ],
    );
    let gradient =
        || RmsNormGradient::<Flex> { dy: dy.clone(), accumulated: None, epsilon: EPSILON, weight_trained: false };
    compare(
        c,
        "rms_norm, backward",
        &mut [
            ("fused", &mut || drop(black_box(Flex::rms_norm_backward(x.clone(), w.clone(), gradient())))),
            ("tensor operations", &mut || {
                drop(black_box(portable::rms_norm_backward::<Flex>(x.clone(), w.clone(), gradient())));
            }),
        ],
    );
}

fn elementwise(c: &mut Criterion) {
    let (q, cos) = (tensor(1, [TOKENS, HEADS[0], DIM]), tensor(2, [TOKENS, DIM / 2]));
    compare(
        c,
        "rope",
        &mut [
            ("fused", &mut || drop(black_box(Flex::rope(q.clone(), cos.clone(), cos.clone())))),
            ("tensor operations", &mut || {
                drop(black_box(portable::rope::<Flex>(q.clone(), cos.clone(), cos.clone())));
            }),
        ],
    );
    let [gate, up, dy] = [1, 2, 3].map(|seed| tensor(seed, [TOKENS, INTERMEDIATE]));
    compare(
        c,
        "swiglu",
        &mut [
            ("fused", &mut || drop(black_box(Flex::swiglu(gate.clone(), up.clone(), MatmulPrecision::F32)))),
            ("tensor operations", &mut || drop(black_box(portable::swiglu::<Flex>(gate.clone(), up.clone())))),
        ],
    );
    compare(
        c,
        "swiglu, backward",
        &mut [
            ("fused", &mut || drop(black_box(Flex::swiglu_backward(gate.clone(), up.clone(), dy.clone())))),
            ("tensor operations", &mut || {
                drop(black_box(portable::swiglu_backward::<Flex>(gate.clone(), up.clone(), dy.clone())));
            }),
        ],
    );
}

fn attention(c: &mut Criterion) {
    let [heads, kv_heads] = HEADS;
    let qkv = || {
        [
            tensor(1, [1, TOKENS, heads, DIM]),
            tensor(2, [1, TOKENS, kv_heads, DIM]),
            tensor(3, [1, TOKENS, kv_heads, DIM]),
        ]
    };
    let row = |values: Vec<i32>| ints(values).unsqueeze_dim::<2>(0);
    let segments = || row((0..TOKENS).map(|at| (at / LENGTH) as i32 + 1).collect());
    let positions = || row((0..TOKENS).map(|at| (at % LENGTH) as i32).collect());
    let visibility = AttentionMask::<Flex> {
        query_segments: segments(),
        query_positions: positions(),
        key_segments: segments(),
        key_positions: positions(),
        window: None,
    };
    let (inputs, dy) = (qkv(), tensor(4, [1, TOKENS, heads, DIM]));
    let lse = Flex::flash_attention(inputs.clone(), &visibility).lse;
    compare(
        c,
        "attention",
        &mut [
            ("fused", &mut || drop(black_box(Flex::flash_attention(inputs.clone(), &visibility)))),
            ("tensor operations", &mut || {
                drop(black_box(portable::attention::<Flex>(inputs.clone(), &visibility)));
            }),
        ],
    );
    compare(
        c,
        "attention, backward",
        &mut [
            ("fused", &mut || {
                drop(black_box(Flex::flash_attention_backward(inputs.clone(), &visibility, lse.clone(), dy.clone())));
            }),
            ("tensor operations", &mut || {
                drop(black_box(portable::attention_backward::<Flex>(
                    inputs.clone(),
                    &visibility,
                    lse.clone(),
                    dy.clone(),
                )));
            }),
        ],
    );
}

fn cross_entropy(c: &mut Criterion) {
    let (hidden, head) = (tensor(1, [TOKENS, HIDDEN]), tensor(2, [VOCABULARY, HIDDEN]));
    let half = halved(head.clone());
    let targets = Targets::<Flex> {
        ids: ints((0..TOKENS).map(|at| (at * 7919 % VOCABULARY) as i32).collect()),
        weights: Tensor::ones([TOKENS], (&Default::default(), DType::F32)),
    };
    let dy = Tensor::<Flex, 1>::ones([TOKENS], (&Default::default(), DType::F32)).into_primitive().tensor();
    let inputs = |head: &FlexTensor| CrossEntropyInputs::<Flex> {
        hidden: hidden.clone(),
        head: WeightMatrix::Dense(head.clone()),
        targets: targets.clone(),
    };
    let options = |precision| CrossEntropyOptions { hidden_gradient: true, head_gradient: false, precision };
    let fused = |head: &FlexTensor, precision| {
        let forward = Flex::linear_cross_entropy(inputs(head), options(precision));
        Flex::linear_cross_entropy_backward(inputs(head), forward, dy.clone(), options(precision))
    };
    compare(
        c,
        "linear_cross_entropy with the gradient of the hidden states",
        &mut [
            ("fused", &mut || drop(black_box(fused(&head, MatmulPrecision::F32)))),
            ("fused, bf16", &mut || drop(black_box(fused(&half, MatmulPrecision::Bf16)))),
            ("tensor operations", &mut || {
                let options = options(MatmulPrecision::F32);
                let lse = portable::cross_entropy::<Flex>(inputs(&head), options).lse;
                drop(black_box(portable::cross_entropy_backward::<Flex>(inputs(&head), lse, dy.clone(), options)));
            }),
        ],
    );
}

criterion_group!(kernels, linear, packed, rms_norm, elementwise, attention, cross_entropy);
criterion_main!(kernels);
