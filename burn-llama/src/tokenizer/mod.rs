//! Tokenizers, read from Hugging Face files or from a GGUF file.
//!
//! Each source has its own reference. For a Hugging Face directory, ids equal those of `transformers`. For a GGUF file,
//! which stores the vocabulary but not the rules that split text, they equal those of llama.cpp.

use std::path::{Path, PathBuf};

use crate::chat::ChatTemplate;
use crate::checkpoint::gguf::Gguf;
use crate::error::Error;

mod added;
mod bpe;
mod directory;
mod end_of_turn;
mod escape;
mod gguf_metadata;
mod metadata;
mod patterns;
mod pipeline;
mod pre_tokenizer;
mod save;
mod sentencepiece;
mod stream;
mod vocabulary;

pub use escape::{EscapedConversation, Escapes};
pub use save::ChatFiles;
pub use stream::DecodeStream;

/// A model's tokenizer: encodes text to token ids and decodes them, and knows the special tokens and the chat template.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    path: PathBuf,
    encoder: Encoder,
    special: SpecialTokens,
    chat_template: Option<ChatTemplate>,
    /// True if the chat template is not the one in the files that the tokenizer was read from.
    template_replaced: bool,
    /// The stop ids that the files list or imply, without what the chat template shows.
    listed_stop_ids: Vec<u32>,
    /// The tokens that no text in a message may become.
    control: escape::ControlTokens,
    /// The end-of-turn token that the chat template writes.
    template_end_of_turn: Option<u32>,
    end_of_turn_override: Option<u32>,
    /// The tokens that [`Tokenizer::add_tokens`] added.
    added: Vec<String>,
}

/// The implementation behind a [`Tokenizer`].
#[derive(Debug, Clone)]
enum Encoder {
    /// The rules of a `tokenizer.json`.
    Json(Box<tokenizers::Tokenizer>),
    /// The vocabulary of a GGUF file.
    Gguf(Box<vocabulary::Vocabulary>),
}

impl Encoder {
    /// Returns the control tokens, as they are written in a text: the special ones, and those that the model's files
    /// name as its start and its ends.
    fn control_tokens(&self, special: &SpecialTokens) -> escape::ControlTokens {
        let named = |id: &u32| special.stop_ids.contains(id) || special.bos == Some(*id);
        match self {
            Self::Json(tokenizer) => {
                let added: Vec<_> = tokenizer.get_added_tokens_decoder().into_iter().collect();
                let (control, others): (Vec<_>, Vec<_>) =
                    added.into_iter().partition(|(id, token)| token.special || named(id));
                let texts =
                    |tokens: Vec<(u32, tokenizers::AddedToken)>| tokens.into_iter().map(|(_, token)| token.content);
                escape::ControlTokens::new(texts(control), texts(others))
            }
            Self::Gguf(vocabulary) => {
                let (control, others) = vocabulary.matched_ids().partition::<Vec<u32>, _>(|id| {
                    vocabulary.token_types[*id as usize] == metadata::TokenType::Control || named(id)
                });
                let texts = |ids: Vec<u32>| ids.into_iter().map(|id| vocabulary.tokens[id as usize].clone());
                escape::ControlTokens::new(texts(control), texts(others))
            }
        }
    }
}

/// The special tokens of a model and the ids at which generation stops.
#[derive(Debug, Clone, Default)]
struct SpecialTokens {
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    /// The text of the `bos` token.
    bos_token: Option<String>,
    /// The text of the `eos` token.
    eos_token: Option<String>,
    /// The names and texts of the other special tokens, such as `pad_token`, which chat templates see.
    others: Vec<(&'static str, String)>,
    /// All ids that end a generation, ascending.
    stop_ids: Vec<u32>,
}

impl SpecialTokens {
    /// Adds `ids` and EOS to the ids that end a generation.
    fn with_stop_ids(mut self, ids: impl IntoIterator<Item = u32>) -> Self {
        self.stop_ids.extend(ids);
        self.stop_ids.extend(self.eos);
        self.stop_ids.sort_unstable();
        self.stop_ids.dedup();
        self
    }

    /// Parses a chat template with the special tokens as its variables.
    fn parse_template(&self, source: &str) -> Result<ChatTemplate, Error> {
        let template = ChatTemplate::new(source, self.bos_token.as_deref(), self.eos_token.as_deref())?;
        Ok(template.with_special_tokens(&self.others))
    }

    /// Parses the chat template `source` from the file at `path`, with the special tokens as its variables.
    fn parse_chat_template(&self, source: Option<&str>, path: &Path) -> Result<Option<ChatTemplate>, Error> {
        source.map(|source| self.parse_template(source)).transpose().map_err(|error| error.in_file(path))
    }
}

impl Tokenizer {
    /// Reads the tokenizer of a GGUF file. `tokenizer.ggml.model` may be `gpt2` (byte-level BPE) or `llama`
    /// (SentencePiece). For `gpt2`, `tokenizer.ggml.pre` names the rules that split text into words: every name that
    /// llama.cpp has for a byte-level vocabulary is accepted, such as `llama-bpe`, `qwen2`, `tekken`, `deepseek-llm` or
    /// `smollm`, and a missing name is `default`. Ids equal those of llama.cpp's
    /// `llama_tokenize(add_special, parse_special = true)`, except around characters that Unicode 16 added, which
    /// llama.cpp's tables lack. Where llama.cpp simplifies the rules of a model's own tokenizer, its ids are followed: in
    /// `tekken`, for example, a combining mark is not a part of a word.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] if `model` or `pre` is not one of these, with the names that are, or if the vocabulary is
    /// malformed; [`Error::Format`] if the file's chat template does not parse.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, Error> {
        let vocabulary = vocabulary::Vocabulary::read(gguf)?;
        let special = vocabulary.special_tokens(gguf)?;
        let chat_template = special.parse_chat_template(gguf.text("tokenizer.chat_template")?, gguf.path())?;
        let encoder = Encoder::Gguf(Box::new(vocabulary));
        Ok(Self::new(gguf.path().to_owned(), encoder, special, chat_template))
    }

    /// Creates a tokenizer from its parts; the chat template shows its end-of-turn token.
    fn new(path: PathBuf, encoder: Encoder, special: SpecialTokens, chat_template: Option<ChatTemplate>) -> Self {
        let control = encoder.control_tokens(&special);
        let listed_stop_ids = special.stop_ids.clone();
        let mut tokenizer = Self {
            path,
            encoder,
            special,
            chat_template: None,
            template_replaced: false,
            listed_stop_ids,
            control,
            template_end_of_turn: None,
            end_of_turn_override: None,
            added: Vec::new(),
        };
        tokenizer.set_chat_template(chat_template);
        tokenizer
    }

    /// Returns the path of the file that the tokenizer was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Encodes a text to token ids. Special tokens that are written out in the text become their ids;
    /// `add_special_tokens` adds those that the model expects around a text, such as BOS.
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

    /// Decodes token ids to text. Bytes that are not valid UTF-8 become U+FFFD, ids outside the vocabulary are ignored,
    /// and `skip_special_tokens` omits control tokens.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, Error> {
        match &self.encoder {
            Encoder::Json(tokenizer) => {
                tokenizer.decode(ids, skip_special_tokens).map_err(|error| self.error(error.to_string()))
            }
            Encoder::Gguf(vocabulary) => Ok(vocabulary.decode(ids, skip_special_tokens)),
        }
    }

    /// Returns the id of a token, spelled as in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.encoder {
            Encoder::Json(tokenizer) => tokenizer.token_to_id(token),
            Encoder::Gguf(vocabulary) => vocabulary.id(token),
        }
    }

    /// Returns the token of an id, spelled as in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        match &self.encoder {
            Encoder::Json(tokenizer) => tokenizer.id_to_token(id),
            Encoder::Gguf(vocabulary) => vocabulary.token(id).map(str::to_owned),
        }
    }

    /// Returns the number of ids, including added tokens. A model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        match &self.encoder {
            Encoder::Json(tokenizer) => tokenizer.get_vocab_size(true),
            Encoder::Gguf(vocabulary) => vocabulary.len(),
        }
    }

    /// Returns the id of the beginning-of-sequence token.
    pub fn bos(&self) -> Option<u32> {
        self.special.bos
    }

    /// Returns the id of the end-of-sequence token.
    pub fn eos(&self) -> Option<u32> {
        self.special.eos
    }

    /// Returns all ids at which generation stops, ascending: [`Self::eos`], [`Self::end_of_turn`] and those that the
    /// files list.
    pub fn eos_ids(&self) -> &[u32] {
        &self.special.stop_ids
    }

    /// Returns the id of the padding token.
    pub fn pad(&self) -> Option<u32> {
        self.special.pad
    }

    /// Returns the text of the beginning-of-sequence token.
    pub fn bos_token(&self) -> Option<&str> {
        self.special.bos_token.as_deref()
    }

    /// Returns the text of the end-of-sequence token.
    pub fn eos_token(&self) -> Option<&str> {
        self.special.eos_token.as_deref()
    }

    /// Returns the model's chat template; base models have none.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Returns a decoder for ids that arrive one by one; it skips special tokens.
    pub fn stream(&self) -> DecodeStream<'_> {
        DecodeStream::new(self)
    }

    /// Builds a tokenizer error that names this tokenizer's file.
    fn error(&self, message: String) -> Error {
        Error::Tokenizer { path: self.path.clone(), message }
    }
}
