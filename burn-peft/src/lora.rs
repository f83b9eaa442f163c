//! Low-rank adaptation (Hu et al., 2021, arXiv:2106.09685), on the activations.

use crate::{LoraConfig, Pass, kernel, kernel::LinearKernels, param, random};
use burn::{
    module::{Module, Param},
    tensor::{DType, Tensor, TensorData},
};

/// One low-rank adapter of one linear layer: `Δy = s·(dropout(x)·Aᵀ)·Bᵀ`. Its weights are f32 whatever the layer's are.
#[derive(Module, Debug)]
pub struct Lora<B: LinearKernels> {
    /// `A [r, in]`, PEFT's `lora_A.weight`.
    pub lora_a: Param<Tensor<B, 2>>,
    /// `B [out, r]`, PEFT's `lora_B.weight`.
    pub lora_b: Param<Tensor<B, 2>>,
    /// The adapter's name, `default` in PEFT's files.
    pub name: String,
    /// `s`: `lora_alpha / r`, or `lora_alpha / √r` with rank stabilisation.
    pub scaling: f64,
    /// The probability with which an input feature is dropped in a training pass.
    pub dropout: f64,
    /// Whether `s·B·A` has been added to the layer's weight.
    pub merged: bool,
    /// The layer's path as a number, the last part of the key of its dropout masks.
    layer: u64,
}

impl<B: LinearKernels> Lora<B> {
    /// A new adapter for the layer at `path` with `[out, in]` weights: `A` uniform in `±1/√in` (Kaiming with `a = √5`, as
    /// PEFT), `B` zero, so that it changes nothing yet.
    pub fn new(
        path: &str,
        name: &str,
        config: &LoraConfig,
        [out, features]: [usize; 2],
        (seed, device): (u64, &B::Device),
    ) -> Self {
        let (bound, key) = (1.0 / (features as f64).sqrt(), random::key(&[seed, random::text(path)]));
        let a = (0..config.r * features).map(|i| ((2.0 * random::uniform(key, i as u64) - 1.0) * bound) as f32);
        let a = TensorData::new(a.collect::<Vec<f32>>(), [config.r, features]);
        Self::from_tensors(
            path,
            name,
            config,
            Tensor::from_data(a, (device, DType::F32)),
            Tensor::zeros([out, config.r], (device, DType::F32)),
        )
    }

    /// An adapter with the given `A [r, in]` and `B [out, r]`.
    pub fn from_tensors(path: &str, name: &str, config: &LoraConfig, a: Tensor<B, 2>, b: Tensor<B, 2>) -> Self {
        let leaf = |part: &str, tensor: Tensor<B, 2>| {
            Param::initialized(param::id(&format!("{path}.{part}.{name}.weight")), tensor.require_grad())
        };
        Self {
            lora_a: leaf("lora_A", a),
            lora_b: leaf("lora_B", b),
            name: name.to_owned(),
            scaling: config.scaling(),
            dropout: config.lora_dropout,
            merged: false,
            layer: random::text(path),
        }
    }

    /// What the adapter adds to the layer's output: `x [tokens, in]` → `[tokens, out]`.
    pub fn forward(&self, x: Tensor<B, 2>, pass: &Pass) -> Tensor<B, 2> {
        let dtype = x.dtype();
        let x = self.drop(x.cast(DType::F32), pass);
        let low = kernel::linear(x, self.lora_a.val()) * self.scaling;
        kernel::linear(low, self.lora_b.val()).cast(dtype)
    }

    fn drop(&self, x: Tensor<B, 2>, pass: &Pass) -> Tensor<B, 2> {
        let Some(noise) = pass.noise.as_ref().filter(|_| self.dropout > 0.0) else { return x };
        let [tokens, features] = x.dims();
        assert_eq!(tokens, noise.tokens.len(), "the pass names its tokens one by one");
        let mask = TensorData::new(noise.mask(self.layer, features, self.dropout), [tokens, features]);
        let device = x.device();
        x * Tensor::from_data(mask, (&device, DType::F32))
    }

    /// `s·B·A [out, in]` in f32: what merging adds to the weight.
    pub fn delta(&self) -> Tensor<B, 2> {
        self.lora_b.val().matmul(self.lora_a.val()) * self.scaling
    }
}
