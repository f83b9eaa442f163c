//! The linear layer with adapters, used for every projection of a model.

use crate::{
    Error, ForwardContext, Ia3, Lora, LoraConfig, Weight,
    config::InitLoraWeights,
    error::MERGED,
    lora::{Dora, LoraSpec},
    param,
    route::TokenSelection,
};
use burn::{
    module::{Module, Param},
    tensor::{DType, Tensor},
};
use burn_peft_kernels::{LinearKernels, PackedWeight};

/// A linear layer with adapters: `y = x·Wᵀ + bias + Σ adapters`. The weight keeps the layout `[out, in]` and the path
/// `….weight` of the checkpoint; it is stored as f32, f16 or bf16, or packed, while activations and adapters are f32.
#[derive(Module, Debug)]
pub struct Linear<B: LinearKernels> {
    /// The weight `W [out, in]`.
    pub weight: Weight<B>,
    /// The bias `[out]`, in f32.
    pub bias: Option<Param<Tensor<B, 1>>>,
    /// The LoRA adapters, in the order in which they were attached. The active ones add to the output.
    pub adapters: Vec<Lora<B>>,
    /// The IA3 adapters.
    pub ia3: Vec<Ia3<B>>,
    /// The names of the adapters that are merged into the weight, in the order of merging.
    #[module(skip)]
    merged_adapters: Vec<String>,
    /// The shape of the weight if another rank holds it, and this layer has placeholders.
    #[module(skip)]
    elsewhere: Option<[usize; 2]>,
}

impl<B: LinearKernels> Linear<B> {
    /// Creates a layer at `path` (its key in the checkpoint, without `.weight`) with trainable `weight [out, in]` and
    /// `bias [out]`.
    pub fn new(path: &str, weight: Tensor<B, 2>, bias: Option<Tensor<B, 1>>) -> Self {
        Self::from_weight(path, Weight::dense(&format!("{path}.weight"), weight), bias)
    }

    /// Creates a layer at `path` with a frozen packed weight and trainable `bias [out]`.
    pub fn packed(path: &str, weight: PackedWeight<B>, bias: Option<Tensor<B, 1>>) -> Self {
        Self::from_weight(path, Weight::packed(&format!("{path}.weight"), weight), bias)
    }

    /// Creates a layer at `path` with the given weight and trainable `bias [out]`.
    pub fn from_weight(path: &str, weight: Weight<B>, bias: Option<Tensor<B, 1>>) -> Self {
        Self {
            weight,
            bias: bias.map(|bias| Param::initialized(param::id(&format!("{path}.bias")), bias.require_grad())),
            adapters: Vec::new(),
            ia3: Vec::new(),
            merged_adapters: Vec::new(),
            elsewhere: None,
        }
    }

    /// Says that another rank holds the layer, whose weight has the `shape` `[out, in]`: its parameters become
    /// placeholders, see [`Weight::into_placeholder`], and adapters that are attached to it get placeholders too. Such a
    /// layer cannot be computed.
    pub fn into_placeholder(mut self, shape: [usize; 2]) -> Self {
        self.weight = self.weight.into_placeholder();
        self.bias = self.bias.map(param::placeholder);
        self.elsewhere = Some(shape);
        self
    }

    /// Returns true if another rank holds the layer.
    pub fn is_elsewhere(&self) -> bool {
        self.elsewhere.is_some()
    }

    /// Says that the layer holds its parameters, or will when a rank gathers them.
    pub fn assume_held(&mut self) {
        self.elsewhere = None;
    }

    /// Returns the shape `[out, in]`, also of a layer that another rank holds.
    pub fn shape(&self) -> [usize; 2] {
        self.elsewhere.unwrap_or_else(|| self.weight.shape())
    }

    /// Changes the number of rows of a layer that another rank holds, see [`Linear::into_placeholder`].
    pub fn resize_elsewhere(&mut self, rows: usize) {
        self.elsewhere = self.elsewhere.map(|[_, features]| [rows, features]);
    }

    /// Computes the layer with its adapters: `x [tokens, in]` → `[tokens, out]`, in the type of `x`.
    pub fn forward(&self, x: Tensor<B, 2>, context: &ForwardContext) -> Tensor<B, 2> {
        let tokens = x.dims()[0];
        let mut y = self.weight.linear(self.apply_ia3(x.clone(), true, context), context.compute);
        let base = self.adapters.iter().any(|adapter| adapter.dora.is_some()).then(|| y.clone());
        if let Some(bias) = &self.bias {
            y = y + bias.val().unsqueeze();
        }
        y = self.apply_ia3(y, false, context);
        for adapter in self.adapters.iter().filter(|adapter| !adapter.merged) {
            let Some(selection) = context.token_selection(&adapter.name, adapter.active, tokens) else { continue };
            let x = selection.gather(x.clone());
            let added = match (&adapter.dora, &base) {
                (Some(dora), Some(base)) => {
                    adapter.forward_dora(dora, x, selection.gather(base.clone()), &self.weight, context)
                }
                _ => adapter.forward(x, context),
            };
            y = selection.scatter_add(y, added);
        }
        y
    }

    /// Scales the features of `x` by the active IA3 factors of the layer's inputs (if `feedforward`) or outputs.
    fn apply_ia3(&self, x: Tensor<B, 2>, feedforward: bool, context: &ForwardContext) -> Tensor<B, 2> {
        let tokens = x.dims()[0];
        self.ia3.iter().filter(|ia3| !ia3.merged && ia3.is_feedforward() == feedforward).fold(x, |x, ia3| match context
            .token_selection(&ia3.name, ia3.active, tokens)
        {
            None => x,
            Some(TokenSelection::ALL) => ia3.scale(x),
            Some(selection) => {
                let part = selection.gather(x.clone());
                selection.scatter_add(x, ia3.scale(part.clone()) - part)
            }
        })
    }

    /// Adds a new LoRA adapter; its random numbers depend on `seed` and the layer's path. PiSSA and OLoRA subtract the
    /// initial `s·B·A` from the weight. The layer's output stays the same with every initialization but `false`.
    ///
    /// # Errors
    /// If the initialization changes the weight and that is packed or on another rank, or the rank is too large for it.
    pub fn attach(&mut self, path: &str, name: &str, config: &LoraConfig, seed: u64) -> Result<(), Error> {
        self.check_init(path, config)?;
        let (spec, device) = (LoraSpec { path, name, config }, self.weight.device());
        if self.is_elsewhere() {
            self.adapters.push(Lora::placeholder(spec, &device));
            return Ok(());
        }
        let mut adapter = match config.init_lora_weights {
            InitLoraWeights::Pissa { niter } => Lora::pissa_init(spec, self.weight.val(), niter, seed),
            InitLoraWeights::Olora => Lora::olora_init(spec, self.weight.val()),
            _ => Lora::new(spec, self.shape(), seed, &device),
        };
        if config.init_lora_weights.mutates_base_weights() {
            let delta = adapter.delta_weight().neg();
            self.map_weight(|weight| weight + delta);
        }
        if config.use_dora {
            let magnitude = crate::lora::weight_norm(&adapter, &self.weight.matrix_ref());
            adapter.dora = Some(Dora::new(path, name, magnitude));
        }
        self.adapters.push(adapter);
        Ok(())
    }

    /// Returns an error if an adapter of that configuration cannot be initialized on this layer.
    pub(crate) fn check_init(&self, path: &str, config: &LoraConfig) -> Result<(), Error> {
        if self.is_elsewhere() {
            return match config.init_lora_weights.reads_base_weights() {
                true => Err(Error::needs_whole_model(&format!(
                    "init_lora_weights = {}",
                    serde_json::json!(config.init_lora_weights)
                ))),
                false => Ok(()),
            };
        }
        match config.init_lora_weights {
            InitLoraWeights::Pissa { .. } => self.weight.check_writable("init_lora_weights = \"pissa\"")?,
            InitLoraWeights::Olora => self.weight.check_writable("init_lora_weights = \"olora\"")?,
            InitLoraWeights::Loftq => {}
            _ => return Ok(()),
        }
        let (r, [out, features]) = (config.rank_at(path), self.shape());
        if r > out.min(features) {
            let (start, size) = (serde_json::json!(config.init_lora_weights), out.min(features));
            let message =
                format!("`r` with `init_lora_weights` = {start}: expected at most {size} at {path}, found {r}");
            return Err(Error::config(message));
        }
        Ok(())
    }

    /// Returns true if the layer has an adapter that is active and not merged.
    pub fn is_adapted(&self) -> bool {
        self.adapters.iter().any(|adapter| adapter.active && !adapter.merged)
            || self.ia3.iter().any(|ia3| ia3.active && !ia3.merged)
    }

    /// Returns the LoRA adapter of that name.
    pub fn adapter(&self, name: &str) -> Option<&Lora<B>> {
        self.adapters.iter().find(|adapter| adapter.name == name)
    }

    /// Merges the named adapter into the weight: adds `s·B·A`, scales by DoRA's magnitude or IA3's factors. Does
    /// nothing if it is merged already or missing. Computes in f32 and stores in the weight's type.
    ///
    /// # Errors
    /// If the weight is packed.
    pub fn merge(&mut self, name: &str) -> Result<(), Error> {
        self.check_mergeable(name)?;
        if self.has_adapter(name) && !self.merged_adapters.iter().any(|merged| merged == name) {
            self.set_merged(name, true);
            self.merged_adapters.push(name.to_owned());
        }
        Ok(())
    }

    /// Returns an error if the layer has the named adapter but cannot merge it because the weight is packed.
    pub(crate) fn check_mergeable(&self, name: &str) -> Result<(), Error> {
        if self.has_adapter(name) { self.weight.check_writable("merging an adapter") } else { Ok(()) }
    }

    /// Returns true if the layer has the named adapter.
    pub(crate) fn has_adapter(&self, name: &str) -> bool {
        self.adapter(name).is_some() || self.ia3.iter().any(|ia3| ia3.name == name)
    }

    /// Returns true if all values by which merging the named adapter would change the weight are finite.
    pub(crate) fn is_delta_finite(&self, name: &str) -> bool {
        // Sums instead of a maximum, because a device's maximum may skip NaN; of `x·0`, because a sum of finite values
        // may overflow to infinity.
        let whole = |x: Tensor<B, 2>| (x * 0.0).sum().into_data().iter::<f64>().all(|sum| sum == 0.0);
        let low_rank = self.adapter(name).is_none_or(|adapter| {
            let magnitude = adapter.dora.as_ref().map(|dora| dora.magnitude.val().unsqueeze());
            whole(adapter.delta_weight()) && magnitude.is_none_or(whole)
        });
        low_rank && self.ia3.iter().filter(|ia3| ia3.name == name).all(|ia3| whole(ia3.ia3_l.val()))
    }

    /// Unmerges the named adapter from the weight. Adapters that were merged after it are unmerged first and merged
    /// again, because DoRA and IA3 scale the weight and so do not commute with other adapters.
    pub fn unmerge(&mut self, name: &str) {
        let Some(index) = self.merged_adapters.iter().position(|merged| merged == name) else { return };
        let later = self.merged_adapters.split_off(index);
        later.iter().rev().for_each(|name| self.set_merged(name, false));
        for name in later.into_iter().skip(1) {
            self.set_merged(&name, true);
            self.merged_adapters.push(name);
        }
    }

    fn set_merged(&mut self, name: &str, merge: bool) {
        let wanted = |found: &str, merged: bool| found == name && merged != merge;
        if let Some(index) = self.adapters.iter().position(|adapter| wanted(&adapter.name, adapter.merged)) {
            let mut adapter = self.adapters.remove(index);
            self.map_weight(|weight| adapter.apply_merge(weight, merge));
            self.adapters.insert(index, adapter);
        }
        if let Some(index) = self.ia3.iter().position(|ia3| wanted(&ia3.name, ia3.merged)) {
            let factors = self.ia3[index].ia3_l.val().detach();
            let by = if merge { factors } else { factors.recip() };
            if !self.ia3[index].is_feedforward() {
                let out = by.clone().reshape([self.shape()[0]]);
                self.bias = self.bias.take().map(|bias| {
                    bias.map(|bias| {
                        let trained = bias.is_require_grad();
                        (bias.detach() * out).detach().set_require_grad(trained)
                    })
                });
            }
            self.map_weight(|weight| weight * by);
            self.ia3[index].merged = merge;
        }
    }

    /// Replaces the values of the weight by those that `change` returns; both are f32. A packed weight stays as it is.
    pub(crate) fn map_weight(&mut self, change: impl FnOnce(Tensor<B, 2>) -> Tensor<B, 2>) {
        self.weight.map_dense(|weight| {
            let (dtype, trained) = (weight.dtype(), weight.is_require_grad());
            change(weight.detach().cast(DType::F32)).cast(dtype).detach().set_require_grad(trained)
        });
    }

    /// Deletes the named adapter.
    ///
    /// # Errors
    /// If it is merged: its values would remain in the weight.
    pub fn delete_adapter(&mut self, name: &str) -> Result<(), Error> {
        let low_rank = self.adapters.iter().map(|adapter| (&adapter.name, adapter.merged));
        let mut all = low_rank.chain(self.ia3.iter().map(|ia3| (&ia3.name, ia3.merged)));
        if all.any(|(found, merged)| found == name && merged) {
            return Err(Error::adapter(name, MERGED));
        }
        self.adapters.retain(|adapter| adapter.name != name);
        self.ia3.retain(|ia3| ia3.name != name);
        Ok(())
    }
}
