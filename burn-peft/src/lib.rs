//! Linear layers that carry adapters, for [Burn](burn), and the files that PEFT itself reads and writes.
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
//! The key decision: an adapter works on the activations. `W + s·B·A` is never formed while training, so the backward
//! pass needs neither that matrix nor its gradient; the cost is two thin products per adapted layer. Weights and
//! adapters keep the layout of the checkpoint, `[out, in]`, so nothing is transposed when files are read or written.
//!
//! ```
//! use burn::{backend::Flex, tensor::{Distribution, Tensor}};
//! use burn_peft::{Linear, LoraConfig, Pass};
//!
//! let device = Default::default();
//! let weight = Tensor::<Flex, 2>::random([6, 4], Distribution::Default, &device);
//! let mut layer = Linear::new("q_proj", weight, None);
//! let x = Tensor::<Flex, 2>::random([3, 4], Distribution::Default, &device);
//! let before = layer.forward(x.clone(), &Pass::default());
//! layer.attach("q_proj", "default", &LoraConfig { r: 2, ..LoraConfig::default() }, 0)?;
//! let after = layer.forward(x, &Pass::default());
//! // An adapter starts as the identity: B is zero.
//! assert_eq!(before.into_data(), after.into_data());
//! # Ok::<(), burn_peft::Error>(())
//! ```
//!
//! Where to look: [`adapter`] puts LoRA and its family (DoRA, PiSSA, patterns, biases and whole modules beside it) on a
//! model, [`ia3`] learned factors, [`prompt`] virtual tokens (prefix tuning, prompt tuning, P-tuning). All of them read
//! and write PEFT's own directories. Several can be on a model by their names; [`adapter`] switches, merges, combines
//! and swaps them, and a [`Route`] lets each row of a batch have its own. [`packed`] keeps frozen weights in the blocks
//! of their file, or makes NF4 of them. `examples/foreign.rs` puts a prefix and LoRA on a model that knows nothing of
//! this crate but [`Linear`].
#![deny(missing_docs)]
#![recursion_limit = "256"]

pub mod adapter;
pub mod config;
mod error;
pub mod format;
pub mod ia3;
pub mod kernel;
mod linear;
pub mod lora;
pub mod packed;
pub mod param;
mod pass;
pub mod prompt;
pub mod random;
pub mod route;
pub mod target;
mod weight;

pub use adapter::Linears;
pub use config::LoraConfig;
pub use error::Error;
pub use ia3::{Ia3, Ia3Config};
pub use linear::Linear;
pub use lora::Lora;
pub use pass::{Noise, Pass, Token};
pub use prompt::{Prompt, PromptConfig};
pub use route::Route;
pub use target::TargetModules;
pub use weight::Weight;
