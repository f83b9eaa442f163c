//! The tokenizer of a GGUF file: its tokens with their types, and the encoding and decoding of text.

use std::borrow::Cow;
use std::collections::HashMap;

use super::SpecialTokens;
use super::bpe;
use super::metadata::{TokenType, scores, stop_tokens, strings, token_types, tokenizer_error};
use super::pre_tokenizer::PreTokenizerRules;
use super::sentencepiece::{self, SPACE_SYMBOL};
use crate::checkpoint::gguf::{Gguf, MetadataValue};
use crate::error::Error;

/// The model that encodes text between special tokens.
#[derive(Debug, Clone)]
pub(super) enum TokenizerModel {
    /// Byte-level BPE.
    Bpe(Box<tokenizers::Tokenizer>),
    /// SentencePiece BPE: the score of every token by id, and whether a space is added before a text.
    SentencePiece { scores: Vec<f32>, add_space_prefix: bool },
}

impl TokenizerModel {
    /// Reads the model of a vocabulary; also returns whether it adds BOS unless the file says otherwise.
    fn read(gguf: &Gguf, tokens: &[String]) -> Result<(Self, bool), Error> {
        match gguf.text("tokenizer.ggml.model")?.unwrap_or("none") {
            "gpt2" => {
                let pre = gguf.text("tokenizer.ggml.pre")?.filter(|pre| !pre.is_empty()).unwrap_or("default");
                let rules = PreTokenizerRules::from_name(pre).ok_or_else(|| {
                    let names = PreTokenizerRules::supported();
                    tokenizer_error(gguf, format!("tokenizer.ggml.pre: expected one of {names}, found {pre:?}"))
                })?;
                let merges = strings(gguf, "tokenizer.ggml.merges")?;
                let tokenizer =
                    rules.build_tokenizer(tokens, &merges).map_err(|message| tokenizer_error(gguf, message))?;
                Ok((Self::Bpe(Box::new(tokenizer)), rules.add_bos))
            }
            "llama" => {
                let key = "tokenizer.ggml.add_space_prefix";
                let add_space_prefix = gguf.typed(key, "a boolean", MetadataValue::as_bool)?.unwrap_or(true);
                Ok((Self::SentencePiece { scores: scores(gguf, tokens.len())?, add_space_prefix }, true))
            }
            other => {
                let message = format!("tokenizer.ggml.model: expected gpt2 or llama, found {other:?}");
                Err(tokenizer_error(gguf, message))
            }
        }
    }
}

/// The vocabulary of a GGUF file.
#[derive(Debug, Clone)]
pub(super) struct Vocabulary {
    pub tokens: Vec<String>,
    pub ids: HashMap<String, u32>,
    pub token_types: Vec<TokenType>,
    /// Ids of the tokens that are matched in the raw text (control and user-defined), longest tokens first.
    special_ids: Vec<u32>,
    pub model: TokenizerModel,
    /// The id for text that has no token.
    pub unknown: Option<u32>,
    pub added: AddedTokens,
}

/// The tokens that `add_special_tokens` adds to a text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct AddedTokens {
    /// The token before the text.
    pub bos: Option<u32>,
    /// The token after the text.
    pub eos: Option<u32>,
}

/// A fragment of a text: either plain text or a special token found in it.
enum TextFragment<'t> {
    Text(&'t str),
    Token(u32),
}

impl Vocabulary {
    /// Reads the tokens, their types and the rules from the metadata.
    pub(super) fn read(gguf: &Gguf) -> Result<Self, Error> {
        let tokens = strings(gguf, "tokenizer.ggml.tokens")?;
        let mut ids = HashMap::with_capacity(tokens.len());
        for (token, id) in tokens.iter().zip(0..) {
            if let Some(first) = ids.insert(token.clone(), id) {
                return Err(tokenizer_error(
                    gguf,
                    format!("token {token:?} has two ids, {first} and {id}; expected one"),
                ));
            }
        }
        let kinds = token_types(gguf, &tokens)?;
        let (model, add_bos) = TokenizerModel::read(gguf, &tokens)?;
        let searched = |id: &u32| matches!(kinds[*id as usize], TokenType::Control | TokenType::UserDefined);
        let mut parsed: Vec<u32> = ids.values().copied().filter(searched).collect();
        parsed.sort_by_key(|id| (std::cmp::Reverse(tokens[*id as usize].len()), *id));
        parsed.retain(|id| !tokens[*id as usize].is_empty());
        let flag = |name: &str, default: bool| {
            let key = format!("tokenizer.ggml.add_{name}_token");
            Ok::<_, Error>(gguf.typed(&key, "a boolean", MetadataValue::as_bool)?.unwrap_or(default))
        };
        let (add_bos, add_eos) = (flag("bos", add_bos)?, flag("eos", false)?);
        let mut vocabulary = Self {
            tokens,
            ids,
            token_types: kinds,
            special_ids: parsed,
            model,
            unknown: None,
            added: AddedTokens::default(),
        };
        vocabulary.unknown = vocabulary.named_id(gguf, "unknown", 0)?;
        let special = vocabulary.special_tokens(gguf)?;
        vocabulary.added = AddedTokens { bos: special.bos.filter(|_| add_bos), eos: special.eos.filter(|_| add_eos) };
        Ok(vocabulary)
    }

    /// Returns the special tokens that the file names and the stop tokens that llama.cpp recognizes by their text.
    pub(super) fn special_tokens(&self, gguf: &Gguf) -> Result<SpecialTokens, Error> {
        let named = |name: &str| self.named_id(gguf, name, u32::MAX);
        let (bos, eos) = (self.named_id(gguf, "bos", 1)?, self.named_id(gguf, "eos", 2)?);
        let token = |id: Option<u32>| id.and_then(|id| self.token(id)).map(str::to_owned);
        let (bos_token, eos_token) = (token(bos), token(eos));
        let special = SpecialTokens {
            bos,
            eos,
            pad: named("padding")?,
            bos_token,
            eos_token,
            others: Vec::new(),
            stop_ids: Vec::new(),
        };
        let by_key = ["eot", "eom", "fim_pad", "fim_rep", "fim_sep"].map(named);
        let mut stop: Vec<u32> = stop_tokens().filter_map(|token| self.id(token)).collect();
        for id in by_key {
            stop.extend(id?);
        }
        Ok(special.with_stop_ids(stop))
    }

    /// Returns the id of a special token that the file names. If the file names none, a SentencePiece model uses the
    /// `usual` id, because SentencePiece vocabularies have their special tokens at fixed ids.
    fn named_id(&self, gguf: &Gguf, name: &str, usual: u32) -> Result<Option<u32>, Error> {
        let id = gguf.integer(&format!("tokenizer.ggml.{name}_token_id"))?;
        let id = id.filter(|id| *id < self.len()).map(|id| id as u32);
        let placed = matches!(self.model, TokenizerModel::SentencePiece { .. }) && (usual as usize) < self.len();
        Ok(id.or(placed.then_some(usual)))
    }

    /// Returns the number of tokens.
    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Returns the id of a token.
    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// Returns the token of an id.
    pub(super) fn token(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(String::as_str)
    }

    /// Returns the ids of the tokens that are matched in the raw text.
    pub(super) fn matched_ids(&self) -> impl Iterator<Item = u32> {
        self.special_ids.iter().copied()
    }

    /// Encodes a text to ids.
    pub(super) fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        self.encode_pieces(text, add_special_tokens, str::to_owned)
    }

    /// Encodes a text to ids, with `rewrite` applied to each piece of it between special tokens.
    pub(super) fn encode_pieces(
        &self,
        text: &str,
        add_special_tokens: bool,
        rewrite: impl Fn(&str) -> String,
    ) -> Result<Vec<u32>, String> {
        let mut ids = Vec::new();
        ids.extend(self.added.bos.filter(|_| add_special_tokens));
        // A space prefix is added before the first fragment and before every text fragment after a special token.
        let mut after_special = true;
        for part in self.split_special_tokens(text) {
            match part {
                TextFragment::Token(id) => ids.push(id),
                TextFragment::Text(text) => self.encode_text(&rewrite(text), after_special, &mut ids)?,
            }
            after_special = matches!(part, TextFragment::Token(_));
        }
        ids.extend(self.added.eos.filter(|_| add_special_tokens));
        Ok(ids)
    }

    /// Splits a text at its special tokens: first at all occurrences of the longest token, then at shorter ones in the
    /// remaining text.
    fn split_special_tokens<'t>(&self, text: &'t str) -> Vec<TextFragment<'t>> {
        let mut parts = if text.is_empty() { vec![] } else { vec![TextFragment::Text(text)] };
        for &id in &self.special_ids {
            let token = self.tokens[id as usize].as_str();
            if !text.contains(token) {
                continue;
            }
            let mut finer = Vec::with_capacity(parts.len() + 2);
            for part in parts {
                let TextFragment::Text(text) = part else {
                    finer.push(part);
                    continue;
                };
                for (index, between) in text.split(token).enumerate() {
                    if index > 0 {
                        finer.push(TextFragment::Token(id));
                    }
                    if !between.is_empty() {
                        finer.push(TextFragment::Text(between));
                    }
                }
            }
            parts = finer;
        }
        parts
    }

    /// Appends the ids of a text without special tokens.
    fn encode_text(&self, text: &str, after_special: bool, ids: &mut Vec<u32>) -> Result<(), String> {
        let (scores, add_space_prefix) = match &self.model {
            TokenizerModel::Bpe(tokenizer) => {
                ids.extend(tokenizer.encode_fast(text, false).map_err(|error| error.to_string())?.get_ids());
                return Ok(());
            }
            TokenizerModel::SentencePiece { scores, add_space_prefix } => (scores, *add_space_prefix),
        };
        let mut escaped = String::with_capacity(text.len() + 8);
        if add_space_prefix && after_special {
            escaped.push(SPACE_SYMBOL);
        }
        escaped.extend(text.chars().map(|c| if c == ' ' { SPACE_SYMBOL } else { c }));
        // No text becomes a control token by merges.
        let ordinary = |id: &&u32| self.token_types[**id as usize] != TokenType::Control;
        let score = |token: &str| scores.get(*self.ids.get(token).filter(ordinary)? as usize).copied();
        for piece in sentencepiece::pieces(&escaped, score) {
            match self.id(piece) {
                Some(id) => ids.push(id),
                None => {
                    for byte in piece.bytes() {
                        ids.push(self.byte_id(byte).ok_or_else(|| {
                            format!("no token for {piece:?}: expected one, or byte tokens <0x00> to <0xFF>")
                        })?);
                    }
                }
            }
        }
        Ok(())
    }

    /// Returns the id of a byte's token: `<0x0A>`, or the ASCII character itself.
    fn byte_id(&self, byte: u8) -> Option<u32> {
        self.id(&format!("<0x{byte:02X}>"))
            .or_else(|| byte.is_ascii().then(|| self.id(char::from(byte).encode_utf8(&mut [0; 4])))?)
    }

    /// Decodes ids to text.
    pub(super) fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let mut bytes = Vec::new();
        // Encoding added a space before the text; it is removed from the first token.
        let spaced = matches!(self.model, TokenizerModel::SentencePiece { add_space_prefix: true, .. });
        let mut first = true;
        for id in ids {
            let Some(token) = self.token(*id) else { continue };
            let kind = self.token_types[*id as usize];
            if skip_special_tokens && kind == TokenType::Control {
                continue;
            }
            let text = self.token_bytes(token, kind);
            let kept = if first && spaced && kind == TokenType::Normal { text.strip_prefix(b" ") } else { None };
            bytes.extend_from_slice(kept.unwrap_or(&text));
            first = false;
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Returns the bytes that a token decodes to.
    fn token_bytes<'t>(&self, token: &'t str, kind: TokenType) -> Cow<'t, [u8]> {
        match (kind, &self.model) {
            (TokenType::Control | TokenType::UserDefined, _) => Cow::Borrowed(token.as_bytes()),
            (TokenType::Unused, _) => Cow::Borrowed(&[]),
            (TokenType::Byte, _) => {
                let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                digits
                    .and_then(|digits| u8::from_str_radix(digits, 16).ok())
                    .map_or(Cow::Borrowed(token.as_bytes()), |byte| Cow::Owned(vec![byte]))
            }
            (TokenType::Normal, TokenizerModel::SentencePiece { .. }) => {
                Cow::Owned(token.replace(SPACE_SYMBOL, " ").into_bytes())
            }
            (TokenType::Normal, TokenizerModel::Bpe(_)) => {
                let mut bytes = Vec::with_capacity(token.len());
                for c in token.chars() {
                    match bpe::char_to_byte(c) {
                        Some(byte) => bytes.push(byte),
                        None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                    }
                }
                Cow::Owned(bytes)
            }
        }
    }
}
