//! Low-rank adaptation (Hu et al., 2021, arXiv:2106.09685), on the activations.

mod dora;
mod start;
mod svd;

pub use dora::Dora;
pub(crate) use dora::norm;
use start::leading;
pub(crate) use svd::halves;

use crate::{
    LoraConfig, Pass, Weight, kernel,
    kernel::{Compute, LinearKernels, Stored},
    param, random,
};
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
    /// The magnitude, if it is learned apart.
    pub dora: Option<Dora<B>>,
    /// The adapter's name, `default` in PEFT's files.
    pub name: String,
    /// `s`: `lora_alpha / r`, or `lora_alpha / √r` with rank stabilisation.
    pub scaling: f64,
    /// The probability with which an input feature is dropped in a training pass.
    pub dropout: f64,
    /// Whether `s·B·A` has been added to the layer's weight.
    pub merged: bool,
    /// Whether it acts in a pass that does not name adapters.
    pub active: bool,
    /// Whether it came with changes of the base model: of its weights, biases or whole modules.
    pub changes_base: bool,
    /// The layer's path as a number, the last part of the key of its dropout masks.
    layer: u64,
}

impl<B: LinearKernels> Lora<B> {
    /// A new adapter for the layer at `path` with weights `[out, in]`, with a start that does not need them.
    pub fn new(
        path: &str,
        name: &str,
        config: &LoraConfig,
        shape: [usize; 2],
        (seed, device): (u64, &B::Device),
    ) -> Self {
        let key = random::key(&[seed, random::text(path)]);
        let r = config.rank_at(path);
        let [a, b] = start::values(&config.init_lora_weights, shape, r, key);
        let tensor = |values: Vec<f32>, shape: [usize; 2]| {
            Tensor::<B, 2>::from_data(TensorData::new(values, shape), (device, DType::F32))
        };
        Self::from_tensors(path, name, config, tensor(a, [r, shape[1]]), tensor(b, [shape[0], r]))
    }

    /// An adapter with the given `A [r, in]` and `B [out, r]`.
    pub fn from_tensors(path: &str, name: &str, config: &LoraConfig, a: Tensor<B, 2>, b: Tensor<B, 2>) -> Self {
        let leaf = |part: &str, tensor: Tensor<B, 2>| {
            Param::initialized(param::id(&format!("{path}.{part}.{name}.weight")), tensor.require_grad())
        };
        Self {
            lora_a: leaf("lora_A", a),
            lora_b: leaf("lora_B", b),
            dora: None,
            name: name.to_owned(),
            scaling: config.scaling_at(path),
            dropout: config.lora_dropout,
            merged: false,
            active: true,
            changes_base: config.changes_base(),
            layer: random::text(path),
        }
    }

    /// The adapter that holds the principal part of `weight`, to be taken off it: `s·B·A` is the best approximation of rank `r`.
    pub(crate) fn principal(
        path: &str,
        name: &str,
        config: &LoraConfig,
        weight: Tensor<B, 2>,
        (niter, seed): (Option<usize>, u64),
    ) -> Self {
        let key = random::key(&[seed, random::text(path)]);
        let (a, b) = svd::halves(weight, config.rank_at(path), niter, key);
        let share = config.scaling_at(path).sqrt();
        Self::from_tensors(path, name, config, a / share, b / share)
    }

    /// The adapter that holds the first directions of the QR decomposition of `weight`, `s·B·A` to be taken off it.
    pub(crate) fn leading(path: &str, name: &str, config: &LoraConfig, weight: Tensor<B, 2>) -> Self {
        let (a, b) = leading(weight, config.rank_at(path));
        Self::from_tensors(path, name, config, a, b)
    }

    /// Takes `A [r, in]` and `B [out, r]` for its own, which stay trainable or frozen as they were.
    pub(crate) fn replace(&mut self, a: Tensor<B, 2>, b: Tensor<B, 2>) {
        for (leaf, values) in [(&mut self.lora_a, a), (&mut self.lora_b, b)] {
            let trained = leaf.is_require_grad();
            *leaf = leaf.clone().map(|_| values.detach().set_require_grad(trained));
        }
    }

    /// What the adapter adds to the layer's output: `x [tokens, in]` → `[tokens, out]`. Without the magnitude.
    pub fn forward(&self, x: Tensor<B, 2>, pass: &Pass) -> Tensor<B, 2> {
        let dtype = x.dtype();
        let x = self.drop(x.cast(DType::F32), pass);
        let low = kernel::linear(x, self.lora_a.val(), Compute::F32) * self.scaling;
        kernel::linear(low, self.lora_b.val(), Compute::F32).cast(dtype)
    }

    /// What an adapter with a magnitude adds to the layer's output: `base [tokens, out]` is `x` times the layer's `weight`.
    pub(crate) fn forward_with_magnitude(
        &self,
        dora: &Dora<B>,
        x: Tensor<B, 2>,
        (base, weight): (Tensor<B, 2>, &Weight<B>),
        pass: &Pass,
    ) -> Tensor<B, 2> {
        // Both parts see the same features, as in PEFT.
        let base = match pass.noise {
            Some(_) if self.dropout > 0.0 => {
                weight.linear(self.drop(x.clone().cast(DType::F32), pass).cast(x.dtype()), pass.compute)
            }
            _ => base,
        };
        let factor = dora.factor(self, &weight.stored()).unsqueeze::<2>();
        let dtype = base.dtype();
        let added = self.forward(x, pass).cast(DType::F32) * factor.clone();
        (base.cast(DType::F32) * (factor - 1.0) + added).cast(dtype)
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

    /// The weight `[out, in]`, in f32, after merging the adapter (or after undoing that).
    pub(crate) fn shifted(&mut self, weight: Tensor<B, 2>, merge: bool) -> Tensor<B, 2> {
        self.merged = merge;
        let delta = if merge { self.delta() } else { self.delta().neg() }.detach();
        match self.dora.take() {
            None => weight + delta,
            Some(mut dora) => {
                let kept = dora.merged.take();
                let stored = Stored::Dense(weight.clone().into_primitive().tensor());
                let factor = kept.unwrap_or_else(|| dora.factor(self, &stored).detach());
                dora.merged = merge.then(|| factor.clone());
                self.dora = Some(dora);
                let factor = factor.unsqueeze_dim::<2>(1);
                if merge { (weight + delta) * factor } else { weight / factor + delta }
            }
        }
    }
}

/// The matrix with zeros after its end along `dim`, `n` in all.
pub(crate) fn padded<B: LinearKernels>(x: Tensor<B, 2>, dim: usize, n: usize) -> Tensor<B, 2> {
    let (mut shape, device) = (x.dims(), x.device());
    if shape[dim] >= n {
        return x;
    }
    shape[dim] = n - shape[dim];
    Tensor::cat(vec![x, Tensor::zeros(shape, (&device, DType::F32))], dim)
}
