//! Rows of tokens as a batch on the device.

use crate::{
    Context, Error, Layout, Llama, Past, Tail,
    kernel::{Kernels, Targets},
    layout::ints,
    model::indices,
};
use burn::tensor::{DType, Int, Tensor, backend::Backend};
use burn_peft::Pass;

/// One sequence and which of its tokens are learned. Learning is marked by place, not by token, so an end token that
/// doubles as padding is learned where it ends an answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each token, whether it is a target. The first token never is: nothing predicts it, and a prompt's virtual tokens do
    /// not either.
    pub learned: Vec<bool>,
}

impl Example {
    /// A prompt that is read and an answer that is learned, cut to `max_length` tokens at the right.
    pub fn new(prompt: &[u32], answer: &[u32], max_length: usize) -> Self {
        let mut ids = [prompt, answer].concat();
        let mut learned = [vec![false; prompt.len()], vec![true; answer.len()]].concat();
        ids.truncate(max_length);
        learned.truncate(max_length);
        Self { ids, learned }
    }

    /// The number of tokens that are learned.
    pub fn targets(&self) -> usize {
        self.learned.iter().skip(1).filter(|&&learned| learned).count()
    }
}

/// One micro-batch on the device.
#[derive(Debug, Clone)]
pub struct Batch<B: Backend> {
    /// Token ids, `[rows, length]`.
    pub ids: Tensor<B, 2, Int>,
    /// Where the embedding of each slot of the context is: among those of `ids`, or after them the virtual tokens'. `None` if
    /// every slot is a token's.
    pub sources: Option<Tensor<B, 1, Int>>,
    /// Rotations and visibility.
    pub context: Context<B>,
    /// The slots whose hidden state predicts a target.
    pub tail: Tail<B>,
    /// What they should predict, and the weight of each.
    pub targets: Targets<B>,
    /// Dropout's randomness, of all slots.
    pub pass: Pass,
}

impl<B: Kernels> Llama<B> {
    /// Whether [`Llama::batch`] takes these rows, found out before anything is computed.
    ///
    /// # Errors
    /// If a token is not in the model's vocabulary, or a row is longer than the model's rotary frequencies cover.
    pub fn accepts(&self, examples: &[Example]) -> Result<(), Error> {
        check_ids(examples.iter().flat_map(|example| &example.ids), self.config().vocab_size)?;
        let longest = examples.iter().map(|example| example.ids.len()).max().unwrap_or(0);
        self.config().rope_scaling.check_length(longest + self.virtual_tokens())
    }

    /// `examples` as one batch, the tokens where `layout` has them (see [`Layout::of`]); every target's loss is multiplied by
    /// `weight`.
    ///
    /// # Errors
    /// If a token is not in the model's vocabulary, or a row is longer than the model's rotary frequencies cover.
    ///
    /// # Panics
    /// If no token is a target, a row is empty, or the layout is not that of the examples.
    pub fn batch(&self, examples: &[Example], layout: &Layout, weight: f32, pass: Pass) -> Result<Batch<B>, Error> {
        self.accepts(examples)?;
        let (device, arranged) = (self.device(), self.arrange(layout, &self.active_rows(layout.rows)));
        let places = arranged.places(layout.rows * layout.length);
        let mut ids = vec![0i32; layout.rows * layout.length];
        let (mut slots, mut targets) = (Vec::new(), Vec::new());
        for (slot, token) in layout.slots() {
            let (example, index) = (&examples[token.row as usize], token.index as usize);
            let id = example.ids[index] as i32;
            ids[slot] = id;
            if index > 0 && example.learned[index] {
                slots.push(places[slot] - 1);
                targets.push(id);
            }
        }
        assert!(!slots.is_empty(), "a batch has at least one target");
        let n = slots.len();
        let before = Past::starting_with(Vec::new(), &arranged.past);
        let pass = Pass { compute: self.compute, ..arranged.pass(pass, self.virtual_tokens()) };
        Ok(Batch {
            context: self.context(&arranged.layout, Some(&before))?,
            ids: ints(ids, layout.rows, &device),
            tail: Tail::new(slots, &pass, &device),
            targets: Targets {
                ids: indices(targets, &device),
                weights: Tensor::full([n], weight, (&device, DType::F32)),
            },
            pass,
            sources: arranged.sources.map(|sources| indices(sources, &device)),
        })
    }

    /// The weighted loss of every target of a batch, `[n]`, in one forward pass.
    pub fn batch_loss(&self, batch: &Batch<B>) -> Tensor<B, 1> {
        B::at_work(|| {
            let (mut x, before) =
                self.begin(batch.ids.clone(), batch.sources.clone(), &batch.pass, &self.active_rows(1));
            let mut before = before.into_iter();
            for (index, layer) in self.model.layers.iter().enumerate() {
                let mut past = Past::of_layer(before.next(), batch.context.rows);
                let (tail, pass) = self.at_layer(index, Some(&batch.tail), &batch.pass);
                x = layer.attend(x, &batch.context, Some((&mut past, 0)), (&batch.pass, tail));
                x = layer.transform(x, pass);
            }
            self.loss(self.model.norm.forward(x), &batch.targets, &batch.tail.pass)
        })
    }
}

/// Refuses tokens that the embedding has no row for: a tokenizer and a model that do not belong together.
pub(crate) fn check_ids<'a>(mut ids: impl Iterator<Item = &'a u32>, vocabulary: usize) -> Result<(), Error> {
    match ids.find(|&&id| id as usize >= vocabulary) {
        None => Ok(()),
        Some(id) => {
            let expected = format!("token ids below {vocabulary} (is the tokenizer the model's own?)");
            Err(Error::config("vocab_size", expected, id))
        }
    }
}
