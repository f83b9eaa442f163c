//! Decoding on preallocated buffers, one token per row and step: no tensor is created, and the matrix products of one
//! input are divided among the threads together. It computes the same as the model's forward pass, for models whose
//! layers have only weights, biases and LoRA adapters.

mod attention;
mod projection;
#[cfg(test)]
mod tests;

use super::vector_ops::{exp, vectorized};
use crate::{
    KeyValue, KvCache, Llama,
    kernel::{StepDecoder, primitive, tensor},
    model::Layer,
};
use attention::{CacheSlices, HeadShape, decode_attention, rotate_rows, visible_ranges};
use burn::backend::Flex;
use burn_flex::FlexTensor;
use burn_peft_kernels::gemv::WeightRows;
use projection::{DecodeRmsNorm, LoraBuffers, Projection, add, project};
use std::ops::Range;

/// The largest number of rows in a batch.
const MAX_ROWS: usize = 8;

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
    fn of(layer: &Layer<Flex>) -> Option<Self> {
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
            None => Projection::plain(WeightRows::new(table.clone())),
        };
        let layers = model.model.layers.iter().map(DecodeLayer::of).collect::<Option<Vec<_>>>()?;
        let frequencies = config.rope_scaling.frequencies(config.head_dim, config.rope_theta);
        let (kv_heads, dim) = (config.num_key_value_heads, config.head_dim);
        let group = config.num_attention_heads / kv_heads;
        let zeros = |n: usize| vec![0.0; rows * n];
        let hidden = || zeros(config.hidden_size);
        let buffers = DecodeBuffers {
            residual: hidden(),
            normed: hidden(),
            block_output: hidden(),
            qkv: [kv_heads * group, kv_heads, kv_heads].map(|heads| zeros(heads * dim)),
            attention_output: zeros(kv_heads * group * dim),
            gate_up: [(); 2].map(|()| zeros(config.intermediate_size)),
            cos: zeros(frequencies.len()),
            sin: zeros(frequencies.len()),
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
            rope_scale: config.rope_scaling.attention_factor(),
            buffers,
        })
    }
}

impl StepDecoder<Flex> for FlexDecoder {
    fn step(&mut self, ids: &[u32], positions: &[usize], cache: &mut KvCache<Flex>, logits: &mut Vec<f32>) -> bool {
        let Some(capacity) = cache.ensure_room_for_one() else { return false };
        self.load_inputs(ids, positions, cache);
        let Self { layers, norm, head, sizes, buffers: to, .. } = self;
        to.scores.resize(ids.len() * sizes.kv_heads * sizes.group * capacity, 0.0);
        for (index, layer) in layers.iter().enumerate() {
            layer.attention_block(to, *sizes, LayerSlots { cache: &mut *cache, layer: index, capacity });
            layer.mlp_block(to);
        }
        cache.advance_one(positions);
        norm.apply(&to.residual, &mut to.normed);
        logits.resize(ids.len() * head.weight.shape()[0], 0.0);
        project([(&*head, logits)], &to.normed, &mut to.lora);
        true
    }
}

impl FlexDecoder {
    /// Fills the buffers with the embeddings, the rotary tables and the visible slots of every row.
    fn load_inputs(&mut self, ids: &[u32], positions: &[usize], cache: &KvCache<Flex>) {
        let Self { embedding: table, window, frequencies, rope_scale: scale, buffers: to, .. } = self;
        for (&id, x) in ids.iter().zip(to.residual.chunks_exact_mut(table.shape()[1])) {
            table.decode(id as usize, x);
        }
        for (row, &position) in positions.iter().enumerate() {
            visible_ranges(cache.row_slots(row), position, *window, &mut to.visible[row]);
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
