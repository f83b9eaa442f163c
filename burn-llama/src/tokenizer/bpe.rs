//! Byte-level BPE for the vocabulary of a GGUF file, with the same results as llama.cpp.

use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

/// GPT-2's split pattern: contractions, letters, numbers, other characters, white space.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Pattern that splits off every digit.
const DIGIT: &str = r"\p{N}";
/// Llama 3's split pattern: numbers of up to three digits, and letters with any one character before them.
const LLAMA3: &str = concat!(
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Qwen 2's split pattern: Llama 3's with single digits.
const QWEN2: &str = concat!(
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// The pattern of contractions as the Hugging Face files of Llama 3 and Qwen spell it, and as the constants above do.
const CONTRACTIONS: [&str; 2] =
    [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"];

/// The pre-tokenization rules that `tokenizer.ggml.pre` names: how text is split into words before merging.
pub(super) struct PreTokenizerRules {
    /// Split patterns, each applied to the pieces that the previous one left. Text between matches is a piece as well.
    patterns: &'static [&'static str],
    /// True if a word that is a token becomes that token even if the merges would not produce it.
    pub ignore_merges: bool,
    /// True if BOS is added unless the file says otherwise.
    pub add_bos: bool,
}

impl PreTokenizerRules {
    /// The supported names, for error messages.
    pub const NAMES: &str = "smollm, llama-bpe, llama3, llama-v3, qwen2, deepseek-r1-qwen, gpt-2, default";

    /// Returns the `tokenizer.ggml.pre` whose rules equal those of a `tokenizer.json`: its pre-tokenizer and
    /// `ignore_merges`. If no name has the same rules, the error describes those of the file.
    pub fn name_of(pre_tokenizer: &Value, ignore_merges: bool) -> Result<&'static str, String> {
        let patterns = split_patterns(pre_tokenizer)?;
        let same = |name: &&&str| {
            Self::from_name(name).is_some_and(|cut| cut.patterns == patterns && cut.ignore_merges == ignore_merges)
        };
        let names = ["smollm", "llama-bpe", "qwen2", "gpt-2", "default"];
        names.iter().find(same).copied().ok_or_else(|| {
            let names = names.join(", ");
            format!("expected the pre-tokenizer of {names}, found {patterns:?} with ignore_merges {ignore_merges}")
        })
    }

    /// Returns the rules of a `tokenizer.ggml.pre`, or `None` for an unknown name.
    pub fn from_name(pre: &str) -> Option<Self> {
        let plain = Self { patterns: &[], ignore_merges: false, add_bos: false };
        Some(match pre {
            "smollm" => Self { patterns: &[DIGIT, GPT2], ..plain },
            "llama-bpe" | "llama3" | "llama-v3" => Self { patterns: &[LLAMA3], ignore_merges: true, add_bos: true },
            "qwen2" | "deepseek-r1-qwen" => Self { patterns: &[QWEN2], ..plain },
            "gpt-2" => Self { patterns: &[GPT2], ..plain },
            "default" => Self { patterns: &[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"], ..plain },
            _ => return None,
        })
    }

    /// Builds the tokenizer of a vocabulary in id order and its merges, each written `left right`, best first.
    pub fn build_tokenizer(&self, tokens: &[String], merges: &[String]) -> Result<tokenizers::Tokenizer, String> {
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

/// Returns the split patterns of a byte-level pre-tokenizer in the spelling of [`PreTokenizerRules`].
fn split_patterns(pre_tokenizer: &Value) -> Result<Vec<String>, String> {
    let steps = match &pre_tokenizer["pretokenizers"] {
        Value::Array(steps) => steps.clone(),
        _ => vec![pre_tokenizer.clone()],
    };
    let mut patterns = Vec::new();
    for step in &steps {
        let flag = |name: &str| step[name].as_bool().unwrap_or(false);
        match (step["type"].as_str(), step["pattern"]["Regex"].as_str()) {
            (Some("Split"), Some(regex)) if step["behavior"] == "Isolated" && !flag("invert") => {
                patterns.push(regex.replace(CONTRACTIONS[0], CONTRACTIONS[1]));
            }
            (Some("Digits"), _) if flag("individual_digits") => patterns.push(DIGIT.to_owned()),
            (Some("ByteLevel"), _) if !flag("add_prefix_space") => {
                patterns.extend(flag("use_regex").then(|| GPT2.to_owned()));
            }
            _ => return Err(format!("expected Split, Digits and ByteLevel as pre-tokenizers, found {step}")),
        }
    }
    Ok(patterns)
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
    fn a_pre_tokenizer_has_the_name_of_its_cuts() {
        let split = |regex: &str| serde_json::json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let bytes = |use_regex: bool| serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": use_regex});
        let steps = |steps: &[Value]| serde_json::json!({"type": "Sequence", "pretokenizers": steps});
        let digits = serde_json::json!({"type": "Digits", "individual_digits": true});
        let caseless = LLAMA3.replace(CONTRACTIONS[1], CONTRACTIONS[0]);
        assert_ne!(caseless, LLAMA3);
        for (pre_tokenizer, ignore_merges, expected) in [
            (bytes(true), false, Ok("gpt-2")),
            (steps(&[digits.clone(), bytes(true)]), false, Ok("smollm")),
            (steps(&[split(&caseless), bytes(false)]), true, Ok("llama-bpe")),
            (steps(&[split(QWEN2), bytes(false)]), false, Ok("qwen2")),
            (steps(&[split(&caseless), bytes(false)]), false, Err("ignore_merges false")),
            (steps(&[split("[a-z]+"), bytes(false)]), false, Err("[a-z]+")),
            (serde_json::json!({"type": "Whitespace"}), false, Err("Whitespace")),
            (serde_json::json!({"type": "ByteLevel", "add_prefix_space": true}), false, Err("add_prefix_space")),
        ] {
            match (PreTokenizerRules::name_of(&pre_tokenizer, ignore_merges), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected),
                (Err(found), Err(expected)) => assert!(found.contains(expected), "{found}"),
                (found, expected) => panic!("{found:?}, expected {expected:?}"),
            }
        }
    }

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
