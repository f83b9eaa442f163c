//! medqa: a medical question answering system, from data preparation to chat. [`cli`] is the command line; the modules
//! that read the user's files are public for the fuzzer.
#![recursion_limit = "256"]

mod args;
mod backend;
mod bench;
mod catch_panic;
mod chat;
pub mod cli;
pub mod data;
pub mod doctor;
mod estimate;
mod eval;
mod export;
mod fetch;
mod footprint;
mod identify;
mod launch;
mod logits;
mod method_adapter;
mod model;
mod prepare;
pub mod process;
mod quickstart;
pub mod recipe;
mod schedule;
pub mod schema;
mod template;
mod train;
mod verb_adapters;
mod verb_train;
mod write;
