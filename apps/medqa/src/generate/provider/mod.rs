//! Providers of answers: an OpenAI-compatible API, or a model in this process.

mod api;
mod local;

pub(super) use api::ApiProvider;
pub(super) use local::LocalProvider;

use super::{
    recipe::ResponseFormat,
    request::{ModelRequest, estimate_tokens},
    retry::RequestFailure,
};
use serde_json::Value;

/// A place that answers requests.
pub(super) trait Provider: Sync {
    /// Answers one request with a response body in the form of OpenAI's API.
    ///
    /// # Errors
    /// Returns the failure, and what follows from it.
    fn answer(&self, request: &ModelRequest, format: ResponseFormat) -> Result<Value, RequestFailure>;

    /// Counts the tokens of a prompt, at least as many as there are if possible.
    fn prompt_tokens(&self, request: &ModelRequest) -> u64 {
        request.prompt_tokens()
    }

    /// Counts the tokens of an answer that came without a count.
    fn answer_tokens(&self, text: &str) -> u64 {
        estimate_tokens(text)
    }

    /// Returns whether the answers are computed in this process, one at a time.
    fn is_local(&self) -> bool {
        false
    }
}
