//! The verb `generate`: rows for training, written by a model.
//!
//! ```text
//! recipe + input ─► method: item i ─► prompts ─► provider (API, own model, batch file) ─► journal
//!                                        ▲                                                  │
//!                                        └── next step ◄── answers of item i ◄──────────────┤
//!                                                                                           ▼
//!                                                  rows.jsonl ◄── filters, in the order of items
//! ```
//!
//! Request i is a function of the recipe, the seed and i; rows are a function of the journal. So the file is the same
//! for any number of requests in flight, after a kill at any time, and through a batch file.

mod answer;
mod batch;
mod budget;
mod command;
mod counts;
mod draft;
mod engine;
mod filters;
mod flow;
mod graph;
mod input;
mod items;
mod journal;
mod json_text;
mod method;
mod output;
mod personal;
mod pickle;
mod plan;
mod progress;
mod provider;
mod recipe;
mod report;
mod request;
mod retry;
mod support;
mod workers;

pub use command::BudgetReached;
pub(crate) use command::{GenerateArgs, generate};
