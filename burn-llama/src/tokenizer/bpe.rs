//! Byte-level BPE as llama.cpp runs it on the vocabulary of a GGUF file.

use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

/// GPT-2's words: contractions, letters, numbers, the rest, white space.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's words: numbers in threes, and any one character before letters.
const LLAMA3: &str = concat!(
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Qwen 2's words: as Llama 3's, with single digits.
const QWEN2: &str = concat!(
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// How text is cut into words before merging: what `tokenizer.ggml.pre` names.
pub(super) struct Cut {
    /// Patterns applied one after the other, each to the pieces of the one before. What none matches stays a piece.
    patterns: &'static [&'static str],
    /// Whether a word that is a token is taken whole, whatever the merges would make of it.
    pub ignore_merges: bool,
    /// Whether BOS is added unless the file says otherwise.
    pub add_bos: bool,
}

impl Cut {
    /// The names that are known, for a message.
    pub const NAMES: &str = "smollm, llama-bpe, llama3, llama-v3, qwen2, deepseek-r1-qwen, default";

    /// The rules of a `tokenizer.ggml.pre`.
    pub fn named(pre: &str) -> Option<Self> {
        let plain = Self { patterns: &[], ignore_merges: false, add_bos: false };
        Some(match pre {
            "smollm" => Self { patterns: &[r"\p{N}", GPT2], ..plain },
            "llama-bpe" | "llama3" | "llama-v3" => Self { patterns: &[LLAMA3], ignore_merges: true, add_bos: true },
            "qwen2" | "deepseek-r1-qwen" => Self { patterns: &[QWEN2], ..plain },
            "default" => Self { patterns: &[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"], ..plain },
            _ => return None,
        })
    }

    /// The tokenizer of a vocabulary in id order and its merges, each `left right`, best first.
    pub fn tokenizer(&self, tokens: &[String], merges: &[String]) -> Result<tokenizers::Tokenizer, String> {
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

/// The byte that a character of a byte-level token stands for: printable Latin-1 for itself, the other 68 bytes in
/// order for the characters from U+0100 on.
pub(super) fn byte(c: char) -> Option<u8> {
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
        let mut bytes: Vec<u8> = ByteLevel::alphabet().into_iter().filter_map(byte).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!((byte('Ġ'), byte('Ċ'), byte('é'), byte('漢')), (Some(b' '), Some(b'\n'), Some(0xe9), None));
    }
}
