//! Tokens that fine-tuning adds to a tokenizer.

use super::{Encoder, Tokenizer};
use crate::Error;
use serde_json::{Value, json};
use tokenizers::AddedToken;

impl Tokenizer {
    /// Adds tokens, which get the next ids in turn: a text in which one of them is written out has its id there, as
    /// after `add_tokens` in `transformers`. They are no control tokens: decoding keeps them. Returns their ids.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] if a token is known already, or the tokenizer comes from a GGUF file.
    pub fn add_tokens(&mut self, tokens: &[String]) -> Result<Vec<u32>, Error> {
        if tokens.is_empty() {
            return Ok(Vec::new());
        }
        if let Some(known) = tokens.iter().find(|token| self.token_to_id(token).is_some()) {
            return Err(self.error(format!("expected new tokens, found {known:?}, which it has already")));
        }
        let Encoder::Json(tokenizer) = &mut self.encoder else {
            let found = "found that of a GGUF file; load the model from its Hugging Face directory";
            return Err(self.error(format!("expected a tokenizer.json, to which tokens can be added, {found}")));
        };
        let new = tokens.iter().map(|token| AddedToken::from(token.as_str(), false));
        tokenizer
            .add_tokens(new.collect::<Vec<_>>())
            .map_err(|error| Error::Tokenizer { path: self.path.clone(), message: error.to_string() })?;
        self.added.extend(tokens.iter().cloned());
        let id = |token: &String| {
            self.token_to_id(token).ok_or_else(|| self.error(format!("the token {token:?} could not be added")))
        };
        tokens.iter().map(id).collect()
    }

    /// Returns the content of a `tokenizer.json` with the added tokens.
    pub(super) fn with_added_tokens(&self, content: &[u8]) -> Result<Vec<u8>, Error> {
        let mut json: Value = serde_json::from_slice(content).map_err(|error| self.error(error.to_string()))?;
        let Some(list) = json["added_tokens"].as_array_mut() else {
            return Err(self.error("expected a list of `added_tokens`, found none".to_owned()));
        };
        list.extend(self.added.iter().map(|token| {
            json!({
                "id": self.token_to_id(token), "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": true, "special": false,
            })
        }));
        Ok(format!("{json:#}\n").into_bytes())
    }
}
