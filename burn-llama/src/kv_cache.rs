//! The KV cache: keys and values of earlier tokens in generation, or of a trained prefix.

use crate::{
    RowSlots, SequenceLayout,
    kernel::{AttentionMask, Kernels, primitive, tensor},
    layout::index_tensor,
};
use burn::tensor::{Tensor, backend::Backend, s};
use std::{iter, ops::Range};

/// The least number of slots that a layer allocates beyond the reserved ones.
const MIN_CAPACITY: usize = 64;

/// Keys and values of one layer, `[rows, capacity, kv_heads, head_dim]`; the first slots are in use.
#[derive(Debug, Clone)]
pub struct KeyValue<B: Backend> {
    /// Keys: those of tokens are rotated, those of virtual tokens are as trained.
    pub keys: Tensor<B, 4>,
    /// Values.
    pub values: Tensor<B, 4>,
}

/// The keys and values that new tokens of a batch may attend to besides their own, per row and layer.
///
/// Every slot has a segment and a position as in [`SequenceLayout`]. Slots of segment
/// [`EMPTY_SEGMENT`](crate::kernel::AttentionMask::EMPTY_SEGMENT) hold no key; those of
/// [`ANY_SEGMENT`](crate::kernel::AttentionMask::ANY_SEGMENT) are visible to every segment of their row.
#[derive(Debug, Clone)]
pub struct KvCache<B: Backend> {
    layers: Vec<Option<KeyValue<B>>>,
    rows: usize,
    slots: usize,
    /// The segments of the slots of every row.
    segments: Vec<Vec<i32>>,
    /// The positions of the slots of every row.
    positions: Vec<Vec<i32>>,
    /// The number of slots that a layer allocates when it gets its first keys.
    reserved: usize,
    /// True if new keys are stored; otherwise [`KvCache::append`] returns them after the stored ones and forgets them.
    stores_new_keys: bool,
}

impl<B: Backend> KvCache<B> {
    /// Creates an empty cache of `layers` layers.
    pub fn new(layers: usize, rows: usize) -> Self {
        Self { layers: vec![None; layers], ..Self::from_prefix(Vec::new(), &vec![0..0; rows]) }
    }

    /// Creates a cache that starts with keys and values of virtual tokens, `[n, 2, kv_heads, head_dim]` per layer. A
    /// row gets those of its range, visible to all its segments, at positions from 0.
    pub(crate) fn from_prefix(layers: Vec<Tensor<B, 4>>, ranges: &[Range<usize>]) -> Self {
        let (rows, slots) = (ranges.len(), ranges.iter().map(Range::len).max().unwrap_or(0));
        let of_rows = |layer: Tensor<B, 4>| {
            let [_, _, heads, dim] = layer.dims();
            if ranges.iter().all(|range| *range == ranges[0]) {
                let shared = layer.slice(s![ranges[0].clone()]).unsqueeze::<5>();
                return shared.expand([rows, slots, 2, heads, dim]);
            }
            // Empty slots repeat virtual token 0, which the mask hides.
            let source = |range: &Range<usize>| range.clone().chain(iter::repeat(0)).take(slots).map(|at| at as i32);
            let sources: Vec<i32> = ranges.iter().flat_map(source).collect();
            let device = layer.device();
            layer.select(0, index_tensor(sources, &device)).reshape([rows, slots, 2, heads, dim])
        };
        let layer = |layer: Tensor<B, 4>| {
            let [_, _, heads, dim] = layer.dims();
            let all = of_rows(layer);
            let part = |part| all.clone().slice(s![.., .., part..part + 1]).reshape([rows, slots, heads, dim]);
            Some(KeyValue { keys: part(0), values: part(1) })
        };
        let segment = |range: &Range<usize>, slot| {
            if slot < range.len() { AttentionMask::<B>::ANY_SEGMENT } else { AttentionMask::<B>::EMPTY_SEGMENT }
        };
        Self {
            layers: layers.into_iter().map(layer).collect(),
            rows,
            slots,
            segments: ranges.iter().map(|range| (0..slots).map(|slot| segment(range, slot)).collect()).collect(),
            positions: vec![(0..slots as i32).collect(); rows],
            reserved: 0,
            stores_new_keys: true,
        }
    }

    /// Reserves `slots` slots in all, for a caller that knows how many it needs: until they are full, every token is
    /// written in place. A layer allocates the memory when it gets its next keys.
    pub fn reserve(&mut self, slots: usize) {
        self.reserved = slots;
        for ids in self.segments.iter_mut().chain(&mut self.positions) {
            ids.reserve(slots.saturating_sub(ids.len()));
        }
    }

    /// Creates the cache of a single layer, with keys and values of virtual tokens if given, for a forward pass whose
    /// new keys are not stored, such as in training.
    pub(crate) fn for_single_layer(layer: Option<Tensor<B, 4>>, rows: usize) -> Self {
        let slots = layer.as_ref().map_or(0, |layer| layer.dims()[0]);
        let mut cache = Self::from_prefix(layer.into_iter().collect(), &vec![0..slots; rows]);
        cache.resize_layers(1);
        Self { stores_new_keys: false, ..cache }
    }

    /// Sets the number of layers; those that are added are empty.
    pub(crate) fn resize_layers(&mut self, layers: usize) {
        self.layers.resize(layers, None);
    }

    /// Returns the keys and values of the first row, layer by layer: `[slots, layers · 2 · kv_heads · head_dim]`.
    pub(crate) fn flattened(&self) -> Tensor<B, 2> {
        let part = |x: &Tensor<B, 4>| {
            let [_, _, heads, dim] = x.dims();
            x.clone().slice(s![..1, ..self.slots]).reshape([self.slots, heads * dim])
        };
        Tensor::cat(
            self.layers.iter().flatten().flat_map(|layer| [part(&layer.keys), part(&layer.values)]).collect(),
            1,
        )
    }

    /// Returns the number of slots in use per row.
    pub fn num_slots(&self) -> usize {
        self.slots
    }

    /// Returns the segments and the positions of all keys, `[rows, slots + layout.length]` each: those in the cache,
    /// followed by those of `layout`.
    pub(crate) fn key_segments_and_positions(&self, layout: &SequenceLayout) -> (Vec<i32>, Vec<i32>) {
        assert_eq!(self.rows, layout.rows, "a KV cache of {} rows was used with a batch of {}", self.rows, layout.rows);
        let join = |cached: &[Vec<i32>], new: &[i32]| {
            let rows = cached.iter().zip(new.chunks_exact(layout.length.max(1)));
            rows.flat_map(|(cached, new)| cached.iter().chain(new).copied()).collect()
        };
        (join(&self.segments, &layout.segments), join(&self.positions, &layout.positions))
    }

    /// Marks the slots of `layout` as used, after every layer has [appended](Self::append) its keys. Padding becomes
    /// empty slots.
    pub(crate) fn advance(&mut self, layout: &SequenceLayout) {
        let visible = |&segment: &i32| if segment == 0 { AttentionMask::<B>::EMPTY_SEGMENT } else { segment };
        for row in 0..self.rows {
            let new = row * layout.length..(row + 1) * layout.length;
            self.segments[row].extend(layout.segments[new.clone()].iter().map(visible));
            self.positions[row].extend(&layout.positions[new]);
        }
        self.slots += layout.length;
    }

    /// Keeps only the given rows, in the given order.
    pub fn select(&mut self, rows: &[usize]) {
        let pick = |ids: &[Vec<i32>]| rows.iter().map(|&row| ids[row].clone()).collect::<Vec<_>>();
        (self.segments, self.positions) = (pick(&self.segments), pick(&self.positions));
        self.rows = rows.len();
        for cache in self.layers.iter_mut().flatten() {
            let device = cache.keys.device();
            let index = index_tensor(rows.iter().map(|&row| row as i32).collect(), &device);
            cache.keys = cache.keys.clone().select(0, index.clone());
            cache.values = cache.values.clone().select(0, index);
        }
    }
}

impl<B: Kernels> KvCache<B> {
    /// Returns the number of slots that a layer allocates to hold `slots`: the [reserved](Self::reserve) ones if they
    /// suffice, otherwise a power of two.
    fn capacity_for(&self, slots: usize) -> usize {
        if slots <= self.reserved { self.reserved } else { slots.next_power_of_two().max(MIN_CAPACITY) }
    }

    /// Appends new keys and values `[rows, n, kv_heads, head_dim]` to one layer and returns all in use. The capacity is
    /// the [reserved](Self::reserve) one, beyond it powers of two, so that most steps write in place.
    pub(crate) fn append(&mut self, layer: usize, keys: Tensor<B, 4>, values: Tensor<B, 4>) -> KeyValue<B> {
        if !self.stores_new_keys {
            let Some(before) = &self.layers[layer] else { return KeyValue { keys, values } };
            let join = |before: &Tensor<B, 4>, new| Tensor::cat(vec![before.clone(), new], 1);
            return KeyValue { keys: join(&before.keys, keys), values: join(&before.values, values) };
        }
        let (from, to) = (self.slots, self.slots + keys.dims()[1]);
        let room = self.capacity_for(to);
        let cache = match self.layers[layer].take() {
            // This may be the only pass over the cache, so no room for more is allocated yet.
            None if to > self.reserved => KeyValue { keys, values },
            None => KeyValue { keys: grow(keys, room), values: grow(values, room) },
            Some(cache) => {
                let write = |cache, new| write_slots(cache, new, from, room);
                KeyValue { keys: write(cache.keys, keys), values: write(cache.values, values) }
            }
        };
        let used = |x: &Tensor<B, 4>| x.clone().slice(s![.., ..to]);
        let all = KeyValue { keys: used(&cache.keys), values: used(&cache.values) };
        self.layers[layer] = Some(cache);
        all
    }
}

/// Access for a [`StepDecoder`](crate::kernel::StepDecoder), which writes keys and values by itself.
impl<B: Kernels> KvCache<B> {
    /// Returns the segments and the positions of a row's slots.
    pub fn row_slots(&self, row: usize) -> RowSlots<'_> {
        RowSlots { segments: &self.segments[row], positions: &self.positions[row] }
    }

    /// Makes room for at least one more slot in every layer and returns the capacity, the same for all. Returns `None`
    /// if a layer has no keys yet.
    pub fn ensure_room_for_one(&mut self) -> Option<usize> {
        let (from, room) = (self.slots, self.capacity_for(self.slots + 1));
        let mut capacity = None;
        for layer in &mut self.layers {
            let KeyValue { keys, values } = layer.take()?;
            let enough = |x: &Tensor<B, 4>| x.dims()[1] > from && capacity.is_none_or(|n| n == x.dims()[1]);
            let kept = if enough(&keys) && enough(&values) {
                KeyValue { keys, values }
            } else {
                let wider = |x: Tensor<B, 4>| grow(x.slice(s![.., ..from]), capacity.unwrap_or(room));
                KeyValue { keys: wider(keys), values: wider(values) }
            };
            capacity = Some(kept.keys.dims()[1]);
            *layer = Some(kept);
        }
        capacity
    }

    /// Replaces the keys and values of a layer, `[rows, capacity, kv_heads, head_dim]` each, by those that `update`
    /// returns. The tensors that it gets have no other owner in the cache, so it can write in place. Does nothing if
    /// the layer has no keys yet.
    pub fn update_layer(&mut self, layer: usize, update: impl FnOnce(KeyValue<B>) -> KeyValue<B>) {
        self.layers[layer] = self.layers[layer].take().map(update);
    }

    /// Marks one more slot of every row as used, in segment 1, after its keys and values were written through
    /// [`Self::update_layer`].
    pub fn advance_one(&mut self, positions: &[usize]) {
        for (row, &position) in positions.iter().enumerate() {
            self.segments[row].push(1);
            self.positions[row].push(position as i32);
        }
        self.slots += 1;
    }
}

/// Writes `new` at slot `from`; grows the cache to `room` slots first if it is too small.
fn write_slots<B: Kernels>(cache: Tensor<B, 4>, new: Tensor<B, 4>, from: usize, room: usize) -> Tensor<B, 4> {
    let full = cache.dims()[1] < from + new.dims()[1];
    let cache = if full { grow(cache.slice(s![.., ..from]), room) } else { cache };
    tensor(B::write_to_cache(primitive(cache), primitive(new), from))
}

/// Copies the slots into a buffer of `room` slots. The free ones are zero pages that nothing has touched, so that a
/// large reservation costs little memory before it is used.
fn grow<B: Kernels>(used: Tensor<B, 4>, room: usize) -> Tensor<B, 4> {
    let [rows, slots, heads, dim] = used.dims();
    if slots == room {
        return used;
    }
    let empty = Tensor::<B, 4>::zeros([rows, room, heads, dim], (&used.device(), used.dtype()));
    tensor(B::write_to_cache(primitive(empty), primitive(used), 0))
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::{Generation, GenerationConfig, LlamaConfig};
    use burn::{
        backend::Flex,
        tensor::{TensorData, TensorPrimitive},
    };
    use burn_peft::PromptConfig;

    /// Returns the address and the capacity of the keys and of the values of every layer.
    fn buffers(cache: &KvCache<Flex>) -> Vec<(*const f32, usize)> {
        let buffer = |x: &Tensor<Flex, 4>| match x.clone().into_primitive() {
            TensorPrimitive::Float(held) => (held.storage::<f32>().as_ptr(), x.dims()[1]),
            TensorPrimitive::QFloat(_) => panic!("keys are floats"),
        };
        cache.layers.iter().flatten().flat_map(|layer| [buffer(&layer.keys), buffer(&layer.values)]).collect()
    }

    #[test]
    fn a_generation_writes_every_token_where_the_prompt_lies() {
        let fields = serde_json::json!({
            "model_type": "llama", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        });
        let mut model = LlamaConfig::from_json(fields).unwrap().init::<Flex>(3, &Default::default());
        for virtual_tokens in [0, 3] {
            if virtual_tokens > 0 {
                model.prompts = vec![model.new_prompt(&PromptConfig::prefix(virtual_tokens), None, 5).unwrap()];
            }
            // One row, and two rows of which the longest has 65 tokens, one more than a power of two.
            for prompts in [vec![vec![7; 9]], vec![vec![4; 65], vec![9; 2]]] {
                let settings = GenerationConfig { max_new_tokens: 80, ..GenerationConfig::default() };
                let mut generate = Generation::new(&model, &prompts, &settings).unwrap();
                let first = buffers(&generate.cache);
                while generate.advance().unwrap().is_some() {
                    assert_eq!(buffers(&generate.cache), first, "after {} slots", generate.cache.num_slots());
                }
                let needed = virtual_tokens + prompts[0].len() + 79;
                assert_eq!(generate.cache.num_slots(), needed);
                assert!(first.len() == 4 && first.iter().all(|(_, slots)| *slots == needed), "{first:?}");
            }
        }
    }

    #[test]
    fn append_keeps_everything_for_any_reservation() {
        let (lengths, [heads, dim]) = ([7, 1, 1, 70, 1, 60], [2, 3]);
        for reserved in [0, 7, 8, 79, 500] {
            let mut cache = KvCache::<Flex>::new(1, 2);
            cache.reserve(reserved);
            let mut all: Option<[Tensor<Flex, 4>; 2]> = None;
            for n in lengths {
                let numbers = |start: usize| {
                    let values: Vec<f32> = (start..start + 2 * n * heads * dim).map(|x| x as f32).collect();
                    Tensor::from_data(TensorData::new(values, [2, n, heads, dim]), &Default::default())
                };
                let (keys, values) = (numbers(cache.num_slots()), numbers(10_000 + cache.num_slots()));
                let found = cache.append(0, keys.clone(), values.clone());
                let joined = match all.take() {
                    None => [keys, values],
                    Some([k, v]) => [Tensor::cat(vec![k, keys], 1), Tensor::cat(vec![v, values], 1)],
                };
                assert_eq!(found.keys.into_data(), joined[0].to_data(), "{reserved} reserved, {n} pushed");
                assert_eq!(found.values.into_data(), joined[1].to_data(), "{reserved} reserved, {n} pushed");
                all = Some(joined);
                cache.advance(&SequenceLayout::padded(&[n, n]));
            }
        }
    }
}
