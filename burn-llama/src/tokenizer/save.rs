//! Saving a tokenizer as the files of a Hugging Face directory.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::vocabulary::Vocabulary;
use super::{Encoder, Tokenizer};
use crate::checkpoint::atomic_write;
use crate::error::Error;

/// The files of a Hugging Face directory that define the tokenizer and the stop ids of generation.
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

/// The files that say how to chat with a model: its chat template, and its stop ids where they are more than those of
/// the model's own files.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChatFiles {
    /// The content of `chat_template.jinja`.
    chat_template: Option<String>,
    /// The content of `generation_config.json`.
    generation_config: Option<Value>,
}

impl ChatFiles {
    /// Writes the files into the existing `directory`, beside an adapter's.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if a file cannot be written.
    pub fn save(&self, directory: &Path) -> Result<(), Error> {
        if let Some(template) = &self.chat_template {
            atomic_write(&directory.join("chat_template.jinja"), template.as_bytes())?;
        }
        if let Some(config) = &self.generation_config {
            atomic_write(&directory.join("generation_config.json"), format!("{config:#}\n").as_bytes())?;
        }
        Ok(())
    }
}

impl Tokenizer {
    /// Returns the files that say how to chat with the model.
    pub fn chat_files(&self) -> ChatFiles {
        ChatFiles {
            chat_template: self.chat_template.as_ref().map(|template| template.source().to_owned()),
            generation_config: self.has_new_stop_ids().then(|| self.generation_config()),
        }
    }

    /// Returns whether the end-of-turn token is not among the stop ids that the files list.
    fn has_new_stop_ids(&self) -> bool {
        self.special.stop_ids != self.listed_stop_ids
    }

    /// Writes the tokenizer's files into the existing `directory`, so that [`Tokenizer::from_dir`] and `AutoTokenizer`
    /// of `transformers` can load it.
    ///
    /// A tokenizer that came from a directory is copied file by file, with the tokens that were added. One from a GGUF file becomes `tokenizer.json`
    /// (the rules), `tokenizer_config.json` (special tokens, whether they are added, chat template) and
    /// `generation_config.json` (stop ids), and then produces the same ids. Two rules of llama.cpp have no counterpart
    /// in `tokenizer.json`: of special tokens that overlap in a text, `tokenizers` takes the leftmost, llama.cpp the
    /// longest; of SentencePiece merges with equal scores, `tokenizers` takes the one whose token comes first in the
    /// vocabulary, llama.cpp the leftmost in the text.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if a file cannot be read or written, [`Error::Tokenizer`] if the rules cannot be written as
    /// `tokenizer.json`.
    pub fn save(&self, directory: &Path) -> Result<(), Error> {
        match &self.encoder {
            Encoder::Json(_) => self.copy_files(directory),
            Encoder::Gguf(vocabulary) => {
                let rules = vocabulary.pipeline().map_err(|message| self.error(message))?;
                let rules = rules.to_string(true).map_err(|error| self.error(error.to_string()))?;
                atomic_write(&directory.join("tokenizer.json"), rules.as_bytes())?;
                for (name, json) in [
                    ("tokenizer_config.json", self.tokenizer_config(vocabulary)),
                    ("generation_config.json", self.generation_config()),
                ] {
                    atomic_write(&directory.join(name), format!("{json:#}\n").as_bytes())?;
                }
                Ok(())
            }
        }
    }

    /// Copies the tokenizer's files from the directory that it was read from.
    fn copy_files(&self, directory: &Path) -> Result<(), Error> {
        let from = self.path.parent().unwrap_or(Path::new(""));
        for path in FILES.map(|name| from.join(name)) {
            if path.is_file() {
                let mut bytes = std::fs::read(&path).map_err(|source| Error::io(&path, source))?;
                if path.ends_with("tokenizer.json") && !self.added.is_empty() {
                    bytes = self.with_added_tokens(&bytes)?;
                }
                atomic_write(&directory.join(path.file_name().unwrap_or_default()), &bytes)?;
            }
        }
        let chat = ChatFiles {
            chat_template: self.chat_files().chat_template.filter(|_| self.template_replaced),
            generation_config: self.has_new_stop_ids().then(|| self.merged_generation_config(from)).transpose()?,
        };
        chat.save(directory)
    }

    /// Returns the content of the `generation_config.json` in the folder `from` with all stop ids.
    fn merged_generation_config(&self, from: &Path) -> Result<Value, Error> {
        let path = from.join("generation_config.json");
        if !path.is_file() {
            return Ok(self.generation_config());
        }
        let bytes = std::fs::read(&path).map_err(|source| Error::io(&path, source))?;
        let mut config: Map<String, Value> = serde_json::from_slice(&bytes)
            .map_err(|error| Error::Tokenizer { path, message: format!("expected a JSON object, found: {error}") })?;
        config.insert("eos_token_id".to_owned(), json!(self.special.stop_ids));
        Ok(Value::Object(config))
    }

    /// Returns the content of `tokenizer_config.json`. Its tokenizer class makes every version of `transformers` use
    /// the rules of `tokenizer.json` unchanged.
    fn tokenizer_config(&self, vocabulary: &Vocabulary) -> Value {
        let token = |id: Option<u32>| id.and_then(|id| vocabulary.token(id));
        let mut config = Map::new();
        let mut set = |key: &str, value: Value| config.insert(key.to_owned(), value);
        set("tokenizer_class", json!("PreTrainedTokenizerFast"));
        for (name, id) in [
            ("bos_token", self.special.bos),
            ("eos_token", self.special.eos),
            ("unk_token", vocabulary.unknown),
            ("pad_token", self.special.pad),
        ] {
            if let Some(token) = token(id) {
                set(name, json!(token));
            }
        }
        set("add_bos_token", json!(vocabulary.added.bos.is_some()));
        set("add_eos_token", json!(vocabulary.added.eos.is_some()));
        set("clean_up_tokenization_spaces", json!(false));
        if let Some(template) = &self.chat_template {
            set("chat_template", json!(template.source()));
        }
        Value::Object(config)
    }

    /// Returns the content of `generation_config.json`.
    fn generation_config(&self) -> Value {
        let mut config = Map::new();
        let named = [("bos_token_id", self.special.bos), ("pad_token_id", self.special.pad)];
        config.extend(named.into_iter().filter_map(|(name, id)| Some((name.to_owned(), json!(id?)))));
        config.insert("eos_token_id".to_owned(), json!(self.special.stop_ids));
        Value::Object(config)
    }
}
