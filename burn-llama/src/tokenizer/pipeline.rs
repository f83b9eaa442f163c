//! The rules of a GGUF file's tokenizer as a pipeline of the `tokenizers` library, which can be saved as
//! `tokenizer.json`.

use serde_json::{Map, Value, json};
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper};

use super::metadata::TokenType;
use super::sentencepiece::{SPACE_SYMBOL, merges};
use super::vocabulary::{AddedTokens, TokenizerModel, Vocabulary};

impl Vocabulary {
    /// Builds the pipeline: matching of special tokens, normalization, splitting into words, merging, and a
    /// post-processor that adds BOS and EOS.
    pub(super) fn pipeline(&self) -> Result<tokenizers::Tokenizer, String> {
        let mut tokenizer = match &self.model {
            TokenizerModel::Bpe(tokenizer) => {
                let mut tokenizer = tokenizers::Tokenizer::clone(tokenizer);
                tokenizer.with_decoder(Some(ByteLevel::default()));
                tokenizer
            }
            TokenizerModel::SentencePiece { scores, add_space_prefix } => {
                self.sentencepiece_tokenizer(scores, *add_space_prefix)?
            }
        };
        let parsed = self.tokens.iter().zip(&self.token_types).filter_map(|(token, kind)| match kind {
            // These are matched in the raw text, before normalization.
            TokenType::Control => Some(AddedToken::from(token.as_str(), true).normalized(false)),
            TokenType::UserDefined => Some(AddedToken::from(token.as_str(), false).normalized(false)),
            TokenType::Normal | TokenType::Byte | TokenType::Unused => None,
        });
        tokenizer.add_tokens(parsed).map_err(|error| error.to_string())?;
        if self.added != AddedTokens::default() {
            tokenizer.with_post_processor(Some(self.post_processor()?));
        }
        Ok(tokenizer)
    }

    /// Builds a SentencePiece BPE tokenizer: spaces are written as `▁`, one is added before every text if
    /// `add_space_prefix`, and text without a token becomes byte tokens.
    fn sentencepiece_tokenizer(&self, scores: &[f32], add_space_prefix: bool) -> Result<tokenizers::Tokenizer, String> {
        let fail = |error: tokenizers::Error| error.to_string();
        let ids = self.tokens.iter().cloned().zip(0..).collect::<Vocab>();
        let mut model = BPE::builder()
            .vocab_and_merges(ids, merges(&self.tokens, &self.ids, scores))
            .byte_fallback(true)
            .fuse_unk(true);
        if let Some(unknown) = self.unknown.and_then(|id| self.token(id)) {
            model = model.unk_token(unknown.to_owned());
        }
        let mut tokenizer = tokenizers::Tokenizer::new(model.build().map_err(fail)?);
        let space = SPACE_SYMBOL.to_string();
        let mut rules: Vec<NormalizerWrapper> = vec![Replace::new(" ", space.as_str()).map_err(fail)?.into()];
        let mut decoders: Vec<DecoderWrapper> = vec![
            Replace::new(space.as_str(), " ").map_err(fail)?.into(),
            ByteFallback::new().into(),
            Fuse::new().into(),
        ];
        if add_space_prefix {
            rules.insert(0, Prepend::new(space).into());
            decoders.push(Strip::new(' ', 1, 0).into());
        }
        tokenizer.with_normalizer(Some(NormalizerSequence::new(rules))).map_err(fail)?;
        tokenizer.with_decoder(Some(DecoderSequence::new(decoders)));
        Ok(tokenizer)
    }

    /// Builds the post-processor that adds BOS and EOS around a text, or around each text of a pair.
    fn post_processor(&self) -> Result<PostProcessorWrapper, String> {
        let around = [self.added.bos, self.added.eos].map(|id| self.token(id?).map(str::to_owned).zip(id));
        let [bos, eos] = &around;
        let special = |token: &Option<(String, u32)>, text: usize| {
            token.as_ref().map(|(token, _)| json!({"SpecialToken": {"id": token, "type_id": text}}))
        };
        let one = |name: &str, text: usize| -> Vec<Value> {
            let sequence = json!({"Sequence": {"id": name, "type_id": text}});
            [special(bos, text), Some(sequence), special(eos, text)].into_iter().flatten().collect()
        };
        let tokens: Map<String, Value> = around
            .iter()
            .flatten()
            .map(|(token, id)| (token.clone(), json!({"id": token, "ids": [id], "tokens": [token]})))
            .collect();
        let pair = [one("A", 0), one("B", 1)].concat();
        let template = json!({
            "type": "TemplateProcessing", "single": one("A", 0), "pair": pair, "special_tokens": tokens,
        });
        serde_json::from_value(template).map_err(|error| error.to_string())
    }
}
