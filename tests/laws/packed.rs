//! Packed weights behave like the dense weights they decode to (products, gradients, generated text) and are never
//! float parameters.

use burn::{
    backend::{Autodiff, Flex},
    module::{AutodiffModule, Module, ModuleVisitor, Param},
    tensor::{DType, Int, Tensor, TensorData, backend::Backend, f16, s},
};
use burn_llama::{
    Checkpoint, Example, Generation, GenerationConfig, Llama, SequenceLayout, Storage,
    checkpoint::{self, gguf::write},
    generate,
};
use burn_peft::{
    DropoutKey, Error, ForwardContext, Ia3Config, Linear, Linears, LoraConfig, TargetModules, adapter,
    config::InitLoraWeights, param, random,
};
use burn_peft_kernels::{
    MatmulPrecision,
    packed::{BlockType, Codec, PackedWeight, nf4},
};
use laws::{fixture, floats, max_abs, max_diff, one_backward_at_a_time, reference::compare};
use std::collections::BTreeMap;

type Train = Autodiff<Flex>;

/// Block formats with the byte offsets of their half-precision scales.
const BLOCKS: [(BlockType, &[usize]); 7] = [
    (BlockType::Q8_0, &[0]),
    (BlockType::Q4_0, &[0]),
    (BlockType::Q4_1, &[0, 2]),
    (BlockType::Q5_0, &[0]),
    (BlockType::Q5_1, &[0, 2]),
    (BlockType::Q4_K, &[0, 2]),
    (BlockType::Q6_K, &[208]),
];

/// Returns `n` pseudo-random numbers in `±1`, seeded by `name`.
fn numbers(name: &str, n: usize) -> Vec<f32> {
    let key = random::key_from_str(name);
    (0..n as u64).map(|i| (2.0 * random::uniform(key, i) - 1.0) as f32).collect()
}

fn matrix<B: Backend>(values: &[f32], rows: usize) -> Tensor<B, 2> {
    let data = TensorData::new(values.to_vec(), [rows, values.len() / rows]);
    Tensor::from_data(data, (&B::Device::default(), DType::F32))
}

/// Returns a packed weight `[out, features]` of random bytes with realistic scales, and its bytes.
fn blocks<B: Backend>(kind: BlockType, halves: &[usize], [out, features]: [usize; 2]) -> (PackedWeight<B>, Vec<u8>) {
    let (size, key) = (kind.block_bytes(), random::key_from_str(&format!("{kind:?}")));
    let mut bytes: Vec<u8> =
        (0..(out * features / kind.block_len() * size) as u64).map(|i| random::bits(key, i) as u8).collect();
    for (index, block) in bytes.chunks_exact_mut(size).enumerate() {
        for &at in halves {
            let value = f16::from_f32(0.01 * (random::uniform(key, (index + at) as u64) as f32 - 0.3));
            block[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
    }
    let row = Codec::from(kind).row_bytes(features);
    (PackedWeight::new(kind.into(), features, bytes.chunks_exact(row), &Default::default()), bytes)
}

/// Returns every codec with a packed weight `[out, features]` and the values that its rows decode to.
fn cases<B: Backend>() -> Vec<(Codec, PackedWeight<B>, Vec<f32>)> {
    let shape = [777, 768];
    let decoded = |codec: Codec, bytes: &[u8]| {
        let rows = bytes.chunks_exact(codec.row_bytes(shape[1]));
        let mut values = vec![0.0; shape[0] * shape[1]];
        values.chunks_exact_mut(shape[1]).zip(rows).for_each(|(out, row)| codec.decode(row, out));
        values
    };
    let mut all: Vec<_> = BLOCKS
        .iter()
        .map(|&(kind, halves)| {
            let (packed, bytes) = blocks(kind, halves, shape);
            (kind.into(), packed, decoded(kind.into(), &bytes))
        })
        .collect();
    let values = numbers("weight", shape[0] * shape[1]);
    let packed = PackedWeight::nf4(&values, shape[1], &Default::default()).unwrap();
    all.push((Codec::Nf4, packed, decoded(Codec::Nf4, &nf4::encode(&values, shape[1]).unwrap())));
    all
}

/// Computes `a [m, k] · b [k, n]` in f64, where `at` returns the elements of `b`.
fn product(a: &[f32], m: usize, [k, n]: [usize; 2], at: impl Fn(usize, usize) -> f32) -> Vec<f32> {
    let sum = |i: usize, j: usize| (0..k).map(|l| f64::from(a[i * k + l]) * f64::from(at(l, j))).sum::<f64>();
    (0..m * n).map(|index| sum(index / n, index % n) as f32).collect()
}

fn close(found: &[f32], expected: &[f32], limit: f32, name: &str) {
    let (difference, size) = (max_diff(found, expected), max_abs(expected));
    assert!(size > 0.1 && difference <= limit * size, "{name}: {difference:e} of {size:e}");
}

#[test]
fn products_and_their_gradients_are_those_of_the_decoded_weight() {
    let _lock = one_backward_at_a_time();
    for (codec, packed, values) in cases::<Train>() {
        let [out, features] = packed.shape();
        assert_eq!(floats(&packed.values().into_data()), values, "{codec}");
        for tokens in [1, 2, 7, 64] {
            let name = format!("{codec} × {tokens}");
            let (x, dy) = (numbers(&name, tokens * features), numbers("dy", tokens * out));
            let input = matrix::<Train>(&x, tokens).require_grad();
            let y = Linear::packed("layer", packed.clone(), None).forward(input.clone(), &ForwardContext::default());
            // Activations of up to 8 rows may be rounded to 16-bit fixed point.
            close(
                &floats(&y.clone().into_data()),
                &product(&x, tokens, [features, out], |l, j| values[j * features + l]),
                if tokens <= 8 { 4e-5 } else { 1e-5 },
                &name,
            );
            let mut grads = (y * matrix(&dy, tokens)).sum().backward();
            let dx = floats(&input.grad_remove(&mut grads).unwrap().into_data());
            close(&dx, &product(&dy, tokens, [out, features], |l, j| values[l * features + j]), 1e-5, &name);
        }
    }
}

#[test]
fn rows_in_any_order_and_activations_of_any_layout_and_type() {
    for (codec, packed, values) in cases::<Flex>() {
        let ids = Tensor::<Flex, 1, Int>::from_data(TensorData::from([776i32, 0, 5, 5]), &Default::default());
        let found = floats(&packed.select(ids).values().into_data());
        let row = |id: usize| &values[id * 768..(id + 1) * 768];
        assert_eq!(found, [row(776), row(0), row(5), row(5)].concat(), "{codec}");
        for tokens in [3, 20] {
            let x = matrix::<Flex>(&numbers("x", tokens * 768), tokens);
            let y = floats(&packed.linear(x.clone(), MatmulPrecision::F32).into_data());
            let wide = Tensor::cat(vec![x.zeros_like(), x.clone()], 1).slice(s![.., 768..]);
            assert_eq!(floats(&packed.linear(wide, MatmulPrecision::F32).into_data()), y, "{codec}");
            let half = packed.linear(x.cast(DType::BF16), MatmulPrecision::F32);
            assert_eq!(half.dtype(), DType::BF16);
            let difference = max_diff(&floats(&half.into_data()), &y);
            assert!(difference < 0.02 * max_abs(&y), "{codec}: {difference}");
        }
    }
}

/// Quantizes and dequantizes a weight by the formulas of bitsandbytes, block by block over the whole weight; where
/// bitsandbytes does not round, in f64.
fn bitsandbytes(values: &[f32]) -> Vec<f32> {
    let blocks: Vec<&[f32]> = values.chunks(64).collect();
    let largest: Vec<f32> = blocks.iter().map(|block| max_abs(block)).collect();
    let mean = (largest.iter().map(|&x| f64::from(x)).sum::<f64>() / largest.len() as f64) as f32;
    let nearest = |table: &[f32], x: f32| {
        let far = |a: &&f32, b: &&f32| (*a - x).abs().total_cmp(&(*b - x).abs());
        *table.iter().min_by(far).unwrap()
    };
    let restored = largest.chunks(256).flat_map(|group| {
        let scale = group.iter().fold(0.0f32, |max, x| (x - mean).abs().max(max));
        group
            .iter()
            .map(move |x| nearest(nf4::DYNAMIC_MAP.as_slice(), (x - mean) / scale) * scale + mean)
            .collect::<Vec<_>>()
    });
    let values = blocks.iter().zip(&largest).zip(restored).flat_map(|((block, largest), scale)| {
        block.iter().map(move |x| nearest(&nf4::VALUES, x / largest) * scale).collect::<Vec<_>>()
    });
    values.collect()
}

#[test]
fn nf4_is_that_of_bitsandbytes_and_close_to_the_weight() {
    // In these shapes groups of 256 blocks begin in the middle of rows, and a row can be longer than a group.
    for [out, features] in [[60, 576], [3, 64], [4, 64 * 300]] {
        let key = random::key_from_str("normal");
        let values: Vec<f32> = (0..(out * features) as u64).map(|i| random::normal(key, i) as f32 * 0.02).collect();
        let packed = PackedWeight::<Flex>::nf4(&values, features, &Default::default()).unwrap();
        let found = floats(&packed.values().into_data());
        assert_eq!(found, bitsandbytes(&values), "{out} × {features}");
        let square = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
        let error: Vec<f32> = found.iter().zip(&values).map(|(a, b)| a - b).collect();
        // With 16 levels fitted to a normal distribution, about 99 % of its power is preserved.
        let lost = square(&error) / square(&values);
        assert!(lost < 0.012, "{lost}");
        let bits = 8.0 * packed.num_bytes() as f64 / values.len() as f64;
        assert!(bits < if features == 64 { 6.2 } else { 4.45 }, "{bits} bits per value");
    }
    let zeros = PackedWeight::<Flex>::nf4(&[0.0; 128], 64, &Default::default()).unwrap();
    assert_eq!(floats(&zeros.values().into_data()), [0.0; 128]);
    assert_eq!(PackedWeight::<Flex>::nf4(&[f32::INFINITY; 64], 64, &Default::default()).unwrap_err(), f32::INFINITY);
}

/// Returns the models with packed weights.
fn models() -> [(&'static str, std::path::PathBuf, Storage); 2] {
    [("gguf", fixture("gguf/model.gguf"), Storage::Packed), ("nf4", fixture("gguf/model.gguf"), Storage::Nf4)]
}

fn load<B: burn_llama::kernel::Kernels>(index: usize) -> Llama<B> {
    let (_, path, storage) = &models()[index];
    Checkpoint::open(path).unwrap().load(*storage, &Default::default()).unwrap()
}

#[test]
fn greedy_text_is_that_of_the_decoded_weights() {
    for (index, (name, ..)) in models().into_iter().enumerate() {
        let packed = load::<Flex>(index);
        let dense = packed.clone().unpacked();
        let prompts = [vec![1u32, 5, 3], vec![2u32, 7, 9, 4, 4, 8, 6, 3, 1, 2, 5]];
        let settings = GenerationConfig { max_new_tokens: 24, ..GenerationConfig::default() };
        let text = |model| Generation::new(model, &prompts, &settings).unwrap().finish().unwrap();
        assert_eq!(text(&packed), text(&dense), "{name}");
        let logits = |model| floats(&generate::logits(model, &prompts[1]).unwrap().into_data());
        let (found, expected) = (logits(&packed), logits(&dense));
        close(&found, &expected, 1e-5, name);
    }
    let file = Checkpoint::open(&fixture("gguf/model.gguf")).unwrap();
    let floats_of = file.load::<Flex>(DType::F32, &Default::default()).unwrap();
    let all = |model: &Llama<Flex>| {
        let mut all = vec![floats(&model.model.embed_tokens.weight.val().into_data())];
        model.linears(&mut |_, linear| all.push(floats(&linear.weight.val().into_data())));
        all
    };
    assert_eq!(all(&load::<Flex>(0)), all(&floats_of), "the rows are in the order of the Hugging Face checkpoint");
}

/// The paths of the float parameters and of the integer parameters.
#[derive(Default)]
struct ParameterPaths {
    path: Vec<String>,
    floats: Vec<String>,
    integers: Vec<String>,
}

impl<B: Backend> ModuleVisitor<B> for ParameterPaths {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.floats.push(self.path.join("."));
        assert_eq!(param.id, param::id(&self.path.join(".")));
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<B, D, Int>>) {
        self.integers.push(self.path.join("."));
        assert_eq!(param.id, param::id(&self.path.join(".")));
    }
}

#[test]
fn packed_weights_are_no_float_parameters_and_keep_their_paths() {
    let _lock = one_backward_at_a_time();
    for (index, (name, ..)) in models().into_iter().enumerate() {
        let packed = load::<Train>(index);
        let paths = |model: &Llama<Train>| {
            let mut paths = ParameterPaths::default();
            model.visit(&mut paths);
            paths
        };
        let (found, all) = (paths(&packed), paths(&packed.clone().unpacked()));
        assert!(found.integers.len() >= 5 && all.integers.is_empty(), "{name}: {:?}", found.integers);
        assert!(found.floats.iter().all(|path| !found.integers.contains(path)));
        let mut together = [found.floats, found.integers].concat();
        let mut expected = all.floats;
        together.sort();
        expected.sort();
        assert_eq!(together, expected, "{name}");
        let values = |model: &Llama<Train>| model.num_params();
        let (few, many) = (values(&packed), values(&packed.clone().unpacked()));
        assert!(few < many, "{name}: {few} of {many} values are floats");
        // The packed rows survive a move between devices and a module mapper.
        let again = param::train_only(packed.clone().fork(&Default::default()), |_| false);
        let logits = |model: &Llama<Flex>| floats(&generate::logits(model, &[1, 2, 3]).unwrap().into_data());
        assert_eq!(logits(&again.valid()), logits(&packed.valid()), "{name}");
        assert_eq!(param::count_trainable(&again), 0);
    }
}

fn lora() -> LoraConfig {
    let target_modules = TargetModules::Pattern("all-linear".into());
    LoraConfig {
        r: 4,
        lora_dropout: 0.2,
        init_lora_weights: InitLoraWeights::False,
        target_modules,
        ..LoraConfig::default()
    }
}

/// Returns the loss and every gradient by path.
fn gradients(model: &Llama<Train>) -> (f32, BTreeMap<String, Vec<f32>>) {
    let rows = [13usize, 5].map(|n| Example {
        ids: (0..n as u32).map(|i| (i * 7 + 3) % 10).collect(),
        loss_mask: (0..n).map(|i| i > 1).collect(),
    });
    let layout = SequenceLayout::from_lengths(&[13, 5], true);
    let noise = DropoutKey { seed: 1, step: 2, tokens: layout.dropout_tokens(0) };
    let batch = model.batch(&rows, &layout, 0.1, ForwardContext::training(noise)).unwrap();
    let loss = model.batch_loss(&batch).sum();
    let mut grads = loss.backward();
    let mut found = GradientCollector { path: Vec::new(), grads: &mut grads, found: BTreeMap::new() };
    model.visit(&mut found);
    (floats(&loss.into_data())[0], found.found)
}

struct GradientCollector<'a> {
    path: Vec<String>,
    grads: &'a mut <Train as burn::tensor::backend::AutodiffBackend>::Gradients,
    found: BTreeMap<String, Vec<f32>>,
}

impl ModuleVisitor<Train> for GradientCollector<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
        if let Some(gradient) = param.val().grad_remove(self.grads) {
            self.found.insert(self.path.join("."), floats(&gradient.into_data()));
        }
    }
}

#[test]
fn adapters_on_packed_weights_learn_as_on_the_decoded_ones() {
    let _lock = one_backward_at_a_time();
    type Attach = fn(&mut Llama<Train>);
    let methods: [(&str, Attach); 3] = [
        ("lora", |model| adapter::attach(model, "a", &lora(), 5).unwrap()),
        ("dora", |model| adapter::attach(model, "a", &LoraConfig { use_dora: true, ..lora() }, 5).unwrap()),
        ("ia3", |model| adapter::attach_ia3(model, "a", &Ia3Config::default()).unwrap()),
    ];
    for (index, (base, ..)) in models().into_iter().enumerate() {
        for (method, attach) in methods {
            let found = |mut model: Llama<Train>| {
                attach(&mut model);
                gradients(&param::train_only(model, adapter::is_adapter))
            };
            let packed = load::<Train>(index);
            let (expected_loss, expected) = found(packed.clone().unpacked());
            let (loss, found) = found(packed);
            assert!((loss - expected_loss).abs() <= 1e-5 * expected_loss.abs(), "{base} {method}: {loss}");
            assert!(!found.is_empty() && found.keys().eq(expected.keys()), "{base} {method}");
            for (path, gradient) in &found {
                compare(gradient, &expected[path], &format!("{base} {method} {path}"));
            }
        }
    }
}

#[test]
fn what_would_change_packed_weights_is_refused_and_changes_nothing() {
    let mut model = load::<Flex>(0);
    let before = floats(&generate::logits(&model, &[1, 2, 3]).unwrap().into_data());
    let refused = |result: Result<(), Error>| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Packed { .. }), "{error}");
        assert!(error.to_string().contains("float weights"), "{error}");
    };
    let pissa = LoraConfig { init_lora_weights: InitLoraWeights::Pissa { niter: Some(2) }, ..lora() };
    refused(adapter::attach(&mut model, "a", &pissa, 0));
    let saved = LoraConfig { modules_to_save: Some(vec!["down_proj".into()]), ..LoraConfig::default() };
    refused(adapter::attach(&mut model, "a", &saved, 0));
    adapter::attach(&mut model, "a", &LoraConfig::default(), 0).unwrap();
    refused(adapter::merge(&mut model, "a"));
    assert_eq!(floats(&generate::logits(&model, &[1, 2, 3]).unwrap().into_data()), before);

    let out = tempfile::tempdir().unwrap();
    let error = checkpoint::save(&model, out.path()).unwrap_err().to_string();
    assert!(error.contains("embed_tokens") && error.contains("float type"), "{error}");
    let error = write::save(&model, vec![], BlockType::F32, &out.path().join("a.gguf")).unwrap_err().to_string();
    assert!(error.contains("packed rows"), "{error}");
    let directory = Checkpoint::open(&fixture("models/mha")).unwrap();
    let error = directory.load::<Flex>(Storage::Packed, &Default::default()).unwrap_err().to_string();
    assert!(error.contains("GGUF") && error.contains("nf4"), "{error}");
}
