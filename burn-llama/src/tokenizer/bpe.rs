//! Byte-level BPE for the vocabulary of a GGUF file, with the same results as llama.cpp.

use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

use super::pre_tokenizer::PreTokenizerRules;

impl PreTokenizerRules {
    /// Builds the tokenizer of a vocabulary in id order and its merges, each written `left right`, best first.
    pub(super) fn build_tokenizer(
        &self,
        tokens: &[String],
        merges: &[String],
    ) -> Result<tokenizers::Tokenizer, String> {
        let ids = tokens.iter().cloned().zip(0..).collect::<tokenizers::models::bpe::Vocab>();
        let mut pairs = Vec::with_capacity(merges.len());
        for merge in merges {
            let pair = merge.split_once(' ').ok_or_else(|| format!("merge {merge:?}: expected two parts"))?;
            pairs.push((pair.0.to_owned(), pair.1.to_owned()));
        }
        let model = BPE::builder().vocab_and_merges(ids, pairs).ignore_merges(self.ignore_merges).build();
        let mut tokenizer = tokenizers::Tokenizer::new(model.map_err(|error| error.to_string())?);
        let mut cuts = Vec::new();
        for pattern in self.patterns {
            let pattern = SplitPattern::Regex((*pattern).to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            cuts.push(PreTokenizerWrapper::from(split.map_err(|error| error.to_string())?));
        }
        cuts.push(PreTokenizerWrapper::from(ByteLevel::new(false, false, false)));
        tokenizer.with_pre_tokenizer(Some(Sequence::new(cuts)));
        Ok(tokenizer)
    }
}

/// Returns the byte that a character of a byte-level token stands for. Printable Latin-1 characters stand for
/// themselves; the characters from U+0100 on stand for the other 68 bytes in order.
pub(super) fn char_to_byte(c: char) -> Option<u8> {
    let printable = |code: u32| matches!(code, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(c) {
        code if printable(code) => u8::try_from(code).ok(),
        code @ 0x100..0x144 => (0..=255).filter(|byte| !printable(u32::from(*byte))).nth(code as usize - 0x100),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_character() {
        let mut bytes: Vec<u8> = ByteLevel::alphabet().into_iter().filter_map(char_to_byte).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(
            (char_to_byte('Ġ'), char_to_byte('Ċ'), char_to_byte('é'), char_to_byte('漢')),
            (Some(b' '), Some(b'\n'), Some(0xe9), None)
        );
    }
}
