//! Linear layers with adapters for [Burn](burn), in the file format that Hugging Face PEFT reads and writes.
//!
//! ```text
//!            x [tokens, in]
//!            │
//!      ┌─────┴──────────────┐
//!      │ weight (frozen,    │ lora_a [r, in] → scaling → lora_b [out, r]   (per adapter, f32)
//!      │ dense or packed)   │
//!      └─────┬──────────────┘
//!            y = x·Wᵀ + bias + Σ s·(dropout(x)·Aᵀ)·Bᵀ
//! ```
//!
//! The key design decision: an adapter works on the activations. `W + s·B·A` is never formed during training, so the
//! backward pass needs neither that matrix nor its gradient; the cost is two thin matrix products per adapted layer.
//! Weights and adapters keep the layout of the checkpoint, `[out, in]`, so file input and output transpose nothing.
//!
//! ```
//! use burn::{backend::Flex, tensor::{Distribution, Tensor}};
//! use burn_peft::{ForwardContext, Linear, LoraConfig};
//!
//! let device = Default::default();
//! let weight = Tensor::<Flex, 2>::random([6, 4], Distribution::Default, &device);
//! let mut layer = Linear::new("q_proj", weight, None);
//! let x = Tensor::<Flex, 2>::random([3, 4], Distribution::Default, &device);
//! let before = layer.forward(x.clone(), &ForwardContext::default());
//! layer.attach("q_proj", "default", &LoraConfig { r: 2, ..LoraConfig::default() }, 0)?;
//! let after = layer.forward(x, &ForwardContext::default());
//! // A new adapter leaves the output unchanged: B is zero.
//! assert_eq!(before.into_data(), after.into_data());
//! # Ok::<(), burn_peft::Error>(())
//! ```
//!
//! Where to look: [`adapter`] adds LoRA and its variants (DoRA, PiSSA, rank patterns, trained biases and
//! `modules_to_save`) and IA3 to a model, and [`prompt`] makes virtual tokens (prefix tuning, prompt tuning,
//! P-tuning). All of them read and write PEFT's adapter directories. A model can hold several named adapters;
//! [`adapter`] activates, merges, combines and hot-swaps them, and a [`Route`] selects an adapter per row of a batch.
//! A [`Weight`] stays frozen in the quantized blocks of its file, or is quantized to NF4; the matrix products are those
//! of [`burn_peft_kernels`].
//! `examples/foreign.rs` adds a prefix and LoRA to a model that uses nothing of this crate but [`Linear`].
#![deny(missing_docs)]
#![recursion_limit = "256"]

pub mod adapter;
pub mod config;
mod config_file;
mod context;
pub mod embedding;
mod error;
pub mod format;
pub mod ia3;
mod linear;
pub mod lora;
pub mod param;
pub mod prompt;
pub mod random;
pub mod route;
pub mod target;
mod weight;

pub use adapter::{AdapterModel, Linears};
pub use config::LoraConfig;
pub use config_file::Loaded;
pub use context::{DropoutKey, ForwardContext, TokenPosition};
pub use embedding::Embedding;
pub use error::Error;
pub use ia3::{Ia3, Ia3Config};
pub use linear::Linear;
pub use lora::Lora;
pub use prompt::{Prompt, PromptConfig};
pub use route::Route;
pub use target::TargetModules;
pub use weight::Weight;

pub use burn_peft_kernels::{Codec, LinearKernels, MatmulPrecision, PackedWeight, WeightMatrix};

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
