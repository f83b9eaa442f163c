//! Low-rank adaptation (LoRA: Hu et al., 2021, arXiv:2106.09685), computed on the activations.

mod adalora;
mod dora;
mod init;
mod linalg;
mod svd;

pub use adalora::AdaLora;
pub use dora::Dora;
pub(crate) use dora::weight_norm;
use init::olora_init;
pub(crate) use linalg::Factors;
pub(crate) use svd::low_rank_decomposition;

use crate::{ForwardContext, LoraConfig, Weight, param, random};
use burn::{
    module::{Module, Param},
    tensor::{DType, Tensor, TensorData},
};
use burn_peft_kernels::{LinearKernels, MatmulPrecision, WeightMatrix, linear};
use std::sync::Arc;

/// One LoRA adapter of one linear layer: `Δy = s·(dropout(x)·Aᵀ)·Bᵀ`. Its weights are always f32.
#[derive(Module, Debug)]
pub struct Lora<B: LinearKernels> {
    /// The matrix `A [r, in]`, PEFT's `lora_A.weight`.
    pub lora_a: Param<Tensor<B, 2>>,
    /// The matrix `B [out, r]`, PEFT's `lora_B.weight`.
    pub lora_b: Param<Tensor<B, 2>>,
    /// DoRA's magnitude, if the adapter uses DoRA.
    pub dora: Option<Dora<B>>,
    /// AdaLoRA's factors of the ranks, if the adapter is trained with AdaLoRA.
    pub adalora: Option<AdaLora<B>>,
    /// The adapter's name, `default` in PEFT's files.
    pub name: String,
    /// The configuration that the adapter was attached, loaded or combined with.
    #[module(skip)]
    pub config: Arc<LoraConfig>,
    /// The scaling `s` on this layer: `lora_alpha / r`, or `lora_alpha / √r` with `use_rslora`.
    pub scaling: f64,
    /// True if `s·B·A` is merged into the layer's weight.
    pub merged: bool,
    /// True if the adapter is active: a forward pass without a route applies it.
    pub active: bool,
    /// The hash of the layer's path: the last part of the key of its dropout masks.
    layer_key: u64,
}

/// A new adapter: the layer and the name that it gets, and its configuration.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LoraSpec<'a> {
    /// The layer's path.
    pub(crate) path: &'a str,
    /// The adapter's name.
    pub(crate) name: &'a str,
    /// The configuration.
    pub(crate) config: &'a LoraConfig,
}

impl LoraSpec<'_> {
    /// Returns the LoRA rank on this layer.
    fn rank(&self) -> usize {
        self.config.rank_at(self.path)
    }

    /// Returns the key of the adapter's random numbers.
    fn random_key(&self, seed: u64) -> u64 {
        random::key(&[seed, random::key_from_str(self.path)])
    }
}

impl<B: LinearKernels> Lora<B> {
    /// Creates an adapter for a layer whose weight has the `shape` `[out, in]`, with an initialization that does not
    /// depend on the weight.
    pub(crate) fn new(spec: LoraSpec<'_>, shape: [usize; 2], seed: u64, device: &B::Device) -> Self {
        let r = spec.rank();
        let key = spec.random_key(seed);
        let [a, b] = match spec.config.adalora {
            Some(_) => init::adalora_values(shape, r, key),
            None => init::initial_values(&spec.config.init_lora_weights, shape, r, key),
        };
        let tensor = |values: Vec<f32>, shape: [usize; 2]| {
            Tensor::<B, 2>::from_data(TensorData::new(values, shape), (device, DType::F32))
        };
        Self::from_tensors(spec, tensor(a, [r, shape[1]]), tensor(b, [shape[0], r]))
    }

    /// Creates an adapter with the given `A [r, in]` and `B [out, r]`.
    pub(crate) fn from_tensors(spec: LoraSpec<'_>, a: Tensor<B, 2>, b: Tensor<B, 2>) -> Self {
        let LoraSpec { path, name, config } = spec;
        let (r, device) = (a.dims()[0], a.device());
        let leaf = |part: &str, tensor: Tensor<B, 2>| {
            Param::initialized(param::id(&format!("{path}.{part}.{name}.weight")), tensor.require_grad())
        };
        Self {
            lora_a: leaf("lora_A", a),
            lora_b: leaf("lora_B", b),
            dora: None,
            adalora: config.adalora.as_ref().map(|_| AdaLora::new(path, name, r, &device)),
            name: name.to_owned(),
            config: Arc::new(config.clone()),
            scaling: config.scaling_at(path),
            merged: false,
            active: true,
            layer_key: random::key_from_str(path),
        }
    }

    /// Creates the adapter of a layer that another rank holds: its parameters are placeholders of one element.
    pub(crate) fn placeholder(spec: LoraSpec<'_>, device: &B::Device) -> Self {
        let zero = || Tensor::zeros([1, 1], (device, DType::F32));
        let mut adapter = Self::from_tensors(spec, zero(), zero());
        let magnitude = spec.config.use_dora.then(|| Tensor::zeros([1], (device, DType::F32)));
        adapter.dora = magnitude.map(|magnitude| Dora::new(spec.path, spec.name, magnitude));
        adapter
    }

    /// Creates an adapter with PiSSA's initialization: `s·B·A` is the best approximation of `weight` of rank `r`, which
    /// the caller has to subtract from the weight.
    pub(crate) fn pissa_init(spec: LoraSpec<'_>, weight: Tensor<B, 2>, niter: Option<usize>, seed: u64) -> Self {
        let Factors { a, b } = svd::low_rank_decomposition(weight, spec.rank(), niter, spec.random_key(seed));
        let share = spec.config.scaling_at(spec.path).sqrt();
        Self::from_tensors(spec, a / share, b / share)
    }

    /// Creates an adapter with OLoRA's initialization, from the QR decomposition of `weight`. The caller has to
    /// subtract `s·B·A` from the weight.
    pub(crate) fn olora_init(spec: LoraSpec<'_>, weight: Tensor<B, 2>) -> Self {
        let Factors { a, b } = olora_init(weight, spec.rank());
        Self::from_tensors(spec, a, b)
    }

    /// Replaces the values of `A [r, in]` and `B [out, r]`; the parameters stay trainable or frozen as they were.
    pub(crate) fn set_weights(&mut self, a: Tensor<B, 2>, b: Tensor<B, 2>) {
        for (leaf, values) in [(&mut self.lora_a, a), (&mut self.lora_b, b)] {
            let trained = leaf.is_require_grad();
            *leaf = leaf.clone().map(|_| values.detach().set_require_grad(trained));
        }
    }

    /// Computes the adapter's addition to the layer's output, without DoRA: `x [tokens, in]` → `[tokens, out]`.
    pub fn forward(&self, x: Tensor<B, 2>, context: &ForwardContext) -> Tensor<B, 2> {
        let dtype = x.dtype();
        let x = self.apply_dropout(x.cast(DType::F32), context);
        let low = linear(x, self.down_weight(), MatmulPrecision::F32) * self.scaling;
        linear(low, self.lora_b.val(), MatmulPrecision::F32).cast(dtype)
    }

    /// Computes the addition of an adapter with DoRA to the layer's output; `base [tokens, out]` is `x` times the
    /// layer's `weight`.
    pub(crate) fn forward_dora(
        &self,
        dora: &Dora<B>,
        x: Tensor<B, 2>,
        base: Tensor<B, 2>,
        weight: &Weight<B>,
        context: &ForwardContext,
    ) -> Tensor<B, 2> {
        // The base product and the adapter use the same dropout mask, as in PEFT.
        let base = match context.dropout {
            Some(_) if self.config.lora_dropout > 0.0 => {
                weight.linear(self.apply_dropout(x.clone().cast(DType::F32), context).cast(x.dtype()), context.compute)
            }
            _ => base,
        };
        let factor = dora.mag_norm_scale(self, &weight.matrix_ref()).unsqueeze::<2>();
        let dtype = base.dtype();
        let added = self.forward(x, context).cast(DType::F32) * factor.clone();
        (base.cast(DType::F32) * (factor - 1.0) + added).cast(dtype)
    }

    fn apply_dropout(&self, x: Tensor<B, 2>, context: &ForwardContext) -> Tensor<B, 2> {
        let p = self.config.lora_dropout;
        let Some(dropout) = context.dropout.as_ref().filter(|_| p > 0.0) else { return x };
        let [tokens, features] = x.dims();
        assert_eq!(tokens, dropout.tokens.len(), "the dropout key lists all tokens of the pass");
        let mask = TensorData::new(dropout.mask(self.layer_key, features, p), [tokens, features]);
        let device = x.device();
        x * Tensor::from_data(mask, (&device, DType::F32))
    }

    /// Returns the matrix that is applied first, `[r, in]`: `A`, with AdaLoRA `diag(E)·A`.
    pub fn down_weight(&self) -> Tensor<B, 2> {
        match &self.adalora {
            Some(adalora) => self.lora_a.val() * adalora.lora_e.val(),
            None => self.lora_a.val(),
        }
    }

    /// Computes `s·B·A [out, in]` in f32, which merging adds to the weight.
    pub fn delta_weight(&self) -> Tensor<B, 2> {
        self.lora_b.val().matmul(self.down_weight()) * self.scaling
    }

    /// Merges the adapter into a `weight` `[out, in]` in f32, or unmerges it from the weight, and returns the result.
    pub(crate) fn apply_merge(&mut self, weight: Tensor<B, 2>, merge: bool) -> Tensor<B, 2> {
        self.merged = merge;
        let delta = if merge { self.delta_weight() } else { self.delta_weight().neg() }.detach();
        match self.dora.take() {
            None => weight + delta,
            Some(mut dora) => {
                let kept = dora.merged_scale.take();
                let stored = WeightMatrix::Dense(weight.clone().into_primitive().tensor());
                let factor = kept.unwrap_or_else(|| dora.mag_norm_scale(self, &stored).detach());
                dora.merged_scale = merge.then(|| factor.clone());
                self.dora = Some(dora);
                let factor = factor.unsqueeze_dim::<2>(1);
                if merge { (weight + delta) * factor } else { weight / factor + delta }
            }
        }
    }
}

/// Pads the matrix with zeros at the end of `dim` to a size of `n`.
pub(crate) fn zero_pad<B: LinearKernels>(x: Tensor<B, 2>, dim: usize, n: usize) -> Tensor<B, 2> {
    let (mut shape, device) = (x.dims(), x.device());
    if shape[dim] >= n {
        return x;
    }
    shape[dim] = n - shape[dim];
    Tensor::cat(vec![x, Tensor::zeros(shape, (&device, DType::F32))], dim)
}
