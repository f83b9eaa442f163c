//! The steps of a method, and the rows that come out of them before they are filtered.

use super::{answer::ModelAnswer, request::Prompt};
use serde_json::{Map, Value};

/// The next step of an item.
#[derive(Debug, PartialEq)]
pub(super) enum Step {
    /// The method needs the answer to a prompt.
    Ask(Prompt),
    /// The last answer cannot be used, for this reason; it is asked for once more with another seed.
    Unusable(&'static str),
    /// The item is finished.
    Done(ItemResult),
}

/// The rows of a finished item.
#[derive(Debug, Default, PartialEq)]
pub(super) struct ItemResult {
    pub drafts: Vec<Draft>,
    pub rejected: Vec<RejectedText>,
    /// Repairs of JSON that saved answers of this item.
    pub repairs: Vec<&'static str>,
    /// Reasons for which answers of this item were asked for once more.
    pub asked_again: Vec<&'static str>,
}

/// A row before it is filtered.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Draft {
    /// Columns of the row in its format.
    pub columns: Map<String, Value>,
    /// Text that must differ from that of other rows.
    pub question: String,
    /// Text that is learned.
    pub answer: String,
    /// Where the row comes from, beside its requests: seeds, a passage, an entity.
    pub origin: Map<String, Value>,
    /// Results of checks.
    pub checks: Map<String, Value>,
    /// Reason to remove the row that the method itself has found.
    pub flaw: Option<&'static str>,
    /// A row for the training of preferences: `prompt`, `chosen`, `rejected`.
    pub pair: Option<Value>,
    /// Key of the request whose answer holds the row, and the time of that answer.
    pub request: RequestOrigin,
}

/// The request that a row comes from.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct RequestOrigin {
    pub key: String,
    pub created: Option<u64>,
}

impl From<&ModelAnswer> for RequestOrigin {
    fn from(answer: &ModelAnswer) -> Self {
        Self { key: answer.key.clone(), created: answer.created }
    }
}

impl Draft {
    /// Creates a row of the format `qa`.
    pub(super) fn qa(question: &str, answer: &str, request: RequestOrigin) -> Self {
        let (question, answer) = (question.trim().to_owned(), answer.trim().to_owned());
        let mut columns = Map::new();
        columns.insert("question".to_owned(), question.as_str().into());
        columns.insert("answer".to_owned(), answer.as_str().into());
        Self { columns, question, answer, request, ..Self::default() }
    }

    /// Adds where the row comes from.
    pub(super) fn with_origin(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.origin.insert(name.to_owned(), value.into());
        self
    }

    /// Adds the result of a check.
    pub(super) fn with_check(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.checks.insert(name.to_owned(), value.into());
        self
    }
}

/// A text that gave no row.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RejectedText {
    pub reason: String,
    pub text: String,
}

impl ItemResult {
    /// Creates the result of an item that gave nothing.
    pub(super) fn rejected(reason: impl Into<String>, text: impl Into<String>) -> Self {
        let rejected = vec![RejectedText { reason: reason.into(), text: text.into() }];
        Self { rejected, ..Self::default() }
    }
}

impl From<Draft> for ItemResult {
    fn from(draft: Draft) -> Self {
        Self { drafts: vec![draft], ..Self::default() }
    }
}
