//! Tokenizers: text to ids and back, from Hugging Face files or from a GGUF file.
//!
//! Each source has its own reference: ids equal those of `transformers` for a directory, and those of llama.cpp for a
//! GGUF file, which has the vocabulary but not the rules by which text is cut.

use std::path::{Path, PathBuf};

use crate::chat::ChatTemplate;
use crate::checkpoint::gguf::Gguf;
use crate::error::Error;

mod bpe;
mod directory;
mod gguf_metadata;
mod metadata;
mod pipeline;
mod save;
mod sentencepiece;
mod stream;
mod vocabulary;

pub use stream::DecodeStream;

/// Text to ids and back, with the special tokens and the chat template of a model.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    path: PathBuf,
    encoder: Encoder,
    special: Special,
    chat_template: Option<ChatTemplate>,
}

/// What does the work.
#[derive(Debug, Clone)]
enum Encoder {
    /// A `tokenizer.json`.
    Json(Box<tokenizers::Tokenizer>),
    /// The vocabulary of a GGUF file.
    Gguf(Box<vocabulary::Vocabulary>),
}

/// The ids with a meaning.
#[derive(Debug, Clone, Default)]
struct Special {
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    /// The tokens of `bos` and `eos`.
    bos_token: Option<String>,
    eos_token: Option<String>,
    /// Every id that ends a generation, ascending.
    stop: Vec<u32>,
}

impl Special {
    /// Adds to the ids that end a generation.
    fn stops(mut self, ids: impl IntoIterator<Item = u32>) -> Self {
        self.stop.extend(ids);
        self.stop.extend(self.eos);
        self.stop.sort_unstable();
        self.stop.dedup();
        self
    }

    /// The chat template in the file at `path`, which may write these tokens.
    fn template(&self, source: Option<&str>, path: &Path) -> Result<Option<ChatTemplate>, Error> {
        let parse = |source| ChatTemplate::new(source, self.bos_token.as_deref(), self.eos_token.as_deref());
        source.map(parse).transpose().map_err(|error| error.in_file(path))
    }
}

impl Tokenizer {
    /// Reads the tokenizer of a GGUF file: `tokenizer.ggml.model` `gpt2` (byte-level BPE with `tokenizer.ggml.pre`
    /// `smollm`, `llama-bpe`, `qwen2`, `gpt-2` or `default`) or `llama` (SentencePiece). Ids equal llama.cpp's
    /// `llama_tokenize(add_special, parse_special = true)`.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] naming a model or a `pre` that is not among these, or what is wrong with the vocabulary;
    /// [`Error::Format`] if the file's chat template does not parse.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, Error> {
        let vocabulary = vocabulary::Vocabulary::read(gguf)?;
        let special = vocabulary.special(gguf)?;
        let chat_template = special.template(gguf.text("tokenizer.chat_template")?, gguf.path())?;
        let encoder = Encoder::Gguf(Box::new(vocabulary));
        Ok(Self { path: gguf.path().to_owned(), encoder, special, chat_template })
    }

    /// The file that the tokenizer was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The ids of a text. Special tokens written out in the text become their ids; `add_special_tokens` adds those that
    /// the model expects around a text, such as BOS.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] if the vocabulary has no token for a part of the text, not even for its bytes.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        match &self.encoder {
            Encoder::Json(tokenizer) => {
                let encoding = tokenizer.encode_fast(text, add_special_tokens);
                Ok(encoding.map_err(|error| self.error(error.to_string()))?.get_ids().to_vec())
            }
            Encoder::Gguf(vocabulary) => {
                vocabulary.encode(text, add_special_tokens).map_err(|message| self.error(message))
            }
        }
    }

    /// The text of ids; bytes that are no UTF-8 become U+FFFD. With `skip_special_tokens`, control tokens print nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] if the tokenizer cannot decode at all. Ids outside the vocabulary print nothing.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, Error> {
        match &self.encoder {
            Encoder::Json(tokenizer) => {
                tokenizer.decode(ids, skip_special_tokens).map_err(|error| self.error(error.to_string()))
            }
            Encoder::Gguf(vocabulary) => Ok(vocabulary.decode(ids, skip_special_tokens)),
        }
    }

    /// The id of a token as it stands in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.encoder {
            Encoder::Json(tokenizer) => tokenizer.token_to_id(token),
            Encoder::Gguf(vocabulary) => vocabulary.id(token),
        }
    }

    /// The token of an id as it stands in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        match &self.encoder {
            Encoder::Json(tokenizer) => tokenizer.id_to_token(id),
            Encoder::Gguf(vocabulary) => vocabulary.token(id).map(str::to_owned),
        }
    }

    /// Number of ids, added tokens included. A model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        match &self.encoder {
            Encoder::Json(tokenizer) => tokenizer.get_vocab_size(true),
            Encoder::Gguf(vocabulary) => vocabulary.len(),
        }
    }

    /// The id that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.special.bos
    }

    /// The id that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.special.eos
    }

    /// Every id at which generation stops, ascending: [`Self::eos`] and the ends of a turn.
    pub fn eos_ids(&self) -> &[u32] {
        &self.special.stop
    }

    /// The id that fills up short rows of a batch.
    pub fn pad(&self) -> Option<u32> {
        self.special.pad
    }

    /// The token that begins a text.
    pub fn bos_token(&self) -> Option<&str> {
        self.special.bos_token.as_deref()
    }

    /// The token that ends a text.
    pub fn eos_token(&self) -> Option<&str> {
        self.special.eos_token.as_deref()
    }

    /// The model's chat template; base models have none.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Decodes ids as they come, special tokens skipped.
    pub fn stream(&self) -> DecodeStream<'_> {
        DecodeStream::new(self)
    }

    /// An error of this tokenizer.
    fn error(&self, message: String) -> Error {
        Error::Tokenizer { path: self.path.clone(), message }
    }
}
