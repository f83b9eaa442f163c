//! medqa: a medical question answering system, from data to chat. The program is [`cli`]; what reads the user's files is
//! public for the fuzzer.
#![recursion_limit = "256"]

mod adapter;
mod adapters;
mod backend;
mod bench;
mod chat;
pub mod cli;
pub mod data;
pub mod doctor;
mod estimate;
mod eval;
mod export;
mod fetch;
mod launch;
mod logits;
mod model;
pub mod process;
mod quickstart;
pub mod recipe;
mod schedule;
mod train;
mod write;
