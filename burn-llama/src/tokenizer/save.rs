//! A tokenizer as the files of a Hugging Face directory.

use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper};

use super::metadata::Kind;
use super::sentencepiece::SPACE;
use super::vocabulary::{Model, Vocabulary};
use super::{Encoder, Tokenizer};
use crate::checkpoint::replace;
use crate::error::Error;

/// The files that a tokenizer may consist of.
const FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
];

impl Tokenizer {
    /// Writes the tokenizer's files into `directory`, which exists: copies if they came from such a directory, else
    /// `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` that give the same ids and stops.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if a file cannot be written, [`Error::Tokenizer`] if the vocabulary does not make a `tokenizer.json`.
    pub fn save(&self, directory: &Path) -> Result<(), Error> {
        match &self.encoder {
            Encoder::Gguf(vocabulary) => derived(self, vocabulary, directory),
            Encoder::Json(_) => copied(self.path.parent().unwrap_or(Path::new("")), directory),
        }
    }
}

/// Copies what is there.
fn copied(from: &Path, to: &Path) -> Result<(), Error> {
    for name in FILES {
        match std::fs::read(from.join(name)) {
            Ok(bytes) => replace(&to.join(name), &bytes)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(&from.join(name), error)),
        }
    }
    Ok(())
}

/// Writes the files of a vocabulary that came from a GGUF file.
fn derived(tokenizer: &Tokenizer, vocabulary: &Vocabulary, to: &Path) -> Result<(), Error> {
    let rules = rules(vocabulary).and_then(|rules| rules.to_string(true).map_err(|error| error.to_string()));
    replace(&to.join("tokenizer.json"), rules.map_err(|message| tokenizer.error(message))?.as_bytes())?;
    let special = &tokenizer.special;
    let mut config = Map::new();
    // The class that takes the file's rules as they stand.
    config.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    config.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
    let pad = special.pad.and_then(|id| tokenizer.id_to_token(id));
    let template = tokenizer.chat_template().map(|template| template.source().to_owned());
    for (name, value) in [
        ("bos_token", special.bos_token.clone()),
        ("eos_token", special.eos_token.clone()),
        ("pad_token", pad),
        ("chat_template", template),
    ] {
        config.extend(value.map(|value| (name.to_owned(), json!(value))));
    }
    replace(&to.join("tokenizer_config.json"), format!("{:#}\n", Value::Object(config)).as_bytes())?;
    let mut generation = Map::new();
    for (name, id) in [("bos_token_id", special.bos), ("pad_token_id", special.pad)] {
        generation.extend(id.map(|id| (name.to_owned(), json!(id))));
    }
    generation.insert("eos_token_id".to_owned(), json!(special.stop));
    replace(&to.join("generation_config.json"), format!("{:#}\n", Value::Object(generation)).as_bytes())
}

/// The `tokenizer.json` of a vocabulary.
fn rules(vocabulary: &Vocabulary) -> Result<tokenizers::Tokenizer, String> {
    let mut rules = match &vocabulary.model {
        Model::Bpe(tokenizer) => {
            let mut rules = tokenizers::Tokenizer::clone(tokenizer);
            rules.with_decoder(Some(ByteLevel::default()));
            rules
        }
        Model::SentencePiece { scores, add_space_prefix } => sentencepiece(vocabulary, scores, *add_space_prefix)?,
    };
    let text = |error: tokenizers::Error| error.to_string();
    for (token, kind) in vocabulary.tokens.iter().zip(&vocabulary.kinds) {
        if matches!(kind, Kind::Control | Kind::UserDefined) && !token.is_empty() {
            let added = AddedToken::from(token.as_str(), *kind == Kind::Control).normalized(false);
            rules.add_tokens([added]).map_err(text)?;
        }
    }
    let named = |id: Option<u32>| id.and_then(|id| Some((id, vocabulary.token(id)?)));
    let (before, after) = (named(vocabulary.around.0), named(vocabulary.around.1));
    if before.is_some() || after.is_some() {
        rules.with_post_processor(Some(template(before, after)?));
    }
    Ok(rules)
}

/// What puts special tokens around a text.
fn template(before: Option<(u32, &str)>, after: Option<(u32, &str)>) -> Result<PostProcessorWrapper, String> {
    let token = |(_, token): (u32, &str), sequence: u32| json!({"SpecialToken": {"id": token, "type_id": sequence}});
    let around = |name: &str, sequence: u32| {
        let text = json!({"Sequence": {"id": name, "type_id": sequence}});
        let before = before.map(|before| token(before, sequence));
        before.into_iter().chain([text]).chain(after.map(|after| token(after, sequence))).collect::<Vec<_>>()
    };
    let pair = [around("A", 0), around("B", 1)].concat();
    let entry = |(id, token): (u32, &str)| (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}));
    let special: Map<String, Value> = before.into_iter().chain(after).map(entry).collect();
    let template =
        json!({"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": special});
    serde_json::from_value(template).map_err(|error| error.to_string())
}

/// SentencePiece's rules as BPE with bytes for what has no token: pieces in the order of their scores are the merges.
fn sentencepiece(vocabulary: &Vocabulary, scores: &[f32], prefix: bool) -> Result<tokenizers::Tokenizer, String> {
    let ids = vocabulary.tokens.iter().cloned().zip(0..).collect::<tokenizers::models::bpe::Vocab>();
    let mut model = BPE::builder().vocab_and_merges(ids, merges(vocabulary, scores)).byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = vocabulary.unknown.and_then(|id| vocabulary.token(id)) {
        model = model.unk_token(unknown.to_owned());
    }
    let mut rules = tokenizers::Tokenizer::new(model.build().map_err(|error| error.to_string())?);
    let space = SPACE.to_string();
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": space});
    let normalizer = match prefix {
        true => json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": space}, replace]}),
        false => replace,
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": space}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let decoder = json!({"type": "Sequence", "decoders": decoders});
    let fail = |error: serde_json::Error| error.to_string();
    let normalizer: NormalizerWrapper = serde_json::from_value(normalizer).map_err(fail)?;
    let decoder: DecoderWrapper = serde_json::from_value(decoder).map_err(fail)?;
    rules.with_normalizer(Some(normalizer)).map_err(|error| error.to_string())?;
    rules.with_decoder(Some(decoder));
    Ok(rules)
}

/// Every way in which two tokens make a third, the ways of the best token first.
fn merges(vocabulary: &Vocabulary, scores: &[f32]) -> Vec<(String, String)> {
    let mut merges = Vec::new();
    for (token, (kind, score)) in vocabulary.tokens.iter().zip(vocabulary.kinds.iter().zip(scores)) {
        if *kind != Kind::Normal {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(first), Some(second)) = (vocabulary.id(left), vocabulary.id(right)) {
                merges.push((*score, first, second, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2).cmp(&(b.1, b.2))));
    merges.into_iter().map(|(_, _, _, left, right)| (left.to_owned(), right.to_owned())).collect()
}
