//! The part of a LoRA adapter that acts on the token embedding.

use super::linears::Linears;
use crate::{
    Error, LoraConfig,
    config::Selection,
    embedding::{EmbeddingAdapter, EmbeddingLora, TrainableTokens},
    format,
};
use burn::tensor::{DType, Tensor, TensorData};
use burn_peft_kernels::LinearKernels;
use std::{collections::BTreeMap, path::Path};

/// The part of a configuration that concerns the token embedding.
pub(super) struct EmbeddingTarget {
    path: String,
    /// `[vocab_size, hidden_size]`.
    shape: [usize; 2],
    /// True if the embedding gets low-rank matrices.
    lora: bool,
    /// The tokens whose rows are trained by themselves; empty if there are none.
    tokens: Vec<u32>,
}

impl EmbeddingTarget {
    /// Returns what `config` asks for, or `None` if it leaves the embedding alone.
    pub(super) fn new<B: LinearKernels, M: Linears<B>>(model: &M, config: &LoraConfig) -> Result<Option<Self>, Error> {
        let Some((path, embedding)) = model.embedding() else {
            return match &config.trainable_token_indices {
                Some(_) => Err(Error::config("`trainable_token_indices`: the model has no embedding for adapters")),
                None => Ok(None),
            };
        };
        let (selection, shape) = (Selection::new(config)?, embedding.shape());
        let lora = selection.selects_embedding(path);
        let head = model.tied().map(|[_, head]| head);
        let tokens = config.trainable_token_indices.as_ref().map(|indices| indices.of_embedding(path, head));
        let tokens = tokens.transpose()?.unwrap_or_default().to_vec();
        let message = if lora && config.use_dora {
            format!("`use_dora`: DoRA of the embedding is not supported; leave {path} out of `target_modules`")
        } else if lora && !tokens.is_empty() {
            format!("`trainable_token_indices`: {path} is one of `target_modules`, too; choose one of the two")
        } else if !tokens.is_empty() && selection.in_modules_to_save(path) {
            format!("`trainable_token_indices`: {path} is one of `modules_to_save`, too; choose one of the two")
        } else {
            let path = path.to_owned();
            return Ok((lora || !tokens.is_empty()).then_some(Self { path, shape, lora, tokens }));
        };
        Err(Error::config(message))
    }

    /// Adds rows to the model for tokens that follow its last one, if the file holds no embedding that has them.
    pub(super) fn grow<B: LinearKernels, M: Linears<B>>(&mut self, model: &mut M) {
        let rows = self.shape[0];
        let mut new: Vec<usize> =
            self.tokens.iter().map(|&token| token as usize).filter(|&token| token >= rows).collect();
        new.sort_unstable();
        if !new.is_empty() && new.iter().copied().eq(rows..rows + new.len()) {
            self.shape[0] = rows + new.len();
            model.resize_token_embeddings(self.shape[0]);
        }
    }

    /// Checks that the embedding has a row for every token.
    ///
    /// # Errors
    /// If it has none for one of them.
    pub(super) fn check_tokens(&self) -> Result<(), Error> {
        let rows = self.shape[0];
        match self.tokens.iter().find(|&&token| token as usize >= rows) {
            None => Ok(()),
            Some(token) => {
                Err(Error::config(format!("`trainable_token_indices`: expected tokens below {rows}, found {token}")))
            }
        }
    }

    /// Returns true if the embedding gets low-rank matrices.
    pub(super) fn is_lora(&self) -> bool {
        self.lora
    }

    /// Returns true if PEFT wraps the module at `path`: the embedding, and a head that shares its rows.
    pub(super) fn wraps<B: LinearKernels, M: Linears<B>>(&self, model: &M, path: &str) -> bool {
        let head = model.tied().is_some_and(|[_, head]| head == path);
        path == self.path || (head && !self.tokens.is_empty())
    }

    /// Returns the keys and shapes of the tensors in PEFT's file.
    pub(super) fn expected_tensors(&self, config: &LoraConfig) -> Vec<(String, Vec<usize>)> {
        let ([vocabulary, hidden], r) = (self.shape, config.rank_at(&self.path));
        let mut expected = Vec::new();
        if self.lora {
            expected.push((lora_key(&self.path, "A"), vec![r, vocabulary]));
            expected.push((lora_key(&self.path, "B"), vec![hidden, r]));
        }
        if !self.tokens.is_empty() {
            expected.push((tokens_key(&self.path), vec![self.tokens.len(), hidden]));
        }
        expected
    }

    /// Takes the tensors of a head that shares the adapter out of `tensors`, where PEFT writes them a second time.
    ///
    /// # Errors
    /// If they differ from those of the embedding.
    pub(super) fn take_tied<B: LinearKernels, M: Linears<B>>(
        &self,
        model: &M,
        directory: &Path,
        tensors: &mut BTreeMap<String, TensorData>,
    ) -> Result<(), Error> {
        let Some([path, head]) = model.tied() else { return Ok(()) };
        let transposed = |data: &TensorData| {
            let transposed = Tensor::<B, 2>::from_data(data.clone(), (&B::Device::default(), DType::F32)).transpose();
            transposed.into_data()
        };
        for (key, on_head) in [
            (lora_key(path, "A"), format::tensor_key(head, "lora_B")),
            (lora_key(path, "B"), format::tensor_key(head, "lora_A")),
            (tokens_key(path), tokens_key(head)),
        ] {
            let Some(own) = tensors.get(&key) else { continue };
            let own = if key.contains("lora") { transposed(own) } else { own.clone() };
            if tensors.remove(&on_head).is_some_and(|found| found != own) {
                let expected = "the values of the embedding, whose weight the head shares";
                return Err(Error::format(directory, &on_head, expected, "others"));
            }
        }
        Ok(())
    }

    /// Adds a new adapter to the embedding; it changes nothing yet.
    pub(super) fn attach<B: LinearKernels, M: Linears<B>>(
        &self,
        model: &mut M,
        name: &str,
        config: &LoraConfig,
        seed: u64,
    ) {
        let Some((path, embedding)) = model.embedding_mut() else { return };
        let mut adapter = EmbeddingAdapter::new(name, config);
        adapter.lora = self.lora.then(|| EmbeddingLora::new(path, name, config, embedding, seed));
        adapter.tokens =
            (!self.tokens.is_empty()).then(|| TrainableTokens::from_base(path, name, &self.tokens, embedding));
        embedding.adapters.push(adapter);
    }

    /// Adds an adapter to the embedding, whose values it takes out of `tensors`.
    pub(super) fn load<B: LinearKernels, M: Linears<B>>(
        &self,
        model: &mut M,
        name: &str,
        config: &LoraConfig,
        tensors: &mut BTreeMap<String, TensorData>,
    ) {
        let Some((path, embedding)) = model.embedding_mut() else { return };
        let (mut adapter, device) = (EmbeddingAdapter::new(name, config), embedding.weight.device());
        let elsewhere = embedding.is_elsewhere();
        let mut take = |key: String| {
            let data = tensors.remove(&key)?;
            let place = (&device, DType::F32);
            Some(if elsewhere { Tensor::<B, 2>::zeros([1, 1], place) } else { Tensor::from_data(data, place) })
        };
        if let Some(pair) = take(lora_key(path, "A")).zip(take(lora_key(path, "B"))) {
            adapter.lora = Some(EmbeddingLora::from_tensors(path, name, config, pair.into()));
        }
        adapter.tokens = take(tokens_key(path)).map(|rows| TrainableTokens::new(path, name, &self.tokens, rows));
        embedding.adapters.push(adapter);
    }
}

/// Sets the rows of `trainable_token_indices` of the named adapter to the mean of the rows of the embedding before the
/// first of these tokens, from which new tokens start.
pub fn init_tokens_by_mean<B: LinearKernels, M: Linears<B>>(model: &mut M, name: &str) {
    let Some((_, embedding)) = model.embedding_mut().filter(|(_, embedding)| !embedding.is_elsewhere()) else { return };
    let weight = embedding.weight.val().detach().cast(DType::F32);
    let tokens = embedding.adapters.iter_mut().find(|adapter| adapter.name == name);
    if let Some(tokens) = tokens.and_then(|adapter| adapter.tokens.as_mut()) {
        tokens.set_to_mean(weight);
    }
}

/// Adds the tensors of the named adapter on the embedding to `tensors`, by PEFT's keys. Returns the adapter's
/// configuration if there is one.
pub(super) fn collect_tensors<B: LinearKernels, M: Linears<B>>(
    model: &M,
    name: &str,
    tensors: &mut BTreeMap<String, TensorData>,
) -> Option<LoraConfig> {
    let (path, embedding) = model.embedding()?;
    let adapter = embedding.adapter(name)?;
    if let Some(lora) = &adapter.lora {
        let (a, b) = (lora.lora_embedding_a.val(), lora.lora_embedding_b.val());
        if let Some([_, head]) = model.tied().filter(|_| adapter.config.ensure_weight_tying) {
            tensors.insert(format::tensor_key(head, "lora_A"), b.clone().transpose().into_data());
            tensors.insert(format::tensor_key(head, "lora_B"), a.clone().transpose().into_data());
        }
        tensors.insert(lora_key(path, "A"), a.into_data());
        tensors.insert(lora_key(path, "B"), b.into_data());
    }
    if let Some(tokens) = &adapter.tokens {
        tensors.insert(tokens_key(path), tokens.delta.val().into_data());
    }
    Some(LoraConfig::clone(&adapter.config))
}

fn lora_key(path: &str, matrix: &str) -> String {
    format!("{}{path}.lora_embedding_{matrix}", format::PREFIX)
}

fn tokens_key(path: &str) -> String {
    format!("{}{path}.token_adapter.trainable_tokens_delta", format::PREFIX)
}
