//! Training examples and their micro-batches on the device.

use crate::{
    AttentionContext, Error, KvCache, Llama, OutputSlots, SequenceLayout,
    kernel::{Kernels, Targets},
    layout::{index_tensor, int_tensor},
    model::LayerCache,
};
use burn::tensor::{DType, Int, Tensor, backend::Backend};
use burn_peft::ForwardContext;

/// One token sequence with a mask of the tokens that are trained on. The mask goes by index, not by token id, so an end
/// token that doubles as padding is a target where it ends an answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// True for each token that is a target. The first token never is one, because no token comes before it; virtual
    /// tokens of a prompt do not predict it either.
    pub loss_mask: Vec<bool>,
}

impl Example {
    /// Joins a prompt, which is not trained on, and an answer, which is, and truncates them on the right to
    /// `max_length` tokens.
    pub fn new(prompt: &[u32], answer: &[u32], max_length: usize) -> Self {
        let mut ids = [prompt, answer].concat();
        let mut loss_mask = [vec![false; prompt.len()], vec![true; answer.len()]].concat();
        ids.truncate(max_length);
        loss_mask.truncate(max_length);
        Self { ids, loss_mask }
    }

    /// Returns the number of targets.
    pub fn num_targets(&self) -> usize {
        self.loss_mask.iter().skip(1).filter(|&&learned| learned).count()
    }
}

/// One micro-batch on the device.
#[derive(Debug, Clone)]
pub struct Batch<B: Backend> {
    /// Token ids, `[rows, length]`.
    pub ids: Tensor<B, 2, Int>,
    /// The index of each slot's embedding in the embeddings of `ids`, followed by those of the virtual tokens. `None`
    /// if there are no virtual tokens among the slots.
    pub embedding_sources: Option<Tensor<B, 1, Int>>,
    /// The rotary tables and the attention mask.
    pub attention_context: AttentionContext<B>,
    /// The slots whose hidden states predict a target.
    pub output_slots: OutputSlots<B>,
    /// The target of each of these slots and its loss weight.
    pub targets: Targets<B>,
    /// The forward context of all slots, with the dropout randomness.
    pub forward_context: ForwardContext,
}

impl<B: Kernels> Llama<B> {
    /// Checks that [`Llama::batch`] accepts these examples, before anything is computed.
    ///
    /// # Errors
    /// Returns an error if a token is not in the model's vocabulary, or a row is longer than the model's rotary
    /// frequencies cover.
    pub fn check_examples(&self, examples: &[Example]) -> Result<(), Error> {
        self.config().check_token_ids(examples.iter().flat_map(|example| &example.ids))?;
        let longest = examples.iter().map(|example| example.ids.len()).max().unwrap_or(0);
        self.config().rope_scaling.check_length(longest + self.num_virtual_tokens())
    }

    /// Builds one micro-batch of `examples`, with the tokens in the slots of `layout` (see
    /// [`SequenceLayout::from_lengths`]). The loss of every target is multiplied by `weight`.
    ///
    /// # Errors
    /// Returns an error if a token is not in the model's vocabulary, or a row is longer than the model's rotary
    /// frequencies cover.
    ///
    /// # Panics
    /// Panics if no token is a target, a row is empty, or the layout was made for other lengths.
    pub fn batch(
        &self,
        examples: &[Example],
        layout: &SequenceLayout,
        weight: f32,
        forward_context: ForwardContext,
    ) -> Result<Batch<B>, Error> {
        self.check_examples(examples)?;
        let (device, arranged) =
            (self.device(), self.layout_with_prompts(layout, &self.active_row_adapters(layout.rows)));
        let places = arranged.new_slots(layout.rows * layout.length);
        let mut ids = vec![0i32; layout.rows * layout.length];
        let (mut slots, mut targets) = (Vec::new(), Vec::new());
        for (slot, token) in layout.slots() {
            let (example, index) = (&examples[token.row as usize], token.index as usize);
            ids[slot] = example.ids[index] as i32;
            if index > 0 && example.loss_mask[index] {
                slots.push(places[slot] - 1);
                targets.push(ids[slot]);
            }
        }
        assert!(!slots.is_empty(), "a batch needs at least one target");
        let n = slots.len();
        let before = KvCache::from_prefix(Vec::new(), &arranged.prefix_ranges);
        let forward_context = ForwardContext {
            compute: self.matmul_precision,
            ..arranged.forward_context(forward_context, self.num_virtual_tokens())
        };
        Ok(Batch {
            attention_context: self.attention_context(&arranged.layout, Some(&before))?,
            ids: int_tensor(ids, layout.rows, &device),
            output_slots: OutputSlots::new(slots, &forward_context, &device),
            targets: Targets {
                ids: index_tensor(targets, &device),
                weights: Tensor::full([n], weight, (&device, DType::F32)),
            },
            forward_context,
            embedding_sources: arranged.embedding_sources.map(|sources| index_tensor(sources, &device)),
        })
    }

    /// Computes the weighted loss of every target of a batch, `[n]`, in one forward pass.
    pub fn batch_loss(&self, batch: &Batch<B>) -> Tensor<B, 1> {
        B::with_spinning_pool(|| {
            let (mut x, before) = self.embed_with_prompts(
                batch.ids.clone(),
                batch.embedding_sources.clone(),
                &batch.forward_context,
                &self.active_row_adapters(1),
            );
            let mut before = before.into_iter();
            for (index, layer) in self.model.layers.iter().enumerate() {
                let outputs = self.outputs_at_layer(index, Some(&batch.output_slots), &batch.forward_context);
                let cache = &mut KvCache::for_single_layer(before.next(), batch.attention_context.rows);
                let cache = Some(LayerCache { cache, layer: 0 });
                x = layer.attention_block(x, &batch.attention_context, cache, &outputs);
                x = layer.mlp_block(x, outputs.output_context());
            }
            self.loss(self.model.norm.forward(x), &batch.targets, &batch.output_slots.forward_context)
        })
    }
}
