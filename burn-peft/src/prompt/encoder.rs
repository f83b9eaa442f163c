//! Where virtual tokens come from: a table, and an MLP behind it if there is one.

use super::{BaseShape, Method, PromptConfig};
use crate::{Linear, Pass, Weight, kernel::LinearKernels, param, random};
use burn::{
    module::{Module, Param},
    tensor::{
        DType, Tensor, TensorData,
        activation::{relu, tanh},
    },
};

/// A table of embeddings, and linear layers with an activation between them.
#[derive(Module, Debug)]
pub struct Encoder<B: LinearKernels> {
    /// `[num_virtual_tokens, widths[0]]`.
    pub embedding: Param<Tensor<B, 2>>,
    /// From the table's width to that of a virtual token; none if they are the same.
    pub layers: Vec<Linear<B>>,
    activation: Activation,
}

/// What stands between the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// The hyperbolic tangent, of prefix tuning.
    Tanh,
    /// The rectifier, of P-tuning.
    Relu,
}

impl<B: LinearKernels> Encoder<B> {
    /// A new encoder that starts as PEFT's: the table normal, the layers uniform in `±1/√in`, as torch does.
    pub(super) fn new(config: &PromptConfig, base: &BaseShape, (seed, device): (u64, &B::Device)) -> Self {
        let widths = config.widths(base);
        let zero = matches!(&config.method, Method::Prefix { init_weights: Some(zero), .. } if zero == "zero");
        let key = |path: &str| random::key(&[seed, random::text(path)]);
        let tensor = |values: Vec<f32>, shape: [usize; 2]| {
            Tensor::<B, 2>::from_data(TensorData::new(values, shape), (device, DType::F32))
        };
        let layer = |(index, pair): (usize, &[usize])| {
            let (path, [features, out]) = (format!("prompt.encoder.layers.{index}"), [pair[0], pair[1]]);
            let zero = zero && index + 2 == widths.len();
            let bound = if zero { 0.0 } else { 1.0 / (features as f64).sqrt() };
            let uniform = |key: u64, n: usize| -> Vec<f32> {
                (0..n as u64).map(|i| ((2.0 * random::uniform(key, i) - 1.0) * bound) as f32).collect()
            };
            let weight = tensor(uniform(key(&format!("{path}.weight")), out * features), [out, features]);
            let bias = tensor(uniform(key(&format!("{path}.bias")), out), [1, out]).reshape([out]);
            Linear::new(&path, weight, Some(bias))
        };
        let layers: Vec<_> = widths.windows(2).enumerate().map(layer).collect();
        let n = config.num_virtual_tokens * widths[0];
        let table = match zero && layers.is_empty() {
            true => vec![0.0; n],
            false => (0..n as u64).map(|i| random::normal(key("prompt.encoder.embedding"), i) as f32).collect(),
        };
        let embedding = tensor(table, [config.num_virtual_tokens, widths[0]]);
        let activation = match config.method {
            Method::Prefix { .. } => Activation::Tanh,
            _ => Activation::Relu,
        };
        Self { embedding: leaf(embedding), layers, activation }
    }

    /// An encoder without layers, whose table `[num_virtual_tokens, width]` are the virtual tokens themselves.
    pub(super) fn flat(table: Tensor<B, 2>) -> Self {
        Self { embedding: leaf(table), layers: Vec::new(), activation: Activation::Relu }
    }

    /// Gives every parameter the identity of one of the prompt `name`.
    pub(super) fn rename(&mut self, name: &str) {
        let end = if name == "default" { String::new() } else { format!(".{name}") };
        identify(&mut self.embedding, &format!("prompt.encoder.embedding{end}"));
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let path = format!("prompt.encoder.layers.{index}");
            if let Weight::Dense(weight) = &mut layer.weight {
                identify(weight, &format!("{path}.weight{end}"));
            }
            if let Some(bias) = &mut layer.bias {
                identify(bias, &format!("{path}.bias{end}"));
            }
        }
    }

    /// The virtual tokens, `[num_virtual_tokens, width]`.
    pub fn forward(&self) -> Tensor<B, 2> {
        let mut x = self.embedding.val();
        for (index, layer) in self.layers.iter().enumerate() {
            if index > 0 {
                x = match self.activation {
                    Activation::Tanh => tanh(x),
                    Activation::Relu => relu(x),
                };
            }
            x = layer.forward(x, &Pass::default());
        }
        x
    }
}

fn leaf<B: LinearKernels>(table: Tensor<B, 2>) -> Param<Tensor<B, 2>> {
    Param::initialized(param::id("prompt.encoder.embedding"), table.detach().require_grad())
}

fn identify<B: LinearKernels, const D: usize>(param: &mut Param<Tensor<B, D>>, path: &str) {
    *param = Param::initialized(param::id(path), param.val());
}
