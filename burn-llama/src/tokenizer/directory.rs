//! Loading the tokenizer of a Hugging Face directory, following the rules of `transformers` 5.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::normalizers::Replace;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper};

use super::sentencepiece::SPACE_SYMBOL;
use super::{Encoder, SpecialTokens, Tokenizer};
use crate::error::Error;

/// The keys of the named special tokens in a `tokenizer_config.json`.
const SPECIAL_TOKEN_KEYS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl Tokenizer {
    /// Reads `tokenizer.json` and, where present, `tokenizer_config.json`, `special_tokens_map.json`,
    /// `generation_config.json`, `config.json` and `chat_template.jinja`. Ids equal those of `AutoTokenizer` in
    /// `transformers` 5: the file's post-processor decides whether BOS and EOS are added; `add_bos_token` is ignored.
    /// For the class `GPT2Tokenizer`, which SmolLM2 names, ids follow the rules of `tokenizer.json`, as in
    /// `transformers` 4 and llama.cpp: version 5 replaces the file's rules by GPT-2's and so splits digits differently
    /// than in training.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if `tokenizer.json` is missing, [`Error::Tokenizer`] if it or a configuration is malformed,
    /// [`Error::Format`] if the chat template does not parse.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| Error::io(&path, source))?;
        let files = ConfigFiles::read(dir)?;
        let tokenizer = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|error| error.to_string())
            .and_then(|tokenizer| files.apply_config(tokenizer))
            .map_err(|message| Error::Tokenizer { path: path.clone(), message })?;
        let special = files.special_tokens(&tokenizer);
        let (place, template) = files.chat_template(dir)?;
        let chat_template = special.parse_chat_template(template.as_deref(), &place)?;
        Ok(Self::new(path, Encoder::Json(Box::new(tokenizer)), special, chat_template))
    }
}

/// The configuration files next to `tokenizer.json`; null for a missing file.
struct ConfigFiles {
    tokenizer: Value,
    special_tokens_map: Value,
    generation: Value,
    model: Value,
}

impl ConfigFiles {
    fn read(dir: &Path) -> Result<Self, Error> {
        let read = |name: &str| {
            let path = dir.join(name);
            let text = match std::fs::read(&path) {
                Ok(text) => text,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Value::Null),
                Err(error) => return Err(Error::io(&path, error)),
            };
            serde_json::from_slice(&text)
                .map_err(|error| Error::Tokenizer { path, message: format!("expected JSON, found: {error}") })
        };
        Ok(Self {
            tokenizer: read("tokenizer_config.json")?,
            special_tokens_map: read("special_tokens_map.json")?,
            generation: read("generation_config.json")?,
            model: read("config.json")?,
        })
    }

    /// Returns a named special token; `tokenizer_config.json` takes precedence over `special_tokens_map.json`.
    fn named_token(&self, name: &str) -> Option<&str> {
        token_text(&self.tokenizer[name]).or_else(|| token_text(&self.special_tokens_map[name]))
    }

    /// Applies the configuration files to the tokenizer read from `tokenizer.json`.
    fn apply_config(&self, mut tokenizer: tokenizers::Tokenizer) -> Result<tokenizers::Tokenizer, String> {
        let fail = |error: tokenizers::Error| error.to_string();
        // `tokenizer(text)` neither truncates nor pads.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(fail)?;
        if self.is_llama_class(&tokenizer) {
            self.apply_llama_rules(&mut tokenizer)?;
        }
        self.add_tokens(&mut tokenizer)?;
        Ok(tokenizer)
    }

    /// Returns whether `transformers` would build its own `LlamaTokenizer` from the vocabulary and ignore the file's
    /// rules. It does so for that class, unless the file is byte-level or the model type is not `llama`.
    fn is_llama_class(&self, tokenizer: &tokenizers::Tokenizer) -> bool {
        let class = self.tokenizer["tokenizer_class"].as_str().or_else(|| self.model["tokenizer_class"].as_str());
        let named = class.is_some_and(|class| class.trim_end_matches("Fast") == "LlamaTokenizer");
        let model = self.model["model_type"].as_str();
        let parts = serde_json::to_string(&(tokenizer.get_pre_tokenizer(), tokenizer.get_decoder()));
        let byte_level = parts.is_ok_and(|parts| parts.contains("\"ByteLevel\""));
        named && !byte_level && matches!(model, None | Some("llama"))
    }

    /// Replaces the file's rules by those of `LlamaTokenizer`: no normalizer, spaces written as `▁`, one space added at
    /// the start of the text (and after every special token if `legacy`), byte tokens for text that is not in the
    /// vocabulary.
    fn apply_llama_rules(&self, tokenizer: &mut tokenizers::Tokenizer) -> Result<(), String> {
        let fail = |error: tokenizers::Error| error.to_string();
        let prefixed = self.tokenizer["add_prefix_space"].as_bool().unwrap_or(true);
        let legacy = self.tokenizer["legacy"].as_bool().unwrap_or(false);
        let scheme = match (prefixed, legacy) {
            (false, _) => PrependScheme::Never,
            (true, true) => PrependScheme::Always,
            (true, false) => PrependScheme::First,
        };
        tokenizer.with_normalizer(None::<NormalizerWrapper>).map_err(fail)?;
        tokenizer.with_pre_tokenizer(Some(Metaspace::new(SPACE_SYMBOL, scheme, false)));
        let replace = Replace::new(SPACE_SYMBOL.to_string(), " ").map_err(fail)?;
        let mut decoders: Vec<DecoderWrapper> = vec![replace.into(), ByteFallback::new().into(), Fuse::new().into()];
        if prefixed {
            decoders.push(Strip::new(' ', 1, 0).into());
        }
        tokenizer.with_decoder(Some(DecoderSequence::new(decoders)));
        if let ModelWrapper::BPE(model) = tokenizer.get_model() {
            let mut model = model.clone();
            model.byte_fallback = true;
            model.fuse_unk = true;
            tokenizer.with_model(model);
        }
        Ok(())
    }

    /// Adds the tokens that are only in the configuration; the named ones become special tokens.
    fn add_tokens(&self, tokenizer: &mut tokenizers::Tokenizer) -> Result<(), String> {
        let known = |tokenizer: &tokenizers::Tokenizer, token: &str| {
            tokenizer.get_added_tokens_decoder().values().any(|added| added.content == token)
        };
        let mut listed: Vec<(u32, AddedToken)> = Vec::new();
        for (id, token) in self.tokenizer["added_tokens_decoder"].as_object().into_iter().flatten() {
            let id = id.parse().map_err(|_| format!("added_tokens_decoder: expected an id, found {id:?}"))?;
            listed.extend(added_token(token).map(|token| (id, token)));
        }
        listed.sort_by_key(|(id, _)| *id);
        let named = SPECIAL_TOKEN_KEYS.iter().filter_map(|name| self.named_token(name));
        let more = ["additional_special_tokens", "extra_special_tokens"].map(|name| self.tokenizer[name].as_array());
        let more = more.into_iter().flatten().flatten().filter_map(token_text);
        let special = named.chain(more).map(|token| AddedToken::from(token, true));
        for token in listed.into_iter().map(|(_, token)| token).chain(special) {
            if !known(tokenizer, &token.content) {
                tokenizer.add_tokens([token]).map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    /// Returns the special tokens and stop ids that the files name.
    fn special_tokens(&self, tokenizer: &tokenizers::Tokenizer) -> SpecialTokens {
        let named = |name| self.named_token(name).and_then(|token| tokenizer.token_to_id(token));
        let listed = |config: &Value, name: &str| -> Vec<u32> {
            let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
            match &config[name] {
                Value::Array(ids) => ids.iter().filter_map(id).collect(),
                value => id(value).into_iter().collect(),
            }
        };
        let either = |name: &str| {
            let ids = listed(&self.generation, name);
            if ids.is_empty() { listed(&self.model, name) } else { ids }
        };
        let stop = either("eos_token_id");
        let bos = named("bos_token").or(either("bos_token_id").first().copied());
        let eos = named("eos_token").or(stop.first().copied());
        let token = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
        let pad = named("pad_token").or(either("pad_token_id").first().copied());
        let others = SPECIAL_TOKEN_KEYS.into_iter().filter(|name| !["bos_token", "eos_token"].contains(name));
        let others = others.filter_map(|name| Some((name, self.named_token(name)?.to_owned()))).collect();
        SpecialTokens { bos, eos, pad, bos_token: token(bos), eos_token: token(eos), others, stop_ids: Vec::new() }
            .with_stop_ids(stop)
    }

    /// Returns the chat template and the path of its file: `chat_template.jinja` if it exists, else the template in
    /// `tokenizer_config.json`; if there are several, the one named `default`.
    fn chat_template(&self, dir: &Path) -> Result<(PathBuf, Option<String>), Error> {
        let path = dir.join("chat_template.jinja");
        match std::fs::read_to_string(&path) {
            Ok(source) => return Ok((path, Some(source))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(&path, error)),
        }
        let template = &self.tokenizer["chat_template"];
        let default = template.as_array().into_iter().flatten().find(|named| named["name"] == "default");
        let template = default.map_or(template, |named| &named["template"]).as_str().map(str::to_owned);
        Ok((dir.join("tokenizer_config.json"), template))
    }
}

/// Returns the text of a token, which is written as a string or as an object with `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// Parses an entry of `added_tokens_decoder`.
fn added_token(value: &Value) -> Option<AddedToken> {
    let flag = |name: &str, default| value[name].as_bool().unwrap_or(default);
    let special = flag("special", false);
    Some(
        AddedToken::from(token_text(value)?, special)
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !special)),
    )
}
