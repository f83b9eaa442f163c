//! The linear layer that every projection of a model is.

use crate::{
    Error, Ia3, Lora, LoraConfig, Pass, Weight, config::InitLora, kernel::LinearKernels, lora::Dora, packed::Packed,
    param, route::Reach,
};
use burn::{
    module::{Module, Param},
    tensor::{DType, Tensor},
};

/// `y = x·Wᵀ + bias + Σ adapters`. The weight keeps the layout `[out, in]` and the path `….weight` of the checkpoint; it is
/// stored as f32, f16 or bf16, or packed, while activations and adapters are f32.
#[derive(Module, Debug)]
pub struct Linear<B: LinearKernels> {
    /// `W [out, in]`.
    pub weight: Weight<B>,
    /// `[out]`, in f32.
    pub bias: Option<Param<Tensor<B, 1>>>,
    /// The low-rank adapters, in the order in which they were attached. Those that are active add to the output.
    pub adapters: Vec<Lora<B>>,
    /// Learned factors of the layer's own features.
    pub ia3: Vec<Ia3<B>>,
    /// The names of those in the weight, in the order of merging.
    #[module(skip)]
    merged: Vec<String>,
}

impl<B: LinearKernels> Linear<B> {
    /// A layer at `path` (its key in the checkpoint, without `.weight`) with trainable `weight [out, in]` and `bias [out]`.
    pub fn new(path: &str, weight: Tensor<B, 2>, bias: Option<Tensor<B, 1>>) -> Self {
        Self::with(path, Weight::dense(&format!("{path}.weight"), weight), bias)
    }

    /// A layer at `path` with a frozen packed weight and trainable `bias [out]`.
    pub fn packed(path: &str, weight: Packed<B>, bias: Option<Tensor<B, 1>>) -> Self {
        Self::with(path, Weight::packed(&format!("{path}.weight"), weight), bias)
    }

    /// A layer at `path` with the given weight and trainable `bias [out]`.
    pub fn with(path: &str, weight: Weight<B>, bias: Option<Tensor<B, 1>>) -> Self {
        Self {
            weight,
            bias: bias.map(|bias| Param::initialized(param::id(&format!("{path}.bias")), bias.require_grad())),
            adapters: Vec::new(),
            ia3: Vec::new(),
            merged: Vec::new(),
        }
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        self.weight.shape()
    }

    /// `x [tokens, in]` → `[tokens, out]`, in the type of `x`.
    pub fn forward(&self, x: Tensor<B, 2>, pass: &Pass) -> Tensor<B, 2> {
        let tokens = x.dims()[0];
        let mut y = self.weight.linear(self.scaled(x.clone(), true, pass), pass.compute);
        let base = self.adapters.iter().any(|adapter| adapter.dora.is_some()).then(|| y.clone());
        if let Some(bias) = &self.bias {
            y = y + bias.val().unsqueeze();
        }
        y = self.scaled(y, false, pass);
        for adapter in self.adapters.iter().filter(|adapter| !adapter.merged) {
            let Some(reach) = pass.reach(&adapter.name, adapter.active, tokens) else { continue };
            let x = reach.take(x.clone());
            let added = match (&adapter.dora, &base) {
                (Some(dora), Some(base)) => {
                    adapter.forward_with_magnitude(dora, x, (reach.take(base.clone()), &self.weight), pass)
                }
                _ => adapter.forward(x, pass),
            };
            y = reach.add(y, added);
        }
        y
    }

    /// `x` with its features scaled by the factors of the layer's inputs (`feedforward`) or outputs.
    fn scaled(&self, x: Tensor<B, 2>, feedforward: bool, pass: &Pass) -> Tensor<B, 2> {
        let tokens = x.dims()[0];
        self.ia3.iter().filter(|ia3| !ia3.merged && ia3.is_feedforward() == feedforward).fold(x, |x, ia3| {
            match pass.reach(&ia3.name, ia3.active, tokens) {
                None => x,
                Some(Reach::ALL) => ia3.scale(x),
                Some(reach) => {
                    let part = reach.take(x.clone());
                    reach.add(x, ia3.scale(part.clone()) - part)
                }
            }
        })
    }

    /// Adds a new adapter; `seed` and the layer's path decide its random numbers. A start from the weight takes the adapter's
    /// part off it, so that the layer computes what it did; it does too with every other start but `false`.
    ///
    /// # Errors
    /// If the start takes something off a weight that is packed.
    pub fn attach(&mut self, path: &str, name: &str, config: &LoraConfig, seed: u64) -> Result<(), Error> {
        self.fits(path, config)?;
        let device = self.weight.device();
        let mut adapter = match config.init_lora_weights {
            InitLora::Pissa { niter } => Lora::principal(path, name, config, self.weight.val(), (niter, seed)),
            InitLora::Olora => Lora::leading(path, name, config, self.weight.val()),
            _ => Lora::new(path, name, config, self.shape(), (seed, &device)),
        };
        if config.init_lora_weights.splits_weight() {
            let delta = adapter.delta().neg();
            self.map_weight(|weight| weight + delta);
        }
        if config.use_dora {
            let magnitude = crate::lora::norm(&adapter, &self.weight.stored());
            adapter.dora = Some(Dora::new(path, name, magnitude));
        }
        self.adapters.push(adapter);
        Ok(())
    }

    /// An error if an adapter of that configuration cannot start here.
    pub(crate) fn fits(&self, path: &str, config: &LoraConfig) -> Result<(), Error> {
        match config.init_lora_weights {
            InitLora::Pissa { .. } => self.weight.writable("init_lora_weights = \"pissa\"")?,
            InitLora::Olora => self.weight.writable("init_lora_weights = \"olora\"")?,
            InitLora::Loftq => {}
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

    /// Whether an adapter acts beside the weight in a pass that names none.
    pub fn is_adapted(&self) -> bool {
        self.adapters.iter().any(|adapter| adapter.active && !adapter.merged)
            || self.ia3.iter().any(|ia3| ia3.active && !ia3.merged)
    }

    /// The low-rank adapter of that name.
    pub fn adapter(&self, name: &str) -> Option<&Lora<B>> {
        self.adapters.iter().find(|adapter| adapter.name == name)
    }

    /// Puts the named adapter into the weight (`s·B·A` is added, a magnitude or factors multiply); nothing happens if that was
    /// done before or if the layer has no such adapter. Computed in f32 and stored in the weight's type.
    ///
    /// # Errors
    /// If the weight is packed.
    pub fn merge(&mut self, name: &str) -> Result<(), Error> {
        self.mergeable(name)?;
        if self.carries(name) && !self.merged.iter().any(|merged| merged == name) {
            self.shift(name, true);
            self.merged.push(name.to_owned());
        }
        Ok(())
    }

    /// An error if the layer has the named adapter and no weight that takes it in.
    pub(crate) fn mergeable(&self, name: &str) -> Result<(), Error> {
        if self.carries(name) { self.weight.writable("merging an adapter") } else { Ok(()) }
    }

    /// Whether the layer has the named adapter.
    pub(crate) fn carries(&self, name: &str) -> bool {
        self.adapter(name).is_some() || self.ia3.iter().any(|ia3| ia3.name == name)
    }

    /// Whether everything that merging the named adapter would write is a number.
    pub(crate) fn is_finite(&self, name: &str) -> bool {
        // A sum, because the largest value of a device may pass over NaN; zeros, because finite values may add up to infinity.
        let whole = |x: Tensor<B, 2>| (x * 0.0).sum().into_data().iter::<f64>().all(|sum| sum == 0.0);
        let low_rank = self.adapter(name).is_none_or(|adapter| {
            let magnitude = adapter.dora.as_ref().map(|dora| dora.magnitude.val().unsqueeze());
            whole(adapter.delta()) && magnitude.is_none_or(whole)
        });
        low_rank && self.ia3.iter().filter(|ia3| ia3.name == name).all(|ia3| whole(ia3.ia3_l.val()))
    }

    /// Takes a merged adapter out of the weight again. Those that were merged after it scale or were scaled by what it left: they
    /// are taken out first and merged again.
    pub fn unmerge(&mut self, name: &str) {
        let Some(index) = self.merged.iter().position(|merged| merged == name) else { return };
        let later = self.merged.split_off(index);
        later.iter().rev().for_each(|name| self.shift(name, false));
        for name in later.into_iter().skip(1) {
            self.shift(&name, true);
            self.merged.push(name);
        }
    }

    fn shift(&mut self, name: &str, merge: bool) {
        let wanted = |found: &str, merged: bool| found == name && merged != merge;
        if let Some(index) = self.adapters.iter().position(|adapter| wanted(&adapter.name, adapter.merged)) {
            let mut adapter = self.adapters.remove(index);
            self.map_weight(|weight| adapter.shifted(weight, merge));
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

    /// Changes the weight, given and returned in f32.
    pub(crate) fn map_weight(&mut self, change: impl FnOnce(Tensor<B, 2>) -> Tensor<B, 2>) {
        self.weight.map_dense(|weight| {
            let (dtype, trained) = (weight.dtype(), weight.is_require_grad());
            change(weight.detach().cast(DType::F32)).cast(dtype).detach().set_require_grad(trained)
        });
    }

    /// Removes the named adapter.
    ///
    /// # Errors
    /// If it is merged: its values would stay in the weight.
    pub fn detach(&mut self, name: &str) -> Result<(), Error> {
        let low_rank = self.adapters.iter().map(|adapter| (&adapter.name, adapter.merged));
        let mut all = low_rank.chain(self.ia3.iter().map(|ia3| (&ia3.name, ia3.merged)));
        if all.any(|(found, merged)| found == name && merged) {
            return Err(Error::Name { name: name.to_owned(), state: "is merged into the weights; unmerge it first" });
        }
        self.adapters.retain(|adapter| adapter.name != name);
        self.ia3.retain(|ia3| ia3.name != name);
        Ok(())
    }
}
