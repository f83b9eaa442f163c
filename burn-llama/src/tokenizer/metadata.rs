//! Reading token types, scores and stop tokens from the metadata of a GGUF file.

use crate::checkpoint::gguf::{Gguf, MetadataArray, MetadataValue};
use crate::error::Error;

/// Tokens whose text alone makes llama.cpp treat them as the end of a generation.
const STOP_TOKENS: [&str; 22] = [
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

/// Fill-in-the-middle tokens that also end a generation: padding, repository, file.
const FIM_STOP_TOKENS: [&str; 11] = [
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

// The numbers of `tokenizer.ggml.token_type`.
pub(super) const NORMAL: i64 = 1;
pub(super) const UNKNOWN: i64 = 2;
pub(super) const CONTROL: i64 = 3;
pub(super) const USER_DEFINED: i64 = 4;
pub(super) const UNUSED: i64 = 5;
pub(super) const BYTE: i64 = 6;

/// The type of a token, from `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenType {
    /// Ordinary text.
    Normal,
    /// Special token: matched in the text before anything else, and not printed if special tokens are skipped.
    Control,
    /// Matched in the text like a special token, but always printed.
    UserDefined,
    /// A single byte, for text that no other token covers.
    Byte,
    /// Never produced and never printed.
    Unused,
}

/// Returns the tokens that end a generation by their text.
pub(super) fn stop_tokens() -> impl Iterator<Item = &'static str> {
    STOP_TOKENS.into_iter().chain(FIM_STOP_TOKENS)
}

/// Builds a tokenizer error that names the GGUF file.
pub(super) fn tokenizer_error(gguf: &Gguf, message: String) -> Error {
    Error::Tokenizer { path: gguf.path().to_owned(), message }
}

/// Returns a metadata array of strings.
pub(super) fn strings(gguf: &Gguf, key: &str) -> Result<Vec<String>, Error> {
    match gguf.metadata(key) {
        Some(MetadataValue::Array(MetadataArray::String(texts))) => Ok(texts.clone()),
        other => {
            let found = other.map_or("nothing".to_owned(), MetadataValue::describe);
            Err(tokenizer_error(gguf, format!("{key}: expected an array of strings, found {found}")))
        }
    }
}

/// Returns the score of every token; all zero if the file has no scores.
pub(super) fn scores(gguf: &Gguf, tokens: usize) -> Result<Vec<f32>, Error> {
    let key = "tokenizer.ggml.scores";
    let scores: Vec<f32> = match gguf.metadata(key) {
        None => vec![0.0; tokens],
        Some(MetadataValue::Array(MetadataArray::Float(scores))) => scores.iter().map(|score| *score as f32).collect(),
        Some(MetadataValue::Array(MetadataArray::Signed(scores))) => scores.iter().map(|score| *score as f32).collect(),
        Some(other) => {
            return Err(tokenizer_error(
                gguf,
                format!("{key}: expected an array of floats, found {}", other.describe()),
            ));
        }
    };
    if scores.len() < tokens {
        return Err(tokenizer_error(
            gguf,
            format!("{key}: expected a score for each of {tokens} tokens, found {}", scores.len()),
        ));
    }
    Ok(scores)
}

/// Returns the type of every token. Tokens that end a generation are control tokens, whatever type the file gives them.
pub(super) fn token_types(gguf: &Gguf, tokens: &[String]) -> Result<Vec<TokenType>, Error> {
    let key = "tokenizer.ggml.token_type";
    let numbers: Vec<i64> = match gguf.metadata(key) {
        None => vec![NORMAL; tokens.len()],
        Some(MetadataValue::Array(MetadataArray::Signed(numbers))) => numbers.clone(),
        Some(MetadataValue::Array(MetadataArray::Unsigned(numbers))) => {
            numbers.iter().map(|number| i64::try_from(*number).unwrap_or(0)).collect()
        }
        Some(other) => {
            return Err(tokenizer_error(
                gguf,
                format!("{key}: expected an array of integers, found {}", other.describe()),
            ));
        }
    };
    if numbers.len() < tokens.len() {
        let message = format!("{key}: expected a type for each of {} tokens, found {}", tokens.len(), numbers.len());
        return Err(tokenizer_error(gguf, message));
    }
    let kind = |(token, number): (&String, &i64)| {
        if stop_tokens().any(|stop| stop == token) {
            return TokenType::Control;
        }
        match *number {
            NORMAL => TokenType::Normal,
            UNKNOWN | CONTROL => TokenType::Control,
            USER_DEFINED => TokenType::UserDefined,
            BYTE => TokenType::Byte,
            _ => TokenType::Unused,
        }
    };
    Ok(tokens.iter().zip(&numbers).map(kind).collect())
}
