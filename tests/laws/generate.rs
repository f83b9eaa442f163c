//! Generation equals that of `transformers` and does not depend on caching, batching or packing.

use burn::{
    backend::Flex,
    tensor::{DType, Tensor, TensorData},
};
use burn_llama::{Checkpoint, Generation, GenerationConfig, Llama, SequenceLayout, generate};
use burn_peft::ForwardContext;
use laws::{fixture, floats, max_diff};
use serde_json::Value;

fn model(name: &str) -> Llama<Flex> {
    Checkpoint::open(&fixture(&format!("models/{name}"))).unwrap().load(DType::F32, &Default::default()).unwrap()
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn greedy_tokens_are_those_of_transformers_alone_and_in_a_batch() {
    let (model, cases) = (model("gqa_llama3"), json("generate/greedy.json"));
    for penalty in [1.0, 1.3] {
        let settings =
            GenerationConfig { max_new_tokens: 24, repetition_penalty: penalty, ..GenerationConfig::default() };
        let cases = cases.as_array().unwrap().iter();
        let cases: Vec<_> = cases.filter(|case| case["repetition_penalty"].as_f64() == Some(penalty)).collect();
        let prompts: Vec<Vec<u32>> = cases.iter().map(|case| ids(&case["prompt"])).collect();
        assert_ne!(prompts[0].len(), prompts[1].len());
        let together = Generation::new(&model, &prompts, &settings).unwrap().finish().unwrap();
        for (index, case) in cases.iter().enumerate() {
            let alone = Generation::new(&model, &prompts[index..=index], &settings).unwrap().finish().unwrap();
            assert_eq!(alone[0], ids(&case["tokens"]), "penalty {penalty}, prompt {index}");
            assert_eq!(together[index], alone[0], "penalty {penalty}, prompt {index} in a batch");
        }
    }
}

#[test]
fn cached_logits_are_the_recomputed_ones() {
    for name in ["gqa_llama3", "mistral_window", "qwen3"] {
        let model = model(name);
        let sequence: Vec<u32> = (0..20).map(|i| (i * 7 + 3) % 60).collect();
        let all = floats(&generate::logits(&model, &sequence).unwrap().into_data());
        let vocabulary = model.config().vocab_size;
        let mut by_steps: Vec<f32> = Vec::new();
        generate::logits_by_steps(&model, &sequence, |logits| by_steps.extend_from_slice(logits)).unwrap();
        assert_eq!(by_steps.len(), all.len(), "{name}");
        let largest = all.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        assert!(max_diff(&by_steps, &all) <= 2e-5 * largest, "{name}: {}", max_diff(&by_steps, &all));
        // One token at a time, each scored with the KV cache of the tokens before it.
        for n in [1, 5, 19] {
            let tail = &sequence[n..];
            let scores = generate::log_likelihoods(&model, &sequence[..n], &[tail.to_vec()]).unwrap();
            let expected: f64 = (n..sequence.len())
                .map(|i| {
                    let row = &all[(i - 1) * vocabulary..i * vocabulary];
                    let sum: f64 = row.iter().map(|&x| (x as f64).exp()).sum();
                    row[sequence[i] as usize] as f64 - sum.ln()
                })
                .sum();
            assert!((scores[0] - expected).abs() < 1e-4, "{name} after {n}: {} against {expected}", scores[0]);
        }
    }
}

#[test]
fn packed_sequences_are_the_separate_ones() {
    let (model, context) = (model("gqa_llama3"), ForwardContext::default());
    let (a, b): (Vec<i32>, Vec<i32>) = ((0..9).map(|i| i * 5 % 60).collect(), (0..70).map(|i| i * 11 % 60).collect());
    let hidden = |rows: &[Vec<usize>], tokens: &[i32]| {
        let layout = SequenceLayout::packed(rows);
        let data = TensorData::new(tokens.to_vec(), [rows.len(), layout.length]);
        let ids = Tensor::<Flex, 2, burn::tensor::Int>::from_data(data, &Default::default());
        floats(&model.hidden_states(model.embed(ids), &layout, None, &context).unwrap().into_data())
    };
    let together = hidden(&[vec![9, 70]], &[a.clone(), b.clone()].concat());
    let apart = [hidden(&[vec![9]], &a), hidden(&[vec![70]], &b)].concat();
    assert!(max_diff(&together, &apart) < 1e-5);
}

#[test]
fn sampling_filters_are_those_of_transformers() {
    let case = json("generate/logits_processors.json");
    let logits: Vec<f32> = case["logits"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
    let history = ids(&case["history"]);
    // The default is temperature 1 without filters; each row changes one or more settings.
    let plain = GenerationConfig { temperature: 1.0, ..GenerationConfig::default() };
    let table = [
        ("repetition_penalty", GenerationConfig { repetition_penalty: 1.3, ..plain.clone() }),
        ("temperature", GenerationConfig { temperature: 0.7, ..plain.clone() }),
        ("top_k", GenerationConfig { top_k: 5, ..plain.clone() }),
        ("top_p", GenerationConfig { top_p: 0.8, ..plain.clone() }),
        ("chain", GenerationConfig { repetition_penalty: 1.3, temperature: 0.7, top_k: 5, top_p: 0.8, ..plain }),
    ];
    for (name, settings) in table {
        let mut found = logits.clone();
        settings.process_logits(&mut found, &history);
        let expected = case["results"][name]["logits"].as_array().unwrap();
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            match expected.as_f64() {
                None => assert_eq!(*found, f32::NEG_INFINITY, "{name}: {i}"),
                Some(x) => assert!((*found as f64 - x).abs() < 1e-5, "{name}: {i}: {found} against {x}"),
            }
        }
    }
}

#[test]
fn draws_follow_the_probabilities_and_the_seed() {
    let logits = [0.0f32, 1.0, 2.0, -1.0];
    let settings = GenerationConfig { temperature: 1.0, ..GenerationConfig::default() };
    let total: f64 = logits.iter().map(|&x| (x as f64).exp()).sum();
    let (n, mut counts) = (100_000, [0usize; 4]);
    for step in 0..n {
        counts[settings.sample(&mut logits.clone(), &[], 0, step) as usize] += 1;
    }
    for (count, logit) in counts.iter().zip(logits) {
        let (share, expected) = (*count as f64 / n as f64, (logit as f64).exp() / total);
        assert!((share - expected).abs() < 6e-3, "{share} against {expected}");
    }
    let draw = |seed, step| GenerationConfig { seed, ..settings.clone() }.sample(&mut logits.clone(), &[], 0, step);
    assert_eq!((0..50).map(|s| draw(1, s)).collect::<Vec<_>>(), (0..50).map(|s| draw(1, s)).collect::<Vec<_>>());
    assert_ne!((0..50).map(|s| draw(1, s)).collect::<Vec<_>>(), (0..50).map(|s| draw(2, s)).collect::<Vec<_>>());
}
