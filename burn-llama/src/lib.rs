//! LLaMA and models of the same architecture as a [Burn](burn) module: real checkpoints, real tokenizers, training and
//! generation on any backend.
//!
//! ```text
//!  text ─ tokenizer ─ ids ─► embed ─► block 0 … block L-1 ─► norm ─► head ─► logits ─► generate
//!                              ▲       ▲                       └───► linear cross-entropy ─► loss
//!                              │       └ KV cache, or a trained prefix
//!                              └ prompt tuning
//! ```
//!
//! Parameters keep the names and layouts of the checkpoint: a parameter's path is its Hugging Face key and a weight
//! stays `[out, in]`, so nothing is renamed or transposed when a checkpoint is read or written. Training, evaluation
//! and generation share one forward pass. The cost is one call, `Llama::attention_context`, that prepares the rotary
//! tables and the attention mask of a batch.
//!
//! ```no_run
//! use burn::{backend::Flex, tensor::DType};
//! use burn_llama::{Checkpoint, Generation, GenerationConfig, Tokenizer};
//!
//! # fn main() -> Result<(), burn_llama::Error> {
//! let path = std::path::Path::new("SmolLM2-135M-Instruct");
//! let model = Checkpoint::open(path)?.load::<Flex>(DType::F32, &Default::default())?;
//! let tokenizer = Tokenizer::from_dir(path)?;
//! let prompt = tokenizer.encode("The heart is", true)?;
//! let rows = Generation::new(&model, &[prompt], &GenerationConfig::default())?.finish()?;
//! println!("{}", tokenizer.decode(&rows[0], true)?);
//! # Ok(())
//! # }
//! ```
#![deny(missing_docs)]
#![recursion_limit = "256"]

mod batch;
pub mod chat;
pub mod checkpoint;
mod config;
mod error;
pub mod generate;
pub mod kernel;
mod kv_cache;
mod layout;
pub mod model;
pub mod rope;
#[cfg(feature = "zero")]
mod segments;
pub mod tokenizer;

pub use batch::{Batch, Example};
pub use chat::{ChatTemplate, Message};
pub use checkpoint::{Checkpoint, Storage};
pub use config::{Biases, LlamaConfig};
pub use error::{Error, MismatchedTensor, TensorMismatch};
pub use generate::{Generation, GenerationConfig};
pub use kv_cache::{KeyValue, KvCache};
pub use layout::{AttentionContext, OutputSlots, RowSlots, SequenceLayout};
pub use model::{HeldSegments, Llama};
pub use tokenizer::Tokenizer;

/// The examples of the README are tests.
#[cfg(all(doctest, feature = "flex", feature = "zero"))]
#[doc = include_str!("../README.md")]
struct Readme;
