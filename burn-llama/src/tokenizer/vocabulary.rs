//! The tokenizer of a GGUF file: its tokens, which of them are special, and how text becomes ids.

use std::borrow::Cow;
use std::collections::HashMap;

use super::Special;
use super::bpe::{self, Cut};
use super::metadata::{Kind, fault, kinds, scores, stop_tokens, strings};
use super::sentencepiece::{self, SPACE};
use crate::checkpoint::gguf::{Gguf, Value};
use crate::error::Error;

/// How text between special tokens becomes ids.
#[derive(Debug, Clone)]
pub(super) enum Model {
    /// Byte-level BPE.
    Bpe(Box<tokenizers::Tokenizer>),
    /// SentencePiece: the score of every token, and whether a space is put before a text.
    SentencePiece { scores: Vec<f32>, add_space_prefix: bool },
}

impl Model {
    /// Reads the model of a vocabulary, and whether it adds BOS unless the file says otherwise.
    fn read(gguf: &Gguf, tokens: &[String]) -> Result<(Self, bool), Error> {
        match gguf.text("tokenizer.ggml.model")?.unwrap_or("none") {
            "gpt2" => {
                let pre = gguf.text("tokenizer.ggml.pre")?.unwrap_or("default");
                let cut = Cut::named(pre).ok_or_else(|| {
                    fault(gguf, format!("tokenizer.ggml.pre: expected one of {}, found {pre:?}", Cut::NAMES))
                })?;
                let merges = strings(gguf, "tokenizer.ggml.merges")?;
                let tokenizer = cut.tokenizer(tokens, &merges).map_err(|message| fault(gguf, message))?;
                Ok((Self::Bpe(Box::new(tokenizer)), cut.add_bos))
            }
            "llama" => {
                let key = "tokenizer.ggml.add_space_prefix";
                let add_space_prefix = gguf.typed(key, "a boolean", Value::as_bool)?.unwrap_or(true);
                Ok((Self::SentencePiece { scores: scores(gguf, tokens.len())?, add_space_prefix }, true))
            }
            other => {
                let message = format!("tokenizer.ggml.model: expected gpt2 or llama, found {other:?}");
                Err(fault(gguf, message))
            }
        }
    }
}

/// The vocabulary of a GGUF file.
#[derive(Debug, Clone)]
pub(super) struct Vocabulary {
    pub tokens: Vec<String>,
    pub ids: HashMap<String, u32>,
    pub kinds: Vec<Kind>,
    /// Ids that are looked for in the text, those of the longest tokens first.
    parsed: Vec<u32>,
    pub model: Model,
    /// What stands for text that has no token.
    pub unknown: Option<u32>,
    /// What `add_special_tokens` puts before and after a text.
    pub around: (Option<u32>, Option<u32>),
}

/// A part of a text: still text, or the special token that stood there.
enum Part<'t> {
    Text(&'t str),
    Token(u32),
}

impl Vocabulary {
    /// Reads tokens, types and rules from the metadata.
    pub fn read(gguf: &Gguf) -> Result<Self, Error> {
        let tokens = strings(gguf, "tokenizer.ggml.tokens")?;
        let mut ids = HashMap::with_capacity(tokens.len());
        for (token, id) in tokens.iter().zip(0..) {
            if let Some(first) = ids.insert(token.clone(), id) {
                return Err(fault(gguf, format!("token {token:?} has two ids, {first} and {id}; expected one")));
            }
        }
        let kinds = kinds(gguf, &tokens)?;
        let (model, add_bos) = Model::read(gguf, &tokens)?;
        let searched = |id: &u32| matches!(kinds[*id as usize], Kind::Control | Kind::UserDefined);
        let mut parsed: Vec<u32> = ids.values().copied().filter(searched).collect();
        parsed.sort_by_key(|id| (std::cmp::Reverse(tokens[*id as usize].len()), *id));
        parsed.retain(|id| !tokens[*id as usize].is_empty());
        let flag = |name: &str, default: bool| {
            let key = format!("tokenizer.ggml.add_{name}_token");
            Ok::<_, Error>(gguf.typed(&key, "a boolean", Value::as_bool)?.unwrap_or(default))
        };
        let (add_bos, add_eos) = (flag("bos", add_bos)?, flag("eos", false)?);
        let mut vocabulary = Self { tokens, ids, kinds, parsed, model, unknown: None, around: (None, None) };
        vocabulary.unknown = vocabulary.named(gguf, "unknown", 0)?;
        let special = vocabulary.special(gguf)?;
        vocabulary.around = (special.bos.filter(|_| add_bos), special.eos.filter(|_| add_eos));
        Ok(vocabulary)
    }

    /// The ids with a meaning: those that the file names, and those that llama.cpp knows by their text.
    pub fn special(&self, gguf: &Gguf) -> Result<Special, Error> {
        let named = |name: &str| self.named(gguf, name, u32::MAX);
        let (bos, eos) = (self.named(gguf, "bos", 1)?, self.named(gguf, "eos", 2)?);
        let token = |id: Option<u32>| id.and_then(|id| self.token(id)).map(str::to_owned);
        let (bos_token, eos_token) = (token(bos), token(eos));
        let special = Special { bos, eos, pad: named("padding")?, bos_token, eos_token, stop: Vec::new() };
        let by_key = ["eot", "eom", "fim_pad", "fim_rep", "fim_sep"].map(named);
        let mut stop: Vec<u32> = stop_tokens().filter_map(|token| self.id(token)).collect();
        for id in by_key {
            stop.extend(id?);
        }
        Ok(special.stops(stop))
    }

    /// The id that the file names; without it, the `usual` one if it is a SentencePiece model, which all have their special
    /// tokens in the same places.
    fn named(&self, gguf: &Gguf, name: &str, usual: u32) -> Result<Option<u32>, Error> {
        let id = gguf.integer(&format!("tokenizer.ggml.{name}_token_id"))?;
        let id = id.filter(|id| *id < self.len()).map(|id| id as u32);
        let placed = matches!(self.model, Model::SentencePiece { .. }) && (usual as usize) < self.len();
        Ok(id.or(placed.then_some(usual)))
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The id of a token.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// The token of an id.
    pub fn token(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(String::as_str)
    }

    /// The ids of a text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        let mut ids = Vec::new();
        ids.extend(self.around.0.filter(|_| add_special_tokens));
        // A space goes before every text that a special token precedes, and before the first.
        let mut after_special = true;
        for part in self.parts(text) {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) => self.encode_text(text, after_special, &mut ids)?,
            }
            after_special = matches!(part, Part::Token(_));
        }
        ids.extend(self.around.1.filter(|_| add_special_tokens));
        Ok(ids)
    }

    /// Cuts the special tokens out of a text: all of the longest token first, then those of shorter ones in what is
    /// left.
    fn parts<'t>(&self, text: &'t str) -> Vec<Part<'t>> {
        let mut parts = if text.is_empty() { vec![] } else { vec![Part::Text(text)] };
        for &id in &self.parsed {
            let token = self.tokens[id as usize].as_str();
            if !text.contains(token) {
                continue;
            }
            let mut finer = Vec::with_capacity(parts.len() + 2);
            for part in parts {
                let Part::Text(text) = part else {
                    finer.push(part);
                    continue;
                };
                for (index, between) in text.split(token).enumerate() {
                    if index > 0 {
                        finer.push(Part::Token(id));
                    }
                    if !between.is_empty() {
                        finer.push(Part::Text(between));
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
            Model::Bpe(tokenizer) => {
                ids.extend(tokenizer.encode_fast(text, false).map_err(|error| error.to_string())?.get_ids());
                return Ok(());
            }
            Model::SentencePiece { scores, add_space_prefix } => (scores, *add_space_prefix),
        };
        let mut escaped = String::with_capacity(text.len() + 8);
        if add_space_prefix && after_special {
            escaped.push(SPACE);
        }
        escaped.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
        for piece in sentencepiece::pieces(&escaped, &self.ids, scores) {
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

    /// The token of a byte, `<0x0A>` or the character itself.
    fn byte_id(&self, byte: u8) -> Option<u32> {
        self.id(&format!("<0x{byte:02X}>"))
            .or_else(|| byte.is_ascii().then(|| self.id(char::from(byte).encode_utf8(&mut [0; 4])))?)
    }

    /// The text of ids.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let mut bytes = Vec::new();
        // Encoding put a space before the text: it goes with the first token.
        let spaced = matches!(self.model, Model::SentencePiece { add_space_prefix: true, .. });
        let mut first = true;
        for id in ids {
            let Some(token) = self.token(*id) else { continue };
            let kind = self.kinds[*id as usize];
            if skip_special_tokens && kind == Kind::Control {
                continue;
            }
            let text = self.bytes(token, kind);
            let kept = if first && spaced && kind == Kind::Normal { text.strip_prefix(b" ") } else { None };
            bytes.extend_from_slice(kept.unwrap_or(&text));
            first = false;
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes that a token prints.
    fn bytes<'t>(&self, token: &'t str, kind: Kind) -> Cow<'t, [u8]> {
        match (kind, &self.model) {
            (Kind::Control | Kind::UserDefined, _) => Cow::Borrowed(token.as_bytes()),
            (Kind::Unused, _) => Cow::Borrowed(&[]),
            (Kind::Byte, _) => {
                let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                digits
                    .and_then(|digits| u8::from_str_radix(digits, 16).ok())
                    .map_or(Cow::Borrowed(token.as_bytes()), |byte| Cow::Owned(vec![byte]))
            }
            (Kind::Normal, Model::SentencePiece { .. }) => Cow::Owned(token.replace(SPACE, " ").into_bytes()),
            (Kind::Normal, Model::Bpe(_)) => {
                let mut bytes = Vec::with_capacity(token.len());
                for c in token.chars() {
                    match bpe::byte(c) {
                        Some(byte) => bytes.push(byte),
                        None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                    }
                }
                Cow::Owned(bytes)
            }
        }
    }
}
