//! LLaMA, and every model of its architecture, as a [Burn](burn) module: real checkpoints, real tokenizers, training and
//! generation on any backend.
//!
//! ```text
//!  text ─ tokenizer ─ ids ─► embed ─► block 0 … block L-1 ─► norm ─► head ─► logits ─► generate
//!                              ▲       ▲                       └───► linear cross-entropy ─► loss
//!                              │       └ past: KV cache, or a trained prefix
//!                              └ prompt tuning
//! ```
//!
//! The key decision: names and layouts are the checkpoint's. A parameter's path is its Hugging Face key and a weight stays
//! `[out, in]`, so nothing is renamed or transposed on the way in or out, and training, evaluation and generation share one
//! forward pass. The cost is one call, `Llama::context`, that prepares positions and visibility for a batch.
//!
//! ```no_run
//! use burn::{backend::Flex, tensor::DType};
//! use burn_llama::{Checkpoint, Generate, Settings, Tokenizer};
//!
//! # fn main() -> Result<(), burn_llama::Error> {
//! let path = std::path::Path::new("SmolLM2-135M-Instruct");
//! let model = Checkpoint::open(path)?.load::<Flex>(DType::F32, &Default::default())?;
//! let tokenizer = Tokenizer::from_dir(path)?;
//! let prompt = tokenizer.encode("The heart is", true)?;
//! let rows = Generate::new(&model, &[prompt], &Settings::default())?.finish()?;
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
mod layout;
pub mod model;
mod past;
pub mod rope;
pub mod tokenizer;

pub use batch::{Batch, Example};
pub use chat::{ChatTemplate, Message};
pub use checkpoint::{Checkpoint, Storage};
pub use config::{Biases, LlamaConfig};
pub use error::{Error, Mismatch};
pub use generate::{Generate, Settings};
pub use layout::{Context, Layout, Tail};
pub use model::Llama;
pub use past::{KeyValue, Past};
pub use tokenizer::Tokenizer;
