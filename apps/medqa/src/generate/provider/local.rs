//! A model in this process, which answers one request at a time: its answer then depends on the request alone.

use super::{
    super::{
        recipe::ResponseFormat,
        request::ModelRequest,
        retry::{Consequence, RequestFailure},
    },
    Provider,
};
use crate::model::{LoadedModel, apply_chat_template};
use anyhow::Result;
use burn_llama::{Generation, GenerationConfig, Message, Tokenizer, kernel::Kernels};
use serde_json::{Value, json};
use std::sync::{Mutex, PoisonError};

/// A loaded model. Its tokenizer is used without a lock.
pub(in super::super) struct LocalProvider<B: Kernels> {
    tokenizer: Tokenizer,
    model: Mutex<LoadedModel<B>>,
}

/// The new text of a generation.
struct GeneratedText {
    text: String,
    tokens: u64,
    finish_reason: &'static str,
}

impl<B: Kernels> LocalProvider<B> {
    /// Creates the provider of a model.
    pub(in super::super) fn new(loaded: LoadedModel<B>) -> Self {
        Self { tokenizer: loaded.tokenizer.clone(), model: Mutex::new(loaded) }
    }

    fn prompt(&self, request: &ModelRequest) -> Result<Vec<u32>> {
        let Some(messages) = request.messages() else {
            return Ok(self.tokenizer.encode(request.raw_prompt(), false)?);
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let messages: Vec<_> = messages.iter().map(|m| Message::new(text(&m["role"]), text(&m["content"]))).collect();
        apply_chat_template(&self.tokenizer, &messages)
    }

    fn generate(&self, request: &ModelRequest, prompt: Vec<u32>) -> Result<GeneratedText> {
        let loaded = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        let number = |name: &str, default: f64| request.number(name).unwrap_or(default);
        let settings = GenerationConfig {
            max_new_tokens: usize::try_from(request.max_tokens())?,
            temperature: number("temperature", 1.0),
            top_p: number("top_p", 1.0),
            seed: number("seed", 0.0) as u64,
            eos: loaded.tokenizer.eos_ids().to_vec(),
            ..GenerationConfig::default()
        };
        let stop = request.stop();
        let mut generation = Generation::new(&loaded.model, &[prompt], &settings)?;
        let (mut stream, mut text, mut tokens) = (loaded.tokenizer.stream(), String::new(), 0);
        while let Some(ids) = generation.advance()? {
            tokens += 1;
            let piece = ids.first().copied().flatten().map(|id| stream.push(id)).transpose()?.flatten();
            text.push_str(piece.as_deref().unwrap_or_default());
            if let Some(end) = stop.iter().filter_map(|stop| text.find(stop)).min() {
                text.truncate(end);
                return Ok(GeneratedText { text, tokens, finish_reason: "stop" });
            }
        }
        text.push_str(&stream.finish()?.unwrap_or_default());
        let finish_reason = if tokens >= request.max_tokens() { "length" } else { "stop" };
        Ok(GeneratedText { text, tokens, finish_reason })
    }
}

impl<B: Kernels> Provider for LocalProvider<B> {
    fn answer(&self, request: &ModelRequest, _format: ResponseFormat) -> Result<Value, RequestFailure> {
        // A prompt that is too long must not end the run.
        let give_up = |error: anyhow::Error| RequestFailure {
            consequence: Consequence::GiveUp,
            ..RequestFailure::without_response(format!("{error:#}"), false)
        };
        let prompt = self.prompt(request).map_err(give_up)?;
        let length = prompt.len();
        let GeneratedText { text, tokens, finish_reason } = self.generate(request, prompt).map_err(give_up)?;
        Ok(json!({
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}],
            "usage": {"prompt_tokens": length, "completion_tokens": tokens},
        }))
    }

    fn prompt_tokens(&self, request: &ModelRequest) -> u64 {
        self.prompt(request).map_or_else(|_| request.prompt_tokens(), |ids| ids.len() as u64)
    }

    fn is_local(&self) -> bool {
        true
    }
}
