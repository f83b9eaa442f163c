//! What the metadata of a GGUF file says about its tokens.

use crate::checkpoint::gguf::{Array, Gguf, Value};
use crate::error::Error;

/// Tokens that llama.cpp takes for the end of a generation by their text.
const STOP: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// Fill-in-the-middle tokens that end a generation as well: padding, repository, file.
const FILL_STOP: [&str; 11] = [
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
];

/// What a token is; the numbers are those of `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Text.
    Normal,
    /// Special: parsed out of the text before anything else, and not printed where special tokens are skipped.
    Control,
    /// Parsed out of the text like a special token, but printed.
    UserDefined,
    /// A byte that no other token covers.
    Byte,
    /// Never produced, never printed.
    Unused,
}

/// Tokens that end a generation.
pub(super) fn stop_tokens() -> impl Iterator<Item = &'static str> {
    STOP.into_iter().chain(FILL_STOP)
}

/// An error of the tokenizer in a file.
pub(super) fn fault(gguf: &Gguf, message: String) -> Error {
    Error::Tokenizer { path: gguf.path().to_owned(), message }
}

/// A metadata array of texts.
pub(super) fn strings(gguf: &Gguf, key: &str) -> Result<Vec<String>, Error> {
    match gguf.metadata(key) {
        Some(Value::Array(Array::String(texts))) => Ok(texts.clone()),
        other => {
            let found = other.map_or("nothing".to_owned(), Value::describe);
            Err(fault(gguf, format!("{key}: expected an array of strings, found {found}")))
        }
    }
}

/// The score of every token; zero for all where the file has none.
pub(super) fn scores(gguf: &Gguf, tokens: usize) -> Result<Vec<f32>, Error> {
    let key = "tokenizer.ggml.scores";
    let scores: Vec<f32> = match gguf.metadata(key) {
        None => vec![0.0; tokens],
        Some(Value::Array(Array::Float(scores))) => scores.iter().map(|score| *score as f32).collect(),
        Some(Value::Array(Array::Signed(scores))) => scores.iter().map(|score| *score as f32).collect(),
        Some(other) => {
            return Err(fault(gguf, format!("{key}: expected an array of floats, found {}", other.describe())));
        }
    };
    if scores.len() < tokens {
        return Err(fault(
            gguf,
            format!("{key}: expected a score for each of {tokens} tokens, found {}", scores.len()),
        ));
    }
    Ok(scores)
}

/// What every token is. Tokens that end a generation are control tokens whatever the file calls them.
pub(super) fn kinds(gguf: &Gguf, tokens: &[String]) -> Result<Vec<Kind>, Error> {
    let key = "tokenizer.ggml.token_type";
    let numbers: Vec<i64> = match gguf.metadata(key) {
        None => vec![1; tokens.len()],
        Some(Value::Array(Array::Signed(numbers))) => numbers.clone(),
        Some(Value::Array(Array::Unsigned(numbers))) => {
            numbers.iter().map(|number| i64::try_from(*number).unwrap_or(0)).collect()
        }
        Some(other) => {
            return Err(fault(gguf, format!("{key}: expected an array of integers, found {}", other.describe())));
        }
    };
    if numbers.len() < tokens.len() {
        let message = format!("{key}: expected a type for each of {} tokens, found {}", tokens.len(), numbers.len());
        return Err(fault(gguf, message));
    }
    let kind = |(token, number): (&String, &i64)| {
        if stop_tokens().any(|stop| stop == token) {
            return Kind::Control;
        }
        match number {
            1 => Kind::Normal,
            2 | 3 => Kind::Control,
            4 => Kind::UserDefined,
            6 => Kind::Byte,
            _ => Kind::Unused,
        }
    };
    Ok(tokens.iter().zip(&numbers).map(kind).collect())
}
