//! Decoding on preallocated buffers equals the forward pass on tensors.

use super::*;
use crate::{LlamaConfig, SequenceLayout, layout::int_tensor};
use burn::tensor::{DType, Tensor, TensorData};
use burn_peft::{Ia3Config, Linears, LoraConfig, PromptConfig, Weight, adapter};
use burn_peft_kernels::PackedWeight;
use serde_json::{Value, json};

fn model(changes: Value) -> Llama<Flex> {
    let mut fields = json!({
        "model_type": "llama", "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    });
    let changes = changes.as_object().unwrap().clone();
    fields.as_object_mut().unwrap().extend(changes);
    let mut model = LlamaConfig::from_json(fields).unwrap().init::<Flex>(3, &Default::default());
    // Initial norms and biases have equal values everywhere, which would hide errors.
    model.linears_mut(&mut |_, linear| {
        linear.bias = linear.bias.take().map(|bias| bias.map(uneven));
    });
    for layer in &mut model.model.layers {
        let norms =
            [Some(&mut layer.input_layernorm), layer.self_attn.q_norm.as_mut(), layer.self_attn.k_norm.as_mut()];
        norms.into_iter().flatten().for_each(|norm| norm.weight = norm.weight.clone().map(uneven));
    }
    model
}

fn uneven(x: Tensor<Flex, 1>) -> Tensor<Flex, 1> {
    let values: Vec<f32> = (0..x.dims()[0]).map(|i| 0.6 + (i * 7 % 5) as f32 / 5.0).collect();
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), &x.device())
}

fn adapted(mut model: Llama<Flex>, changes: Value) -> Llama<Flex> {
    let mut fields = json!({ "r": 4, "target_modules": "all-linear", "init_lora_weights": false });
    fields.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    adapter::attach(&mut model, "a", &serde_json::from_value::<LoraConfig>(fields).unwrap(), 5).unwrap();
    model
}

fn stored(mut model: Llama<Flex>, as_stored: impl Fn(Tensor<Flex, 2>) -> Weight<Flex>) -> Llama<Flex> {
    model.linears_mut(&mut |_, linear| linear.weight = as_stored(linear.weight.val()));
    model
}

fn cases() -> Vec<(&'static str, Llama<Flex>)> {
    let with_prefix = |mut model: Llama<Flex>| {
        model.prompts = vec![model.new_prompt(&PromptConfig::prefix(3), None, 5).unwrap()];
        model
    };
    let nf4 = |weight: Tensor<Flex, 2>| {
        let (features, values) = (weight.dims()[1], weight.into_data().into_vec::<f32>().unwrap());
        Weight::packed("w", PackedWeight::nf4(&values, features, &Default::default()).unwrap())
    };
    vec![
        ("plain", model(json!({}))),
        ("tied", model(json!({ "tie_word_embeddings": true }))),
        ("biases", model(json!({ "model_type": "qwen2" }))),
        ("norms of heads", model(json!({ "model_type": "qwen3" }))),
        ("window", model(json!({ "model_type": "mistral", "sliding_window": 5 }))),
        ("scaled positions", model(json!({ "rope_scaling": { "rope_type": "linear", "factor": 3.0 } }))),
        ("prefix", with_prefix(model(json!({})))),
        ("prefix and window", with_prefix(model(json!({ "model_type": "mistral", "sliding_window": 5 })))),
        ("lora", adapted(model(json!({ "model_type": "qwen2" })), json!({}))),
        ("bf16", stored(model(json!({})), |weight| Weight::dense("w", weight.cast(DType::BF16)))),
        ("f16", stored(model(json!({})), |weight| Weight::dense("w", weight.cast(DType::F16)))),
        (
            "nf4 and lora",
            adapted(
                stored(model(json!({ "hidden_size": 128, "intermediate_size": 192, "head_dim": 32 })), nf4),
                json!({}),
            ),
        ),
    ]
}

#[test]
fn a_step_gives_the_logits_of_the_forward_pass() {
    for (name, model) in cases() {
        for prompts in [vec![vec![7, 3, 9]], vec![vec![4; 9], vec![9, 5], vec![1]]] {
            let rows = model.active_row_adapters(prompts.len());
            let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
            let layout = SequenceLayout::padded(&lengths);
            let ids = prompts.iter().flat_map(|row| (0..layout.length).map(|i| *row.get(i).unwrap_or(&0))).collect();
            let arranged = model.layout_with_prompts(&layout, &rows);
            let (x, mut cache) = model.prefill_inputs(ids, &arranged, &rows);
            model
                .hidden_states(x, &arranged.layout, Some(&mut cache), &rows.forward_context(arranged.layout.length))
                .unwrap();
            let (mut by_steps, mut by_tensors) = (cache.clone(), cache);
            let (mut plan, mut logits) = (FlexDecoder::of(&model, prompts.len()).unwrap(), Vec::new());
            let before = rows.num_virtual_tokens(&model);
            // The steps go beyond the capacity of the cache and beyond the window.
            for step in 0..70 {
                let ids: Vec<u32> = (0..prompts.len()).map(|row| ((step * 11 + row * 5 + 2) % 61) as u32).collect();
                let positions: Vec<usize> = lengths.iter().zip(&before).map(|(n, b)| b + n + step).collect();
                assert!(plan.step(&ids, &positions, &mut by_steps, &mut logits));
                let ids = int_tensor(ids.into_iter().map(|id| id as i32).collect(), prompts.len(), &model.device());
                let layout = SequenceLayout::next_token(&positions);
                let context = rows.forward_context(1);
                let hidden = model.hidden_states(model.embed(ids), &layout, Some(&mut by_tensors), &context).unwrap();
                let expected = model.head(hidden, &context).into_data().into_vec::<f32>().unwrap();
                let size = expected.iter().fold(0f32, |size, x| size.max(x.abs()));
                for (found, expected) in logits.iter().zip(&expected) {
                    let off = (found - expected).abs();
                    assert!(off <= 2e-5 * size, "{name}, {} rows, step {step}: {off} of {size}", prompts.len());
                }
                assert_eq!((logits.len(), by_steps.num_slots()), (expected.len(), by_tensors.num_slots()));
            }
        }
    }
}

#[test]
fn unsupported_models_have_no_decoder() {
    let dora = adapted(model(json!({})), json!({ "use_dora": true }));
    assert!(FlexDecoder::of(&dora, 1).is_none());
    let mut factors = model(json!({}));
    adapter::attach_ia3(&mut factors, "a", &Ia3Config::default()).unwrap();
    assert!(FlexDecoder::of(&factors, 1).is_none());
    assert!(FlexDecoder::of(&model(json!({})), MAX_ROWS + 1).is_none());
}
