//! Virtual tokens that are trained while the model stays as it is.
//!
//! ```text
//! table [v, e] ─ MLP? ─► [v, width] ─┬─ prefix: keys and values of every layer, seen by every sequence
//!                                    └─ prompt: embeddings in front of every sequence
//! ```
//!
//! All methods are one encoder and one of two places where its output acts; a model needs to know the places only, see
//! [`Virtual`]. PEFT's file holds the encoder's output: the MLP is gone after training, whatever it was.

mod config;
mod encoder;
mod file;

pub use config::{BaseShape, Method, PromptConfig, PromptTuningInit};
pub use encoder::{Activation, Encoder};

use crate::{Error, Pass, kernel::LinearKernels, random};
use burn::{
    module::Module,
    tensor::{DType, Tensor, TensorData, s},
};

/// A trained prompt of a model, or one that is being trained.
#[derive(Module, Debug)]
pub struct Prompt<B: LinearKernels> {
    /// Makes the virtual tokens.
    pub encoder: Encoder<B>,
    /// The name, `default` if nothing else is said.
    pub name: String,
    /// Whether it acts in a pass that does not name adapters. Of several, the first does.
    pub active: bool,
    config: PromptConfig,
    base: BaseShape,
}

/// Where virtual tokens act.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the past of every layer, as keys and values.
    Past,
    /// In front of every sequence, as embeddings.
    Embeddings,
}

/// The virtual tokens of one pass. One of the two is empty.
#[derive(Debug, Clone)]
pub struct Virtual<B: LinearKernels> {
    /// What stands in front of every sequence: `[num_virtual_tokens, hidden_size]`.
    pub embeddings: Option<Tensor<B, 2>>,
    /// Per layer the keys, not to be rotated, and the values: `[num_virtual_tokens, 2, kv_heads, head_dim]`.
    pub layers: Vec<Tensor<B, 4>>,
}

impl<B: LinearKernels> Prompt<B> {
    /// A new prompt with PEFT's random start, a function of `seed`.
    ///
    /// # Errors
    /// If the configuration is not possible.
    pub fn new(config: &PromptConfig, base: BaseShape, (seed, device): (u64, &B::Device)) -> Result<Self, Error> {
        config.check()?;
        Ok(Self::with(Encoder::new(config, &base, (seed, device)), config.clone(), base))
    }

    fn with(encoder: Encoder<B>, config: PromptConfig, base: BaseShape) -> Self {
        Self { encoder, name: "default".to_owned(), active: true, config, base }
    }

    /// The prompt under another name, by which its parameters are told from those of other prompts of the model.
    pub fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self.encoder.rename(name);
        self
    }

    /// Starts from given virtual tokens, `[num_virtual_tokens, width]`, such as the embeddings of a text or its keys and values.
    ///
    /// # Errors
    /// If the shape is another, or if an MLP would have to be inverted.
    pub fn starting_from(mut self, tokens: Tensor<B, 2>) -> Result<Self, Error> {
        let expected = [self.config.num_virtual_tokens, self.config.width(&self.base)];
        if tokens.dims() != expected {
            let found = tokens.dims();
            return Err(Error::config(format!("the prompt should start from {expected:?} values but got {found:?}")));
        }
        if !self.encoder.layers.is_empty() {
            return Err(Error::config(
                "a prompt with an encoder (`prefix_projection`, P_TUNING) cannot start from a text: its MLP has no inverse",
            ));
        }
        self.encoder = Encoder::flat(tokens.cast(DType::F32));
        Ok(self)
    }

    /// The configuration.
    pub fn config(&self) -> &PromptConfig {
        &self.config
    }

    /// The number of virtual tokens.
    pub fn num_virtual_tokens(&self) -> usize {
        self.config.num_virtual_tokens
    }

    /// Where the virtual tokens act.
    pub fn place(&self) -> Place {
        match self.config.method {
            Method::Prefix { .. } => Place::Past,
            Method::Prompt { .. } | Method::PTuning { .. } => Place::Embeddings,
        }
    }

    /// The virtual tokens of a pass.
    pub fn encode(&self, pass: &Pass) -> Virtual<B> {
        let (tokens, base) = (self.encoder.forward(), &self.base);
        match self.config.method {
            Method::Prefix { dropout, .. } => {
                let all = drop(tokens, dropout, pass);
                let all = all.reshape([self.num_virtual_tokens(), base.num_hidden_layers, 2, base.kv_dim()]);
                let shape = [self.num_virtual_tokens(), 2, base.num_key_value_heads, base.head_dim];
                let layer = |index: usize| all.clone().slice(s![.., index..index + 1]).reshape(shape);
                Virtual { embeddings: None, layers: (0..base.num_hidden_layers).map(layer).collect() }
            }
            _ => Virtual { embeddings: Some(tokens), layers: Vec::new() },
        }
    }
}

/// Drops values of a training pass. All rows of a step share one mask, since they share the prefix: so the encoder runs once,
/// and a step's micro-batches add up to the one batch.
fn drop<B: LinearKernels>(tokens: Tensor<B, 2>, p: f64, pass: &Pass) -> Tensor<B, 2> {
    let Some(noise) = pass.noise.as_ref().filter(|_| p > 0.0) else { return tokens };
    let (shape, device) = (tokens.dims(), tokens.device());
    let mask = noise.step_mask(random::text("prompt"), shape[0] * shape[1], p);
    tokens * Tensor::from_data(TensorData::new(mask, shape), (&device, DType::F32))
}
