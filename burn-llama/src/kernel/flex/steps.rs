//! One token after the other on buffers that stay: no tensor is made, and all products of one input are divided among the threads
//! together. It computes what the model's forward pass does, for models whose layers have nothing but weights, biases and
//! low-rank adapters.

mod attend;

use super::{
    buffer::{contiguous, widened},
    lanes::{exp, vectorized},
};
use crate::{
    Llama, Past,
    kernel::{Steps, primitive},
    model::RmsNorm,
};
use attend::{Sizes, attend, rotate, see};
use burn::backend::Flex;
use burn_peft::{
    Linear,
    kernel::{
        Stored,
        few::{Product, Rows, products},
    },
};
use std::ops::Range;

/// Rows that are computed together at most.
const MOST: usize = 8;

/// What an adapter adds: `scaling · x·Aᵀ·Bᵀ`.
#[derive(Debug)]
struct LowRank {
    a: Rows,
    b: Rows,
    scaling: f32,
}

/// A projection with what acts on it.
#[derive(Debug)]
struct Projection {
    weight: Rows,
    bias: Option<Vec<f32>>,
    adapters: Vec<LowRank>,
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
            let rows = |values| Rows::of(Stored::Dense(primitive::<Flex, 2>(values)));
            let [a, b] = [&adapter.lora_a, &adapter.lora_b].map(|values| rows(values.val()));
            adapters.push(LowRank { a, b, scaling: adapter.scaling as f32 });
        }
        let bias = linear.bias.as_ref().map(|bias| widened(&contiguous(primitive(bias.val()))).into_owned());
        Some(Self { weight: Rows::of(linear.weight.stored()), bias, adapters })
    }

    /// Adds the bias and what adapters add.
    fn finish(&self, x: &[f32], y: &mut [f32], Adapted { low, added }: &mut Adapted) {
        let [out, features] = self.weight.shape();
        if let Some(bias) = &self.bias {
            y.chunks_exact_mut(out).for_each(|y| add(y, bias));
        }
        let rows = x.len() / features;
        for LowRank { a, b, scaling } in &self.adapters {
            low.resize(rows * a.shape()[0], 0.0);
            added.resize(rows * out, 0.0);
            products([Product { weight: a, x, y: low }]);
            low.iter_mut().for_each(|low| *low *= scaling);
            products([Product { weight: b, x: low, y: added }]);
            add(y, added);
        }
    }
}

#[derive(Debug)]
struct Norm {
    weight: Vec<f32>,
    epsilon: f64,
}

impl Norm {
    fn of(norm: &RmsNorm<Flex>) -> Self {
        let weight = widened(&contiguous(primitive(norm.weight.val()))).into_owned();
        Self { weight, epsilon: norm.epsilon }
    }

    /// Of every part of `x` that is as long as the weight.
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
                    let r = super::rms_norm::inverse(x, self.epsilon);
                    for (x, w) in x.iter_mut().zip(&self.weight) {
                        *x = *x * r * w;
                    }
                }
            },
        );
    }
}

#[derive(Debug)]
struct Layer {
    before: Norm,
    qkv: [Projection; 3],
    head_norms: [Option<Norm>; 2],
    output: Projection,
    between: Norm,
    gate_up: [Projection; 2],
    down: Projection,
}

impl Layer {
    fn of(layer: &crate::model::Layer<Flex>) -> Option<Self> {
        let (attention, mlp) = (&layer.self_attn, &layer.mlp);
        let of = Projection::of;
        Some(Self {
            before: Norm::of(&layer.input_layernorm),
            qkv: [of(&attention.q_proj)?, of(&attention.k_proj)?, of(&attention.v_proj)?],
            head_norms: [&attention.q_norm, &attention.k_norm].map(|norm| norm.as_ref().map(Norm::of)),
            output: of(&attention.o_proj)?,
            between: Norm::of(&layer.post_attention_layernorm),
            gate_up: [of(&mlp.gate_proj)?, of(&mlp.up_proj)?],
            down: of(&mlp.down_proj)?,
        })
    }
}

/// A model as a list of products, and the memory of a step.
#[derive(Debug)]
pub(super) struct Plan {
    table: Rows,
    layers: Vec<Layer>,
    norm: Norm,
    head: Projection,
    sizes: Sizes,
    window: Option<usize>,
    frequencies: Vec<f32>,
    scale: f64,
    buffers: Buffers,
}

/// Of all rows one after the other.
#[derive(Debug, Default)]
struct Buffers {
    /// The stream, what is normed of it, and what is added to it.
    x: Vec<f32>,
    normed: Vec<f32>,
    added: Vec<f32>,
    qkv: [Vec<f32>; 3],
    mixed: Vec<f32>,
    gate_up: [Vec<f32>; 2],
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Of every row and head.
    scores: Vec<f32>,
    /// What each row sees.
    seen: Vec<Vec<Range<usize>>>,
    adapted: Adapted,
}

/// Between the two products of an adapter, and after them.
#[derive(Debug, Default)]
struct Adapted {
    low: Vec<f32>,
    added: Vec<f32>,
}

impl Plan {
    /// `None` for too many rows, or if something else than low-rank adapters acts on a layer.
    pub(super) fn of(model: &Llama<Flex>, rows: usize) -> Option<Self> {
        let config = model.config();
        if rows > MOST {
            return None;
        }
        let table = model.model.embed_tokens.weight.stored();
        let head = match &model.lm_head {
            Some(head) => Projection::of(head)?,
            None => Projection { weight: Rows::of(table.clone()), bias: None, adapters: Vec::new() },
        };
        let layers = model.model.layers.iter().map(Layer::of).collect::<Option<Vec<_>>>()?;
        let (frequencies, scale) = config.rope_scaling.frequencies(config.head_dim, config.rope_theta);
        let (kv_heads, dim) = (config.num_key_value_heads, config.head_dim);
        let group = config.num_attention_heads / kv_heads;
        let room = |n: usize| vec![0.0; rows * n];
        let hidden = || room(config.hidden_size);
        let buffers = Buffers {
            x: hidden(),
            normed: hidden(),
            added: hidden(),
            qkv: [kv_heads * group, kv_heads, kv_heads].map(|heads| room(heads * dim)),
            mixed: room(kv_heads * group * dim),
            gate_up: [(); 2].map(|()| room(config.intermediate_size)),
            cos: room(frequencies.len()),
            sin: room(frequencies.len()),
            seen: vec![Vec::new(); rows],
            ..Buffers::default()
        };
        Some(Self {
            table: Rows::of(table),
            layers,
            norm: Norm::of(&model.model.norm),
            head,
            sizes: Sizes { kv_heads, group, dim },
            window: config.sliding_window,
            frequencies,
            scale,
            buffers,
        })
    }
}

impl Steps<Flex> for Plan {
    fn step(&mut self, ids: &[u32], positions: &[usize], past: &mut Past<Flex>, logits: &mut Vec<f32>) -> bool {
        let Some(capacity) = past.room_for_one() else { return false };
        self.begin(ids, positions, past);
        let Self { layers, norm, head, sizes, buffers: to, .. } = self;
        to.scores.resize(ids.len() * sizes.kv_heads * sizes.group * capacity, 0.0);
        for (index, layer) in layers.iter().enumerate() {
            layer.attend(to, *sizes, (past, index, capacity));
            layer.transform(to);
        }
        past.take_over(positions);
        norm.apply(&to.x, &mut to.normed);
        logits.resize(ids.len() * head.weight.shape()[0], 0.0);
        project([(&*head, logits)], &to.normed, &mut to.adapted);
        true
    }
}

impl Plan {
    /// The embeddings, the rotations, and what is seen.
    fn begin(&mut self, ids: &[u32], positions: &[usize], past: &Past<Flex>) {
        let Self { table, window, frequencies, scale, buffers: to, .. } = self;
        for (&id, x) in ids.iter().zip(to.x.chunks_exact_mut(table.shape()[1])) {
            table.decode(id as usize, x);
        }
        for (row, &position) in positions.iter().enumerate() {
            see(past.row(row), (past.slots(), position), *window, &mut to.seen[row]);
            let at = row * frequencies.len();
            for (index, frequency) in frequencies.iter().enumerate() {
                // The angle is rounded to f32 before its cosine, as in the model.
                let angle = f64::from(position as f32 * frequency);
                to.cos[at + index] = (angle.cos() * *scale) as f32;
                to.sin[at + index] = (angle.sin() * *scale) as f32;
            }
        }
    }
}

impl Layer {
    fn attend(&self, to: &mut Buffers, sizes: Sizes, (past, index, capacity): (&mut Past<Flex>, usize, usize)) {
        self.before.apply(&to.x, &mut to.normed);
        let ([q, k, v], [to_q, to_k, to_v], rows) = (&mut to.qkv, &self.qkv, to.seen.len());
        project([(to_q, q), (to_k, k), (to_v, v)], &to.normed, &mut to.adapted);
        for (x, norm) in [&mut *q, &mut *k].into_iter().zip(&self.head_norms) {
            if let Some(norm) = norm {
                norm.apply_in_place(x);
            }
            rotate(x, rows, sizes.dim, [&to.cos, &to.sin]);
        }
        let slot = past.slots();
        past.lend(index, |[keys, values]| {
            let width = sizes.kv_heads * sizes.dim;
            for row in 0..rows {
                let (new, at) = (row * width..(row + 1) * width, (row * capacity + slot) * width);
                keys[at..at + width].copy_from_slice(&k[new.clone()]);
                values[at..at + width].copy_from_slice(&v[new]);
            }
            attend(sizes, (q, [keys, values], capacity), &to.seen, (&mut to.scores, &mut to.mixed));
        });
        project([(&self.output, &mut to.added)], &to.mixed, &mut to.adapted);
        add(&mut to.x, &to.added);
    }

    fn transform(&self, to: &mut Buffers) {
        self.between.apply(&to.x, &mut to.normed);
        let ([gate, up], [to_gate, to_up]) = (&mut to.gate_up, &self.gate_up);
        project([(to_gate, gate), (to_up, up)], &to.normed, &mut to.adapted);
        vectorized(
            #[inline(always)]
            || gate.iter_mut().zip(up).for_each(|(gate, up)| *gate = *gate / (1.0 + exp(-*gate)) * *up),
        );
        project([(&self.down, &mut to.added)], gate, &mut to.adapted);
        add(&mut to.x, &to.added);
    }
}

/// Projections of one input, each with where it goes.
fn project<const N: usize>(mut all: [(&Projection, &mut [f32]); N], x: &[f32], room: &mut Adapted) {
    products(all.each_mut().map(|(projection, y)| Product { weight: &projection.weight, x, y }));
    for (projection, y) in all {
        projection.finish(x, y, room);
    }
}

fn add(y: &mut [f32], x: &[f32]) {
    vectorized(
        #[inline(always)]
        || super::lanes::add(y, x),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Layout, LlamaConfig, layout::ints};
    use burn::tensor::{DType, Tensor, TensorData};
    use burn_peft::{Ia3Config, Linears, LoraConfig, PromptConfig, Weight, adapter, ia3, packed::Packed};
    use serde_json::{Value, json};

    fn model(changes: Value) -> Llama<Flex> {
        let mut fields = json!({
            "model_type": "llama", "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
        });
        let changes = changes.as_object().unwrap().clone();
        fields.as_object_mut().unwrap().extend(changes);
        let mut model = LlamaConfig::from_json(fields).unwrap().init::<Flex>(3, &Default::default());
        // Norms and biases begin with the same value everywhere, which says little.
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
            Weight::packed("w", Packed::nf4(&values, features, &Default::default()).unwrap())
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
                let rows = model.active_rows(prompts.len());
                let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
                let layout = Layout::padded(&lengths);
                let ids =
                    prompts.iter().flat_map(|row| (0..layout.length).map(|i| *row.get(i).unwrap_or(&0))).collect();
                let arranged = model.arrange(&layout, &rows);
                let (x, mut past) = model.first(ids, &arranged, &rows);
                model.hidden(x, &arranged.layout, Some(&mut past), &rows.pass(arranged.layout.length)).unwrap();
                let (mut by_steps, mut by_tensors) = (past.clone(), past);
                let (mut plan, mut logits) = (Plan::of(&model, prompts.len()).unwrap(), Vec::new());
                let before = rows.virtual_tokens(&model);
                // Beyond the room that there is, and beyond the window.
                for step in 0..70 {
                    let ids: Vec<u32> = (0..prompts.len()).map(|row| ((step * 11 + row * 5 + 2) % 61) as u32).collect();
                    let positions: Vec<usize> = lengths.iter().zip(&before).map(|(n, b)| b + n + step).collect();
                    assert!(plan.step(&ids, &positions, &mut by_steps, &mut logits));
                    let ids = ints(ids.into_iter().map(|id| id as i32).collect(), prompts.len(), &model.device());
                    let layout = Layout::next(&positions);
                    let pass = rows.pass(1);
                    let hidden = model.hidden(model.embed(ids), &layout, Some(&mut by_tensors), &pass).unwrap();
                    let expected = model.head(hidden, &pass).into_data().into_vec::<f32>().unwrap();
                    let size = expected.iter().fold(0f32, |size, x| size.max(x.abs()));
                    for (found, expected) in logits.iter().zip(&expected) {
                        let off = (found - expected).abs();
                        assert!(off <= 2e-5 * size, "{name}, {} rows, step {step}: {off} of {size}", prompts.len());
                    }
                    assert_eq!((logits.len(), by_steps.slots()), (expected.len(), by_tensors.slots()));
                }
            }
        }
    }

    #[test]
    fn what_no_step_knows_is_left_to_the_forward_pass() {
        let dora = adapted(model(json!({})), json!({ "use_dora": true }));
        assert!(Plan::of(&dora, 1).is_none());
        let mut factors = model(json!({}));
        ia3::attach(&mut factors, "a", &Ia3Config::default()).unwrap();
        assert!(Plan::of(&factors, 1).is_none());
        assert!(Plan::of(&model(json!({})), MOST + 1).is_none());
    }
}
