//! The prompt encoder, which computes the virtual tokens: an embedding table, optionally followed by an MLP.

use super::{BaseShape, PromptConfig, PromptMethod};
use crate::{ForwardContext, Linear, Weight, param, random};
use burn::{
    module::{Module, Param},
    tensor::{
        DType, Tensor, TensorData,
        activation::{relu, tanh},
    },
};
use burn_peft_kernels::LinearKernels;

/// An embedding table, followed by linear layers with an activation between them.
#[derive(Module, Debug)]
pub struct PromptEncoder<B: LinearKernels> {
    /// The embedding table `[num_virtual_tokens, widths[0]]`.
    pub embedding: Param<Tensor<B, 2>>,
    /// The layers of the MLP, from the table's width to that of a virtual token; empty without an MLP.
    pub layers: Vec<Linear<B>>,
    activation: Activation,
}

/// The activation function between the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Activation {
    /// The hyperbolic tangent, used by prefix tuning.
    Tanh,
    /// ReLU, used by P-tuning.
    Relu,
}

impl Activation {
    fn of(method: &PromptMethod) -> Self {
        match method {
            PromptMethod::Prefix { .. } => Self::Tanh,
            _ => Self::Relu,
        }
    }
}

impl<B: LinearKernels> PromptEncoder<B> {
    /// Creates an encoder with PEFT's initialization: a normal table, and layers uniform in `±1/√in`, as in PyTorch.
    pub(super) fn new(config: &PromptConfig, base: &BaseShape, seed: u64, device: &B::Device) -> Self {
        let widths = config.widths(base);
        let zero = matches!(&config.method, PromptMethod::Prefix { init_weights: Some(zero), .. } if zero == "zero");
        let key = |path: &str| random::key(&[seed, random::key_from_str(path)]);
        let tensor = |values: Vec<f32>, shape: [usize; 2]| {
            Tensor::<B, 2>::from_data(TensorData::new(values, shape), (device, DType::F32))
        };
        let layer = |(index, pair): (usize, &[usize])| {
            let (path, [features, out]) = (format!("prompt.encoder.layers.{index}"), [pair[0], pair[1]]);
            let zero = zero && index + 2 == widths.len();
            let bound = if zero { 0.0 } else { 1.0 / (features as f64).sqrt() };
            let uniform = |name: &str, n: usize| random::uniform_values(key(&format!("{path}.{name}")), n, bound);
            let weight = tensor(uniform("weight", out * features), [out, features]);
            let bias = tensor(uniform("bias", out), [1, out]).reshape([out]);
            Linear::new(&path, weight, Some(bias))
        };
        let layers: Vec<_> = widths.windows(2).enumerate().map(layer).collect();
        let n = config.num_virtual_tokens * widths[0];
        let table = match zero && layers.is_empty() {
            true => vec![0.0; n],
            false => (0..n as u64).map(|i| random::normal(key("prompt.encoder.embedding"), i) as f32).collect(),
        };
        let embedding = tensor(table, [config.num_virtual_tokens, widths[0]]);
        Self { embedding: embedding_param(embedding), layers, activation: Activation::of(&config.method) }
    }

    /// Creates an encoder of placeholders of one element, with the parameters of one of this configuration.
    pub(super) fn placeholder(config: &PromptConfig, base: &BaseShape, device: &B::Device) -> Self {
        let zero = || Tensor::<B, 2>::zeros([1, 1], (device, DType::F32));
        let layer = |(index, pair): (usize, &[usize])| {
            let bias = Tensor::zeros([1], (device, DType::F32));
            let layer = Linear::new(&format!("prompt.encoder.layers.{index}"), zero(), Some(bias));
            layer.into_placeholder([pair[1], pair[0]])
        };
        let layers = config.widths(base).windows(2).enumerate().map(layer).collect();
        Self { embedding: embedding_param(zero()), layers, activation: Activation::of(&config.method) }
    }

    /// Creates an encoder without an MLP: its table `[num_virtual_tokens, width]` holds the virtual tokens.
    pub(super) fn from_embeddings(table: Tensor<B, 2>) -> Self {
        Self { embedding: embedding_param(table), layers: Vec::new(), activation: Activation::Relu }
    }

    /// Gives every parameter the id of a parameter of the prompt `name`.
    pub(super) fn set_prompt_name(&mut self, name: &str) {
        let end = if name == "default" { String::new() } else { format!(".{name}") };
        set_param_id(&mut self.embedding, &format!("prompt.encoder.embedding{end}"));
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let path = format!("prompt.encoder.layers.{index}");
            if let Weight::Dense(weight) = &mut layer.weight {
                set_param_id(weight, &format!("{path}.weight{end}"));
            }
            if let Some(bias) = &mut layer.bias {
                set_param_id(bias, &format!("{path}.bias{end}"));
            }
        }
    }

    /// Computes the virtual tokens, `[num_virtual_tokens, width]`.
    pub fn forward(&self) -> Tensor<B, 2> {
        let mut x = self.embedding.val();
        for (index, layer) in self.layers.iter().enumerate() {
            if index > 0 {
                x = match self.activation {
                    Activation::Tanh => tanh(x),
                    Activation::Relu => relu(x),
                };
            }
            x = layer.forward(x, &ForwardContext::default());
        }
        x
    }
}

fn embedding_param<B: LinearKernels>(table: Tensor<B, 2>) -> Param<Tensor<B, 2>> {
    Param::initialized(param::id("prompt.encoder.embedding"), table.detach().require_grad())
}

fn set_param_id<B: LinearKernels, const D: usize>(param: &mut Param<Tensor<B, D>>, path: &str) {
    *param = Param::initialized(param::id(path), param.val());
}
