//! The linear layer that every projection of a model is.

use crate::{Error, Lora, LoraConfig, Pass, kernel, kernel::LinearKernels, param};
use burn::{
    module::{Module, Param},
    tensor::Tensor,
};

/// `y = x·Wᵀ + bias + Σ adapters`. The weight keeps the layout `[out, in]` and the path `….weight` of the checkpoint; it is
/// stored as f32, f16 or bf16 while activations and adapters are f32.
#[derive(Module, Debug)]
pub struct Linear<B: LinearKernels> {
    /// `W [out, in]`.
    pub weight: Param<Tensor<B, 2>>,
    /// `[out]`, in f32.
    pub bias: Option<Param<Tensor<B, 1>>>,
    /// The adapters, in the order in which they were attached. All of them add to the output.
    pub adapters: Vec<Lora<B>>,
}

impl<B: LinearKernels> Linear<B> {
    /// A layer at `path` (its key in the checkpoint, without `.weight`) with trainable `weight [out, in]` and `bias [out]`.
    pub fn new(path: &str, weight: Tensor<B, 2>, bias: Option<Tensor<B, 1>>) -> Self {
        Self {
            weight: Param::initialized(param::id(&format!("{path}.weight")), weight.require_grad()),
            bias: bias.map(|bias| Param::initialized(param::id(&format!("{path}.bias")), bias.require_grad())),
            adapters: Vec::new(),
        }
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        self.weight.lazy_shape().dims()
    }

    /// `x [tokens, in]` → `[tokens, out]`, in the type of `x`.
    pub fn forward(&self, x: Tensor<B, 2>, pass: &Pass) -> Tensor<B, 2> {
        let mut y = kernel::linear(x.clone(), self.weight.val());
        if let Some(bias) = &self.bias {
            y = y + bias.val().unsqueeze();
        }
        for adapter in self.adapters.iter().filter(|adapter| !adapter.merged) {
            y = y + adapter.forward(x.clone(), pass);
        }
        y
    }

    /// Adds a new adapter that changes nothing yet; `seed` and the layer's path decide its `A`.
    pub fn attach(&mut self, path: &str, name: &str, config: &LoraConfig, seed: u64) {
        let device = self.weight.lazy_device();
        self.adapters.push(Lora::new(path, name, config, self.shape(), (seed, &device)));
    }

    /// The adapter of that name.
    pub fn adapter(&self, name: &str) -> Option<&Lora<B>> {
        self.adapters.iter().find(|adapter| adapter.name == name)
    }

    /// Adds `s·B·A` of the named adapter to the weight; nothing happens if that was done before or if the layer has no such
    /// adapter. The sum is computed in f32 and stored in the weight's type.
    pub fn merge(&mut self, name: &str) {
        self.shift(name, true);
    }

    /// Takes `s·B·A` of a merged adapter off the weight again.
    pub fn unmerge(&mut self, name: &str) {
        self.shift(name, false);
    }

    fn shift(&mut self, name: &str, merge: bool) {
        let Some(adapter) = self.adapters.iter_mut().find(|adapter| adapter.name == name && adapter.merged != merge)
        else {
            return;
        };
        adapter.merged = merge;
        let delta = if merge { adapter.delta() } else { adapter.delta().neg() }.detach();
        self.weight = self.weight.clone().map(|weight| {
            let (dtype, trained) = (weight.dtype(), weight.is_require_grad());
            let sum = weight.detach().cast(delta.dtype()) + delta;
            sum.cast(dtype).detach().set_require_grad(trained)
        });
    }

    /// Removes the named adapter.
    ///
    /// # Errors
    /// If it is merged: its values would stay in the weight.
    pub fn detach(&mut self, name: &str) -> Result<(), Error> {
        if self.adapter(name).is_some_and(|adapter| adapter.merged) {
            return Err(Error::Name { name: name.to_owned(), state: "is merged into the weights; unmerge it first" });
        }
        self.adapters.retain(|adapter| adapter.name != name);
        Ok(())
    }
}
