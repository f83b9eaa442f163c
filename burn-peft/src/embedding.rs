//! The token embedding with adapters: LoRA, and rows that are trained by themselves.

use crate::{ForwardContext, LoraConfig, Weight, error::MERGED, param, random, route::TokenSelection};
use burn::{
    module::{Module, Param},
    tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData, s},
};
use burn_peft_kernels::LinearKernels;
use std::sync::Arc;

/// A token embedding with adapters. The weight keeps the layout and the path `….weight` of the checkpoint.
#[derive(Module, Debug)]
pub struct Embedding<B: LinearKernels> {
    /// The rows of all tokens, `[vocab_size, hidden_size]`.
    pub weight: Weight<B>,
    /// The adapters, in the order in which they were attached.
    pub adapters: Vec<EmbeddingAdapter<B>>,
    /// The shape of the weight if another rank holds it, and this embedding has placeholders.
    #[module(skip)]
    elsewhere: Option<[usize; 2]>,
}

/// The part of a LoRA adapter that acts on the token embedding.
#[derive(Module, Debug)]
pub struct EmbeddingAdapter<B: LinearKernels> {
    /// The low-rank matrices, if `target_modules` selects the embedding.
    pub lora: Option<EmbeddingLora<B>>,
    /// The rows of `trainable_token_indices`.
    pub tokens: Option<TrainableTokens<B>>,
    /// The adapter's name.
    pub name: String,
    /// The configuration that the adapter was attached or loaded with.
    #[module(skip)]
    pub config: Arc<LoraConfig>,
    /// True if the adapter is merged into the weight.
    pub merged: bool,
    /// True if the adapter is active: a forward pass without a route applies it.
    pub active: bool,
}

/// LoRA of the embedding: the row of token `t` becomes `W[t] + s·A[:, t]ᵀ·Bᵀ`.
#[derive(Module, Debug)]
pub struct EmbeddingLora<B: LinearKernels> {
    /// The matrix `A [r, vocab_size]`, PEFT's `lora_embedding_A`.
    pub lora_embedding_a: Param<Tensor<B, 2>>,
    /// The matrix `B [hidden_size, r]`, PEFT's `lora_embedding_B`.
    pub lora_embedding_b: Param<Tensor<B, 2>>,
    /// The scaling `s`.
    pub scaling: f64,
}

/// Rows that replace those of single tokens.
#[derive(Module, Debug)]
pub struct TrainableTokens<B: LinearKernels> {
    /// The rows `[tokens, hidden_size]`, PEFT's `trainable_tokens_delta`. In spite of that name they are no differences.
    pub delta: Param<Tensor<B, 2>>,
    /// The tokens.
    #[module(skip)]
    indices: Arc<Vec<i32>>,
    /// The rows of the weight that the merged ones replaced.
    #[module(skip)]
    original: Option<TensorData>,
}

impl<B: LinearKernels> Embedding<B> {
    /// Creates an embedding with the given weight and no adapters.
    pub fn new(weight: Weight<B>) -> Self {
        Self { weight, adapters: Vec::new(), elsewhere: None }
    }

    /// Says that another rank holds the embedding, whose weight has the `shape` `[vocab_size, hidden_size]`: its weight
    /// becomes a placeholder, as [`Linear::into_placeholder`](crate::Linear::into_placeholder) says.
    pub fn into_placeholder(mut self, shape: [usize; 2]) -> Self {
        self.weight = self.weight.into_placeholder();
        self.elsewhere = Some(shape);
        self
    }

    /// Returns true if another rank holds the embedding.
    pub fn is_elsewhere(&self) -> bool {
        self.elsewhere.is_some()
    }

    /// Says that the embedding holds its weight, or will when a rank gathers it.
    pub fn assume_held(&mut self) {
        self.elsewhere = None;
    }

    /// Returns the shape `[vocab_size, hidden_size]`, also of an embedding that another rank holds.
    pub fn shape(&self) -> [usize; 2] {
        self.elsewhere.unwrap_or_else(|| self.weight.shape())
    }

    /// Changes the number of rows of an embedding that another rank holds.
    pub fn resize_elsewhere(&mut self, rows: usize) {
        self.elsewhere = self.elsewhere.map(|[_, features]| [rows, features]);
    }

    /// Returns the adapter of that name.
    pub fn adapter(&self, name: &str) -> Option<&EmbeddingAdapter<B>> {
        self.adapters.iter().find(|adapter| adapter.name == name)
    }

    /// Returns true if an adapter of the embedding is active and not merged.
    pub fn is_adapted(&self) -> bool {
        self.adapters.iter().any(|adapter| adapter.active && !adapter.merged)
    }

    /// Returns true if an active adapter also changes an output head that shares the weight.
    pub fn adapts_tied_head(&self) -> bool {
        self.adapters.iter().any(|adapter| adapter.active && !adapter.merged && adapter.acts_on_tied_head())
    }

    /// Applies the adapters to `x [tokens, hidden_size]` in f32, the rows of `ids [tokens]` in the weight.
    pub fn adapt(&self, x: Tensor<B, 2>, ids: Tensor<B, 1, Int>, pass: &ForwardContext) -> Tensor<B, 2> {
        let tokens = x.dims()[0];
        self.adapters.iter().filter(|adapter| !adapter.merged).fold(x, |x, adapter| {
            match pass.token_selection(&adapter.name, adapter.active, tokens) {
                Some(selection) => adapter.adapt(x, ids.clone(), selection),
                None => x,
            }
        })
    }

    /// Computes the logits `[tokens, vocab_size]` of an output head that shares the weight, with the adapters that
    /// change the head too, from `x [tokens, hidden_size]`.
    pub fn tied_head(&self, x: Tensor<B, 2>, pass: &ForwardContext) -> Tensor<B, 2> {
        let tokens = x.dims()[0];
        let logits = self.weight.linear(x.clone(), pass.compute);
        let adapters = self.adapters.iter().filter(|adapter| !adapter.merged && adapter.acts_on_tied_head());
        adapters.fold(logits, |logits, adapter| match pass.token_selection(&adapter.name, adapter.active, tokens) {
            Some(selection) => adapter.tied_head(logits, x.clone(), selection),
            None => logits,
        })
    }

    /// Merges the named adapter into the weight, or unmerges it; does nothing if there is none, or nothing to do.
    pub(crate) fn set_merged(&mut self, name: &str, merge: bool) {
        let Some(adapter) = self.adapters.iter_mut().find(|adapter| adapter.name == name && adapter.merged != merge)
        else {
            return;
        };
        self.weight.map_dense(|weight| {
            let (dtype, trained) = (weight.dtype(), weight.is_require_grad());
            let merged = adapter.apply_merge(weight.detach().cast(DType::F32), merge);
            merged.cast(dtype).detach().set_require_grad(trained)
        });
        adapter.merged = merge;
    }

    /// Deletes the named adapter.
    ///
    /// # Errors
    /// If it is merged: its values would remain in the weight.
    pub(crate) fn delete_adapter(&mut self, name: &str) -> Result<(), crate::Error> {
        if self.adapter(name).is_some_and(|adapter| adapter.merged) {
            return Err(crate::Error::adapter(name, MERGED));
        }
        self.adapters.retain(|adapter| adapter.name != name);
        Ok(())
    }
}

impl<B: LinearKernels> EmbeddingAdapter<B> {
    /// Creates an active adapter that does nothing yet.
    pub(crate) fn new(name: &str, config: &LoraConfig) -> Self {
        let config = Arc::new(config.clone());
        Self { lora: None, tokens: None, name: name.to_owned(), config, merged: false, active: true }
    }

    /// Returns true if the adapter changes an output head that shares the embedding's weight. PEFT always ties the
    /// rows of single tokens, and LoRA with `ensure_weight_tying`.
    fn acts_on_tied_head(&self) -> bool {
        self.tokens.is_some() || self.config.ensure_weight_tying
    }

    /// Returns true if merging changes the embedding but must not change a head that shares its weight.
    pub(crate) fn unties_by_merging(&self) -> bool {
        self.lora.is_some() && !self.config.ensure_weight_tying
    }

    fn adapt(&self, x: Tensor<B, 2>, ids: Tensor<B, 1, Int>, selection: TokenSelection<'_>) -> Tensor<B, 2> {
        let mask = selection.row_mask::<B>(x.dims()[0], &x.device());
        let masked = |rows: Tensor<B, 2>| mask.iter().fold(rows, |rows, mask| rows * mask.clone());
        let mut x = x;
        if let Some(lora) = &self.lora {
            let low = lora.lora_embedding_a.val().select(1, ids.clone()).transpose();
            x = x + masked(low.matmul(lora.lora_embedding_b.val().transpose()) * lora.scaling);
        }
        if let Some(tokens) = &self.tokens {
            // One-hot rows, so that a gradient reaches the rows of the tokens and no others.
            let matches = masked(tokens.matches(ids));
            let kept = matches.clone().sum_dim(1).neg() + 1.0;
            x = x * kept + matches.matmul(tokens.delta.val());
        }
        x
    }

    fn tied_head(&self, logits: Tensor<B, 2>, x: Tensor<B, 2>, selection: TokenSelection<'_>) -> Tensor<B, 2> {
        let (dtype, device) = (logits.dtype(), x.device());
        let mask = selection.row_mask::<B>(x.dims()[0], &device);
        let masked = |rows: Tensor<B, 2>| mask.iter().fold(rows, |rows, mask| rows * mask.clone());
        let (mut logits, x) = (logits.cast(DType::F32), x.cast(DType::F32));
        if let Some(lora) = self.lora.as_ref().filter(|_| self.config.ensure_weight_tying) {
            let low = x.clone().matmul(lora.lora_embedding_b.val());
            logits = logits + masked(low.matmul(lora.lora_embedding_a.val()) * lora.scaling);
        }
        if let Some(tokens) = &self.tokens {
            let indices = tokens.index_tensor(&device);
            let change = x.matmul(tokens.delta.val().transpose()) - logits.clone().select(1, indices.clone());
            logits = logits.select_assign(1, indices, masked(change), IndexingUpdateOp::Add);
        }
        logits.cast(dtype)
    }

    /// Returns the weight `[vocab_size, hidden_size]` in f32 with the adapter merged, or unmerged.
    fn apply_merge(&mut self, mut weight: Tensor<B, 2>, merge: bool) -> Tensor<B, 2> {
        if let Some(lora) = &self.lora {
            let delta = lora.delta_weight().detach();
            weight = if merge { weight + delta } else { weight - delta };
        }
        if let Some(tokens) = &mut self.tokens {
            let device = weight.device();
            let indices = tokens.index_tensor(&device);
            let before = weight.clone().select(0, indices.clone());
            let rows = match tokens.original.take() {
                Some(original) if !merge => Tensor::from_data(original, (&device, DType::F32)),
                _ => tokens.delta.val().detach(),
            };
            tokens.original = merge.then(|| before.clone().into_data());
            weight = weight.select_assign(0, indices, rows - before, IndexingUpdateOp::Add);
        }
        weight
    }

    /// Returns true if all values of the adapter are finite.
    pub(crate) fn is_finite(&self) -> bool {
        let whole = |x: Tensor<B, 2>| (x * 0.0).sum().into_data().iter::<f64>().all(|sum| sum == 0.0);
        self.lora.as_ref().is_none_or(|lora| whole(lora.delta_weight()))
            && self.tokens.as_ref().is_none_or(|tokens| whole(tokens.delta.val()))
    }
}

impl<B: LinearKernels> EmbeddingLora<B> {
    /// Creates the matrices of the embedding at `path`, with the given `A [r, vocab_size]` and `B [hidden_size, r]`.
    pub(crate) fn from_tensors(path: &str, name: &str, config: &LoraConfig, [a, b]: [Tensor<B, 2>; 2]) -> Self {
        let leaf = |part: &str, tensor: Tensor<B, 2>| {
            Param::initialized(param::id(&format!("{path}.{part}.{name}")), tensor.require_grad())
        };
        Self {
            lora_embedding_a: leaf("lora_embedding_A", a),
            lora_embedding_b: leaf("lora_embedding_B", b),
            scaling: config.scaling_at(path),
        }
    }

    /// Creates new matrices as PEFT does: `A` is zero, `B` is drawn from the normal distribution.
    pub(crate) fn new(path: &str, name: &str, config: &LoraConfig, base: &Embedding<B>, seed: u64) -> Self {
        let ([vocabulary, hidden], device, r) = (base.shape(), base.weight.device(), config.rank_at(path));
        if base.is_elsewhere() {
            let zero = || Tensor::zeros([1, 1], (&device, DType::F32));
            return Self::from_tensors(path, name, config, [zero(), zero()]);
        }
        let key = random::key(&[seed, random::key_from_str(path)]);
        let b: Vec<f32> = (0..(hidden * r) as u64).map(|at| random::normal(key, at) as f32).collect();
        let a = Tensor::zeros([r, vocabulary], (&device, DType::F32));
        let b = Tensor::from_data(TensorData::new(b, [hidden, r]), (&device, DType::F32));
        Self::from_tensors(path, name, config, [a, b])
    }

    /// Computes `s·(B·A)ᵀ [vocab_size, hidden_size]`, which merging adds to the weight.
    fn delta_weight(&self) -> Tensor<B, 2> {
        self.lora_embedding_b.val().matmul(self.lora_embedding_a.val()).transpose() * self.scaling
    }
}

impl<B: LinearKernels> TrainableTokens<B> {
    /// Creates the rows `[tokens, hidden_size]` of the given tokens of the embedding at `path`.
    pub(crate) fn new(path: &str, name: &str, indices: &[u32], rows: Tensor<B, 2>) -> Self {
        let id = param::id(&format!("{path}.token_adapter.trainable_tokens_delta.{name}"));
        let indices = Arc::new(indices.iter().map(|&index| index as i32).collect());
        Self { delta: Param::initialized(id, rows.require_grad()), indices, original: None }
    }

    /// Creates rows that equal those of the embedding.
    pub(crate) fn from_base(path: &str, name: &str, indices: &[u32], base: &Embedding<B>) -> Self {
        let (weight, device) = (&base.weight, base.weight.device());
        if base.is_elsewhere() {
            return Self::new(path, name, indices, Tensor::zeros([1, 1], (&device, DType::F32)));
        }
        let ids = indices.iter().map(|&index| index as i32).collect::<Vec<_>>();
        let ids = Tensor::<B, 1, Int>::from_data(TensorData::new(ids, [indices.len()]), (&device, DType::I32));
        Self::new(path, name, indices, weight.val().detach().select(0, ids).cast(DType::F32).detach())
    }

    /// Sets every row to the mean of those of `weight [vocab_size, hidden_size]` before the first of the tokens.
    pub(crate) fn set_to_mean(&mut self, weight: Tensor<B, 2>) {
        let before = self.indices.iter().min().map_or(0, |&first| first as usize).max(1);
        let mean = weight.slice(s![0..before, ..]).mean_dim(0).repeat_dim(0, self.indices.len());
        let trained = self.delta.is_require_grad();
        self.delta = self.delta.clone().map(|_| mean.detach().set_require_grad(trained));
    }

    fn index_tensor(&self, device: &B::Device) -> Tensor<B, 1, Int> {
        let data = TensorData::new(self.indices.to_vec(), [self.indices.len()]);
        Tensor::from_data(data, (device, DType::I32))
    }

    /// Returns 1 where a token of `ids` is one of the rows, `[ids, rows]`, else 0.
    fn matches(&self, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        let (n, k) = (ids.dims()[0], self.indices.len());
        let indices = self.index_tensor(&ids.device()).cast(ids.dtype());
        let rows = indices.unsqueeze_dim::<2>(0).repeat_dim(0, n);
        ids.unsqueeze_dim::<2>(1).repeat_dim(1, k).equal(rows).float().cast(DType::F32)
    }
}
