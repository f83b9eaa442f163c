//! The methods: each turns an item into a chain of prompts, and the answers into rows.

mod evolve;
#[cfg(test)]
mod golden;
mod knowledge_graph;
mod magpie;
mod passages;
mod qa_items;
mod refusals;
mod rejection;
mod self_chat;
mod self_instruct;
mod template;

pub(super) use evolve::Evolve;
pub(super) use knowledge_graph::GraphQuestions;
pub(super) use magpie::Magpie;
pub(super) use passages::Passages;
pub(super) use refusals::Refusals;
pub(super) use rejection::Rejection;
pub(super) use self_chat::SelfChat;
pub(super) use self_instruct::{SeedTask, SelfInstruct};

use super::{answer::ModelAnswer, draft::Step, filters::FilterRules};

/// The size of a generation, for the estimate before it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct ExpectedSize {
    /// Requests of one item.
    pub requests: f64,
    /// Rows of one item that are kept.
    pub rows: f64,
    /// Tokens of one answer.
    pub answer_tokens: f64,
}

/// A way to generate rows. Everything here is a function of the recipe, the item and the answers.
pub(super) trait Method: Sync {
    /// Returns the number of items; none if there is no end.
    fn num_items(&self) -> Option<u64>;

    /// Returns the next step of an item after the answers so far.
    fn step(&self, item: u64, answers: &[ModelAnswer]) -> Step;

    /// Returns the rules for rows.
    fn rules(&self) -> FilterRules;

    /// Returns what an item is expected to take and to give.
    fn expected_size(&self) -> ExpectedSize;
}
