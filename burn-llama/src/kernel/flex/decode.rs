//! Decoding on preallocated buffers, one token per row and step: no tensor is created, and the matrix products of one
//! input are divided among the threads together. It computes the same as the model's forward pass, for models whose
//! layers have only weights, biases and LoRA adapters.

mod attention;

use super::{
    buffer::{contiguous, to_f32},
    vector_ops::{exp, vectorized},
};
use crate::{
    KeyValue, KvCache, Llama,
    kernel::{StepDecoder, primitive, tensor},
    model::RmsNorm,
};
use attention::{CacheSlices, HeadShape, decode_attention, rotate_rows, visible_ranges};
use burn::backend::Flex;
use burn_flex::FlexTensor;
use burn_peft::Linear;
use burn_peft_kernels::{
    WeightMatrix,
    gemv::{Gemv, WeightRows, gemv_batch},
};
use std::ops::Range;

/// The largest number of rows in a batch.
const MAX_ROWS: usize = 8;

/// The weights of a LoRA adapter, which adds `scaling · x·Aᵀ·Bᵀ`.
#[derive(Debug)]
struct LoraWeights {
    a: WeightRows,
    b: WeightRows,
    scaling: f32,
}

/// A linear layer with its active adapters.
#[derive(Debug)]
struct Projection {
    weight: WeightRows,
    bias: Option<Vec<f32>>,
    adapters: Vec<LoraWeights>,
}

impl Projection {
    fn of(linear: &Linear<Flex>) -> Option<Self> {
        if linear.ia3.iter().any(|ia3| ia3.active && !ia3.merged) {
            return None;
        }
        let mut adapters = Vec::new();
        for adapter in linear.adapters.iter().filter(|adapter| adapter.active && !adapter.merged) {
            if adapter.dora.is_some() {
                return None;
            }
            let rows = |values| WeightRows::new(WeightMatrix::Dense(primitive::<Flex, 2>(values)));
            let [a, b] = [&adapter.lora_a, &adapter.lora_b].map(|values| rows(values.val()));
            adapters.push(LoraWeights { a, b, scaling: adapter.scaling as f32 });
        }
        let bias = linear.bias.as_ref().map(|bias| to_f32(&contiguous(primitive(bias.val()))).into_owned());
        Some(Self { weight: WeightRows::new(linear.weight.matrix_ref()), bias, adapters })
    }

    /// Adds the bias and the outputs of the adapters to `y`.
    fn add_bias_and_adapters(&self, x: &[f32], y: &mut [f32], LoraBuffers { a_output, b_output }: &mut LoraBuffers) {
        let [out, features] = self.weight.shape();
        if let Some(bias) = &self.bias {
            y.chunks_exact_mut(out).for_each(|y| add(y, bias));
        }
        let rows = x.len() / features;
        for LoraWeights { a, b, scaling } in &self.adapters {
            a_output.resize(rows * a.shape()[0], 0.0);
            b_output.resize(rows * out, 0.0);
            gemv_batch([Gemv { weight: a, x, y: a_output }]);
            a_output.iter_mut().for_each(|value| *value *= scaling);
            gemv_batch([Gemv { weight: b, x: a_output, y: b_output }]);
            add(y, b_output);
        }
    }
}

#[derive(Debug)]
struct DecodeRmsNorm {
    weight: Vec<f32>,
    epsilon: f64,
}

impl DecodeRmsNorm {
    fn of(norm: &RmsNorm<Flex>) -> Self {
        let weight = to_f32(&contiguous(primitive(norm.weight.val()))).into_owned();
        Self { weight, epsilon: norm.epsilon }
    }

    /// Normalises every chunk of `x` that is as long as the weight, into `y`.
    fn apply(&self, x: &[f32], y: &mut [f32]) {
        let width = self.weight.len();
        y.copy_from_slice(x);
        y.chunks_exact_mut(width).for_each(|y| self.apply_in_place(y));
    }

    fn apply_in_place(&self, x: &mut [f32]) {
        vectorized(
            #[inline(always)]
            || {
                for x in x.chunks_exact_mut(self.weight.len()) {
                    let r = super::rms_norm::inverse_rms(x, self.epsilon);
                    for (x, w) in x.iter_mut().zip(&self.weight) {
                        *x = *x * r * w;
                    }
                }
            },
        );
    }
}

#[derive(Debug)]
struct DecodeLayer {
    input_norm: DecodeRmsNorm,
    qkv: [Projection; 3],
    qk_norms: [Option<DecodeRmsNorm>; 2],
    output: Projection,
    post_attention_norm: DecodeRmsNorm,
    gate_up: [Projection; 2],
    down: Projection,
}

impl DecodeLayer {
    fn of(layer: &crate::model::Layer<Flex>) -> Option<Self> {
        let (attention, mlp) = (&layer.self_attn, &layer.mlp);
        let of = Projection::of;
        Some(Self {
            input_norm: DecodeRmsNorm::of(&layer.input_layernorm),
            qkv: [of(&attention.q_proj)?, of(&attention.k_proj)?, of(&attention.v_proj)?],
            qk_norms: [&attention.q_norm, &attention.k_norm].map(|norm| norm.as_ref().map(DecodeRmsNorm::of)),
            output: of(&attention.o_proj)?,
            post_attention_norm: DecodeRmsNorm::of(&layer.post_attention_layernorm),
            gate_up: [of(&mlp.gate_proj)?, of(&mlp.up_proj)?],
            down: of(&mlp.down_proj)?,
        })
    }
}

/// The weights of a model in the form that a decode step needs, with the scratch memory of one step.
#[derive(Debug)]
pub(super) struct FlexDecoder {
    embedding: WeightRows,
    layers: Vec<DecodeLayer>,
    norm: DecodeRmsNorm,
    head: Projection,
    sizes: HeadShape,
    window: Option<usize>,
    frequencies: Vec<f32>,
    rope_scale: f64,
    buffers: DecodeBuffers,
}

/// Scratch memory of one decode step; rows lie back to back.
#[derive(Debug, Default)]
struct DecodeBuffers {
    /// The residual stream.
    residual: Vec<f32>,
    normed: Vec<f32>,
    block_output: Vec<f32>,
    qkv: [Vec<f32>; 3],
    attention_output: Vec<f32>,
    gate_up: [Vec<f32>; 2],
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// The attention scores of every row and head.
    scores: Vec<f32>,
    /// The ranges of cache slots visible to each row.
    visible: Vec<Vec<Range<usize>>>,
    lora: LoraBuffers,
}

/// Scratch memory of the LoRA adapters.
#[derive(Debug, Default)]
struct LoraBuffers {
    /// The output of A, `[rows, rank]`.
    a_output: Vec<f32>,
    /// The output of B, `[rows, out]`.
    b_output: Vec<f32>,
}

impl FlexDecoder {
    /// Builds the decoder; returns `None` if there are too many rows, or if anything but LoRA adapters acts on a layer.
    pub(super) fn of(model: &Llama<Flex>, rows: usize) -> Option<Self> {
        let config = model.config();
        if rows > MAX_ROWS {
            return None;
        }
        if model.model.embed_tokens.is_adapted() {
            return None;
        }
        let table = model.model.embed_tokens.weight.matrix_ref();
        let head = match &model.lm_head {
            Some(head) => Projection::of(head)?,
            None => Projection { weight: WeightRows::new(table.clone()), bias: None, adapters: Vec::new() },
        };
        let layers = model.model.layers.iter().map(DecodeLayer::of).collect::<Option<Vec<_>>>()?;
        let (frequencies, scale) = config.rope_scaling.frequencies(config.head_dim, config.rope_theta);
        let (kv_heads, dim) = (config.num_key_value_heads, config.head_dim);
        let group = config.num_attention_heads / kv_heads;
        let room = |n: usize| vec![0.0; rows * n];
        let hidden = || room(config.hidden_size);
        let buffers = DecodeBuffers {
            residual: hidden(),
            normed: hidden(),
            block_output: hidden(),
            qkv: [kv_heads * group, kv_heads, kv_heads].map(|heads| room(heads * dim)),
            attention_output: room(kv_heads * group * dim),
            gate_up: [(); 2].map(|()| room(config.intermediate_size)),
            cos: room(frequencies.len()),
            sin: room(frequencies.len()),
            visible: vec![Vec::new(); rows],
            ..DecodeBuffers::default()
        };
        Some(Self {
            embedding: WeightRows::new(table),
            layers,
            norm: DecodeRmsNorm::of(&model.model.norm),
            head,
            sizes: HeadShape { kv_heads, group, dim },
            window: config.sliding_window,
            frequencies,
            rope_scale: scale,
            buffers,
        })
    }
}

impl StepDecoder<Flex> for FlexDecoder {
    fn step(&mut self, ids: &[u32], positions: &[usize], past: &mut KvCache<Flex>, logits: &mut Vec<f32>) -> bool {
        let Some(capacity) = past.ensure_room_for_one() else { return false };
        self.load_inputs(ids, positions, past);
        let Self { layers, norm, head, sizes, buffers: to, .. } = self;
        to.scores.resize(ids.len() * sizes.kv_heads * sizes.group * capacity, 0.0);
        for (index, layer) in layers.iter().enumerate() {
            layer.attention_block(to, *sizes, LayerSlots { cache: &mut *past, layer: index, capacity });
            layer.mlp_block(to);
        }
        past.advance_one(positions);
        norm.apply(&to.residual, &mut to.normed);
        logits.resize(ids.len() * head.weight.shape()[0], 0.0);
        project([(&*head, logits)], &to.normed, &mut to.lora);
        true
    }
}

impl FlexDecoder {
    /// Fills the buffers with the embeddings, the rotary tables and the visible slots of every row.
    fn load_inputs(&mut self, ids: &[u32], positions: &[usize], past: &KvCache<Flex>) {
        let Self { embedding: table, window, frequencies, rope_scale: scale, buffers: to, .. } = self;
        for (&id, x) in ids.iter().zip(to.residual.chunks_exact_mut(table.shape()[1])) {
            table.decode(id as usize, x);
        }
        for (row, &position) in positions.iter().enumerate() {
            visible_ranges(past.row_slots(row), position, *window, &mut to.visible[row]);
            let at = row * frequencies.len();
            for (index, frequency) in frequencies.iter().enumerate() {
                // The angle is rounded to f32 before its cosine is taken, as in the model.
                let angle = f64::from(position as f32 * frequency);
                to.cos[at + index] = (angle.cos() * *scale) as f32;
                to.sin[at + index] = (angle.sin() * *scale) as f32;
            }
        }
    }
}

/// One layer of the KV cache, with room for the new slot.
struct LayerSlots<'a> {
    cache: &'a mut KvCache<Flex>,
    layer: usize,
    /// The number of slots per row.
    capacity: usize,
}

impl LayerSlots<'_> {
    /// Calls `work` with the keys and the values of the layer as mutable slices, `[rows, capacity, kv_heads, dim]`
    /// each.
    fn with_slices(&mut self, work: impl FnOnce(&mut [f32], &mut [f32])) {
        self.cache.update_layer(self.layer, |KeyValue { keys, values }| {
            let in_order = |x: FlexTensor| match x.is_contiguous() && x.layout().start_offset() == 0 {
                true => x,
                false => x.to_contiguous(),
            };
            let [mut keys, mut values] = [primitive(keys), primitive(values)].map(in_order);
            work(keys.storage_mut(), values.storage_mut());
            KeyValue { keys: tensor(keys), values: tensor(values) }
        });
    }
}

impl DecodeLayer {
    fn attention_block(&self, to: &mut DecodeBuffers, sizes: HeadShape, mut slots: LayerSlots<'_>) {
        self.input_norm.apply(&to.residual, &mut to.normed);
        let ([q, k, v], [to_q, to_k, to_v], rows) = (&mut to.qkv, &self.qkv, to.visible.len());
        project([(to_q, q), (to_k, k), (to_v, v)], &to.normed, &mut to.lora);
        for (x, norm) in [&mut *q, &mut *k].into_iter().zip(&self.qk_norms) {
            if let Some(norm) = norm {
                norm.apply_in_place(x);
            }
            rotate_rows(x, rows, sizes.dim, [&to.cos, &to.sin]);
        }
        let (slot, capacity) = (slots.cache.num_slots(), slots.capacity);
        slots.with_slices(|keys, values| {
            let width = sizes.kv_heads * sizes.dim;
            for row in 0..rows {
                let (new, at) = (row * width..(row + 1) * width, (row * capacity + slot) * width);
                keys[at..at + width].copy_from_slice(&k[new.clone()]);
                values[at..at + width].copy_from_slice(&v[new]);
            }
            let cache = CacheSlices { keys, values, capacity, visible: &to.visible };
            decode_attention(sizes, q, cache, &mut to.scores, &mut to.attention_output);
        });
        project([(&self.output, &mut to.block_output)], &to.attention_output, &mut to.lora);
        add(&mut to.residual, &to.block_output);
    }

    fn mlp_block(&self, to: &mut DecodeBuffers) {
        self.post_attention_norm.apply(&to.residual, &mut to.normed);
        let ([gate, up], [to_gate, to_up]) = (&mut to.gate_up, &self.gate_up);
        project([(to_gate, gate), (to_up, up)], &to.normed, &mut to.lora);
        vectorized(
            #[inline(always)]
            || gate.iter_mut().zip(up).for_each(|(gate, up)| *gate = *gate / (1.0 + exp(-*gate)) * *up),
        );
        project([(&self.down, &mut to.block_output)], gate, &mut to.lora);
        add(&mut to.residual, &to.block_output);
    }
}

/// Applies several projections to one input, each with its own output.
fn project<const N: usize>(mut all: [(&Projection, &mut [f32]); N], x: &[f32], room: &mut LoraBuffers) {
    gemv_batch(all.each_mut().map(|(projection, y)| Gemv { weight: &projection.weight, x, y }));
    for (projection, y) in all {
        projection.add_bias_and_adapters(x, y, room);
    }
}

fn add(y: &mut [f32], x: &[f32]) {
    vectorized(
        #[inline(always)]
        || super::vector_ops::add(y, x),
    );
}

#[cfg(test)]
mod tests {
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
                let ids =
                    prompts.iter().flat_map(|row| (0..layout.length).map(|i| *row.get(i).unwrap_or(&0))).collect();
                let arranged = model.layout_with_prompts(&layout, &rows);
                let (x, mut past) = model.prefill_inputs(ids, &arranged, &rows);
                model
                    .hidden_states(x, &arranged.layout, Some(&mut past), &rows.forward_context(arranged.layout.length))
                    .unwrap();
                let (mut by_steps, mut by_tensors) = (past.clone(), past);
                let (mut plan, mut logits) = (FlexDecoder::of(&model, prompts.len()).unwrap(), Vec::new());
                let before = rows.num_virtual_tokens(&model);
                // The steps go beyond the capacity of the cache and beyond the window.
                for step in 0..70 {
                    let ids: Vec<u32> = (0..prompts.len()).map(|row| ((step * 11 + row * 5 + 2) % 61) as u32).collect();
                    let positions: Vec<usize> = lengths.iter().zip(&before).map(|(n, b)| b + n + step).collect();
                    assert!(plan.step(&ids, &positions, &mut by_steps, &mut logits));
                    let ids = int_tensor(ids.into_iter().map(|id| id as i32).collect(), prompts.len(), &model.device());
                    let layout = SequenceLayout::next_token(&positions);
                    let pass = rows.forward_context(1);
                    let hidden = model.hidden_states(model.embed(ids), &layout, Some(&mut by_tensors), &pass).unwrap();
                    let expected = model.head(hidden, &pass).into_data().into_vec::<f32>().unwrap();
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
}
