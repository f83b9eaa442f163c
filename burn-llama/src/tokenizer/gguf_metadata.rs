//! Export of a tokenizer as the `tokenizer.*` metadata of a GGUF file.

use std::collections::HashMap;

use serde_json::Value as Json;

use super::metadata::{BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, stop_tokens};
use super::pre_tokenizer::PreTokenizerRules;
use super::sentencepiece::SPACE_SYMBOL;
use super::{Encoder, SpecialTokens, Tokenizer};
use crate::checkpoint::gguf::{Gguf, MetadataArray, MetadataValue, write::Metadata};
use crate::error::Error;

/// The score of tokens that no merge produces: lower than every other.
const UNMERGED_SCORE: f64 = -1e6;

impl Tokenizer {
    /// Returns the tokenizer as the `tokenizer.*` metadata of a GGUF file, for a model whose embedding has `rows` rows.
    /// The metadata is copied if the tokenizer came from a GGUF file, else derived. Rows without a token get an unused
    /// token.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] if there are more tokens than rows, or if llama.cpp has no equivalent of the tokenizer's
    /// pre-tokenizer, normalizer or model.
    pub fn gguf_metadata(&self, rows: usize) -> Result<Metadata, Error> {
        let metadata = match &self.encoder {
            Encoder::Gguf(_) => copy_metadata(&Gguf::open(&self.path)?, rows).map(|mut metadata| {
                self.replace_chat_metadata(&mut metadata);
                metadata
            }),
            Encoder::Json(tokenizer) => derive_metadata(self, tokenizer, rows),
        };
        metadata.map_err(|message| self.error(message))
    }

    /// Replaces the chat template of a copied file, and its end-of-turn token, if they are others here.
    fn replace_chat_metadata(&self, metadata: &mut Metadata) {
        let template = self.chat_template().filter(|_| self.template_replaced);
        let template = template.map(|template| MetadataValue::String(template.source().to_owned()));
        let end = self.end_of_turn().filter(|id| !self.listed_stop_ids.contains(id));
        let end = end.map(|id| MetadataValue::Unsigned(u64::from(id)));
        for (key, value) in [("tokenizer.chat_template", template), ("tokenizer.ggml.eot_token_id", end)] {
            if let Some(value) = value {
                metadata.retain(|(other, _)| other != key);
                metadata.push((key.to_owned(), value));
            }
        }
    }
}

/// Copies the file's own metadata, with llama.cpp's value types, padded for an embedding of `rows` rows.
fn copy_metadata(gguf: &Gguf, rows: usize) -> Result<Metadata, String> {
    let own = gguf.all_metadata().filter(|(key, _)| key.starts_with("tokenizer."));
    let mut metadata: Metadata = own.map(|(key, value)| (key.to_owned(), value.clone())).collect();
    for (key, value) in &mut metadata {
        match (key.as_str(), value) {
            ("tokenizer.ggml.tokens", MetadataValue::Array(MetadataArray::String(tokens))) => {
                pad_vocabulary(tokens, rows)?
            }
            ("tokenizer.ggml.token_type", MetadataValue::Array(array)) => {
                if let MetadataArray::Unsigned(kinds) = array {
                    *array = MetadataArray::Signed(
                        kinds.iter().map(|kind| i64::try_from(*kind).unwrap_or(NORMAL)).collect(),
                    );
                }
                if let MetadataArray::Signed(kinds) = array {
                    kinds.resize(rows, UNUSED);
                }
            }
            ("tokenizer.ggml.scores", MetadataValue::Array(MetadataArray::Float(scores))) => {
                scores.resize(rows, UNMERGED_SCORE)
            }
            _ => {}
        }
    }
    Ok(metadata)
}

/// Appends unused tokens until every row of the embedding has a token.
fn pad_vocabulary(tokens: &mut Vec<String>, rows: usize) -> Result<(), String> {
    if tokens.len() > rows {
        let found = tokens.len();
        return Err(format!("expected at most one token per row of the embedding, {rows}, found {found} tokens"));
    }
    tokens.extend((tokens.len()..rows).map(|id| format!("[PAD{id}]")));
    Ok(())
}

/// Derives the metadata from the rules of a `tokenizer.json`.
fn derive_metadata(tokenizer: &Tokenizer, rules: &tokenizers::Tokenizer, rows: usize) -> Result<Metadata, String> {
    let json = |part: serde_json::Result<Json>| part.map_err(|error| error.to_string());
    let model = json(serde_json::to_value(rules.get_model()))?;
    let pre_tokenizer = json(serde_json::to_value(rules.get_pre_tokenizer()))?;
    if model["type"] != "BPE" {
        return Err(format!("model: expected BPE, the only type that can be written as GGUF, found {}", model["type"]));
    }
    let byte_level = pre_tokenizer.to_string().contains("\"ByteLevel\"");
    let (mut tokens, kinds) = tokens_and_types(rules, model["unk_token"].as_str(), !byte_level);
    pad_vocabulary(&mut tokens, rows)?;
    let mut metadata = Vec::new();
    let mut set = |key: &str, value: MetadataValue| metadata.push((format!("tokenizer.{key}"), value));
    if byte_level {
        let normalizer = json(serde_json::to_value(rules.get_normalizer()))?;
        // llama.cpp does not normalize. NFC leaves ordinary text unchanged, as it is composed already; other rules do
        // not.
        if !normalizer.is_null() && normalizer["type"] != "NFC" {
            return Err(format!("normalizer: expected none or NFC, found {normalizer}"));
        }
        set("ggml.model", MetadataValue::String("gpt2".to_owned()));
        let pre = PreTokenizerRules::name_of(&pre_tokenizer, model["ignore_merges"] == true)?;
        set("ggml.pre", MetadataValue::String(pre.to_owned()));
        let merges = merges(&model).map(|(left, right)| format!("{left} {right}")).collect();
        set("ggml.merges", MetadataValue::Array(MetadataArray::String(merges)));
    } else if model["byte_fallback"] == true {
        set("ggml.model", MetadataValue::String("llama".to_owned()));
        set("ggml.pre", MetadataValue::String("default".to_owned()));
        set("ggml.scores", MetadataValue::Array(MetadataArray::Float(scores(&model, &tokens))));
        set("ggml.add_space_prefix", MetadataValue::Bool(adds_space_prefix(tokenizer)?));
    } else {
        return Err("expected byte-level BPE, or BPE with byte_fallback, found neither".to_owned());
    }
    set("ggml.tokens", MetadataValue::Array(MetadataArray::String(tokens)));
    let kinds = kinds.into_iter().chain(std::iter::repeat(UNUSED)).take(rows).collect();
    set("ggml.token_type", MetadataValue::Array(MetadataArray::Signed(kinds)));
    let unknown = model["unk_token"].as_str().and_then(|token| rules.token_to_id(token));
    metadata.extend(special_metadata(tokenizer, unknown)?);
    Ok(metadata)
}

/// Returns the tokens and their types by id. Gaps in the ids become unused tokens.
fn tokens_and_types(rules: &tokenizers::Tokenizer, unknown: Option<&str>, bytes: bool) -> (Vec<String>, Vec<i64>) {
    let (ids, added) = (rules.get_vocab(true), rules.get_added_tokens_decoder());
    let len = ids.values().max().map_or(0, |last| *last as usize + 1);
    let mut tokens: Vec<String> = (0..len).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![UNUSED; len];
    for (token, id) in ids {
        let byte = bytes && token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
        kinds[id as usize] = match added.get(&id) {
            _ if bytes && unknown == Some(token.as_str()) => UNKNOWN,
            Some(added) if added.special => CONTROL,
            Some(_) => USER_DEFINED,
            None if byte => BYTE,
            None => NORMAL,
        };
        tokens[id as usize] = token;
    }
    (tokens, kinds)
}

/// Returns the merges of a BPE model, best first.
fn merges(model: &Json) -> impl Iterator<Item = (&str, &str)> {
    model["merges"].as_array().into_iter().flatten().filter_map(|pair| Some((pair[0].as_str()?, pair[1].as_str()?)))
}

/// Derives SentencePiece scores from the order of the merges, which is all that a `tokenizer.json` stores: a token's
/// score is given by the first merge that produces it.
fn scores(model: &Json, tokens: &[String]) -> Vec<f64> {
    let mut made = HashMap::new();
    for (left, right) in merges(model) {
        let next = -(made.len() as f64);
        made.entry(format!("{left}{right}")).or_insert(next);
    }
    tokens.iter().map(|token| made.get(token).copied().unwrap_or(UNMERGED_SCORE)).collect()
}

/// Returns whether the tokenizer adds a space at the start of a text.
fn adds_space_prefix(tokenizer: &Tokenizer) -> Result<bool, String> {
    let ids = tokenizer.encode("a", false).map_err(|error| error.to_string())?;
    Ok(ids.first().and_then(|id| tokenizer.id_to_token(*id)).is_some_and(|token| token.starts_with(SPACE_SYMBOL)))
}

/// Returns the metadata of the special tokens, of the BOS and EOS rules, and of the chat template.
fn special_metadata(tokenizer: &Tokenizer, unknown: Option<u32>) -> Result<Metadata, String> {
    let SpecialTokens { bos, eos, pad, stop_ids, .. } = &tokenizer.special;
    // llama.cpp recognizes most stop tokens by their text; for others it has two more keys, `eot` and `eom`.
    let known = |id: &u32| tokenizer.id_to_token(*id).is_some_and(|token| stop_tokens().any(|stop| stop == token));
    let end_of_turn = tokenizer.end_of_turn().filter(|id| Some(*id) != *eos);
    let mut more = stop_ids.iter().copied().filter(|id| Some(*id) != *eos && Some(*id) != end_of_turn && !known(id));
    let ids = [
        ("bos", *bos),
        ("eos", *eos),
        ("padding", *pad),
        ("unknown", unknown),
        ("eot", end_of_turn.or_else(|| more.next())),
        ("eom", more.next()),
    ];
    let id = |(name, id): (&str, Option<u32>)| {
        Some((format!("tokenizer.ggml.{name}_token_id"), MetadataValue::Unsigned(u64::from(id?))))
    };
    let mut metadata: Metadata = ids.into_iter().filter_map(id).collect();
    let (add_bos, add_eos) = adds_bos_and_eos(tokenizer)?;
    metadata.push(("tokenizer.ggml.add_bos_token".to_owned(), MetadataValue::Bool(add_bos)));
    metadata.push(("tokenizer.ggml.add_eos_token".to_owned(), MetadataValue::Bool(add_eos)));
    if let Some(template) = tokenizer.chat_template() {
        metadata.push(("tokenizer.chat_template".to_owned(), MetadataValue::String(template.source().to_owned())));
    }
    Ok(metadata)
}

/// Returns whether the tokenizer adds BOS before a text and EOS after it.
fn adds_bos_and_eos(tokenizer: &Tokenizer) -> Result<(bool, bool), String> {
    let encode = |add| tokenizer.encode("a", add).map_err(|error| error.to_string());
    let (plain, whole) = (encode(false)?, encode(true)?);
    let (bos, eos) = (tokenizer.bos(), tokenizer.eos());
    for (add_bos, add_eos) in [(false, false), (true, false), (false, true), (true, true)] {
        let before = bos.filter(|_| add_bos);
        let expected: Vec<u32> = before.into_iter().chain(plain.clone()).chain(eos.filter(|_| add_eos)).collect();
        if expected == whole {
            return Ok((add_bos, add_eos));
        }
    }
    Err(format!("post-processor: expected at most BOS before a text and EOS after it, found {whole:?} for {plain:?}"))
}
