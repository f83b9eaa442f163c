//! The pre-tokenization rules that `tokenizer.ggml.pre` names: how text is split into words before merging.

use serde_json::Value;

use super::patterns::{self, CONTRACTIONS};

/// A set of rules, with the names that llama.cpp has for it.
pub(super) struct PreTokenizerRules {
    /// The values of `tokenizer.ggml.pre` for these rules, separated by spaces; the first one is written to files.
    names: &'static str,
    /// Split patterns, each applied to the pieces that the previous one left. Text between matches is a piece as well.
    pub patterns: &'static [&'static str],
    /// True if a word that is a token becomes that token even if the merges would not produce it.
    pub ignore_merges: bool,
    /// True if BOS is added unless the file says otherwise.
    pub add_bos: bool,
}

/// Returns rules that follow the merges and add no BOS.
const fn rules(names: &'static str, patterns: &'static [&'static str]) -> PreTokenizerRules {
    PreTokenizerRules { names, patterns, ignore_merges: false, add_bos: false }
}

/// Every set of rules, as in llama.cpp's `llama-vocab.cpp`. Missing are the names of vocabularies that are not
/// byte-level: `gemma4`, `granite-embed-multi-311m`, `sarvam-moe` and `whitespace`.
const RULES: &[PreTokenizerRules] = &[
    rules("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", &[patterns::DIGIT, patterns::GPT2]),
    rules("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", &[patterns::LLAMA3])
        .ignore_merges()
        .add_bos(),
    rules(
        concat!(
            "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2 bailingmoe ",
            "bailingmoe2 llada-moe"
        ),
        &[patterns::QWEN2],
    ),
    rules(
        concat!(
            "gpt-2 phi-2 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe gigachat ",
            "a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling exaone4"
        ),
        &[patterns::GPT2],
    ),
    rules("default", &[patterns::PUNCTUATION, patterns::GPT2, patterns::NUMBER, patterns::THREE_ASCII_DIGITS]),
    rules("tekken", &[patterns::TEKKEN]).ignore_merges().add_bos(),
    rules(
        "deepseek-llm",
        &[
            patterns::LINE_BREAK,
            patterns::SPACED_CASED_LETTERS,
            patterns::SPACED_ASCII_PUNCTUATION,
            patterns::TRAILING_SPACE,
            patterns::ASIAN,
            patterns::NUMBER,
        ],
    ),
    rules(
        "deepseek-coder",
        &[
            patterns::LINE_BREAK,
            patterns::SPACED_LETTERS,
            patterns::SPACED_PUNCTUATION,
            patterns::ASIAN,
            patterns::DIGIT,
        ],
    ),
    rules(
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
        &[patterns::THREE_DIGITS, patterns::CHINESE_JAPANESE, patterns::DEEPSEEK_V3],
    ),
    rules("smaug-bpe dbrx chatglm-bpe", &[patterns::LLAMA3]),
    rules("glm4 glm5", &[patterns::LLAMA3]).ignore_merges(),
    rules("seed-coder", &[patterns::SEED_CODER]),
    rules("qwen35", &[patterns::QWEN35]),
    rules("gpt-4o llama4 kanana2 talkie minimax-m2", &[patterns::GPT4O]),
    rules("granite-embed-multi-97m", &[patterns::GRANITE_EMBEDDING]).ignore_merges(),
    rules("falcon", &[patterns::FALCON_PUNCTUATION, patterns::GPT2, patterns::THREE_ASCII_DIGITS]),
    rules("minicpm5", &[patterns::THREE_DIGITS, patterns::MINICPM5]).ignore_merges(),
    rules("exaone-moe", &[patterns::EXAONE_MOE]),
    rules("superbpe", &[patterns::NUMBER, patterns::BEFORE_THREE_ASCII_DIGITS]),
    rules("tiny_aya cohere2moe", &[patterns::THREE_DIGITS_FROM_RIGHT, patterns::TINY_AYA]),
    rules("afmoe", &[patterns::THREE_DIGITS_FROM_RIGHT, patterns::AFMOE_ASIAN, patterns::DEEPSEEK_V3]),
    rules("laguna", &[patterns::LINES, patterns::QWEN2]),
    rules("jais-2", &[patterns::JAIS2]),
    rules("kimi-k2", &[patterns::KIMI_K2]),
    rules("youtu", &[patterns::YOUTU_ASIAN, patterns::YOUTU]).ignore_merges(),
    rules("spark2_5", &[patterns::THREE_DIGITS, patterns::CHINESE_JAPANESE, patterns::SPARK, patterns::DIGIT]),
    rules("ufakzeka", &[patterns::UFAKZEKA]),
    rules("bloom poro-chat gpt3-finnish", &[patterns::BLOOM]),
    rules("viking", &[patterns::BLOOM, patterns::DIGIT]),
    rules(
        "chameleon",
        &[
            "<sentinel:[0-9]+>",
            "IMGIMG[A-I]{1,4}Z",
            r"[\t\n]|    |  ",
            patterns::DIGIT,
            patterns::CHAMELEON_PUNCTUATION,
            patterns::GPT2,
        ],
    )
    .add_bos(),
];

impl PreTokenizerRules {
    /// Makes words that are tokens become those tokens.
    const fn ignore_merges(self) -> Self {
        Self { ignore_merges: true, ..self }
    }

    /// Adds BOS unless the file says otherwise.
    const fn add_bos(self) -> Self {
        Self { add_bos: true, ..self }
    }

    /// Returns the supported names, for error messages.
    pub(super) fn supported() -> String {
        RULES.iter().flat_map(Self::names).collect::<Vec<_>>().join(", ")
    }

    /// Returns the rules of a `tokenizer.ggml.pre`, or `None` for an unknown name.
    pub(super) fn from_name(pre: &str) -> Option<&'static Self> {
        RULES.iter().find(|rules| rules.names().any(|name| name == pre))
    }

    /// Returns the `tokenizer.ggml.pre` whose rules equal those of a `tokenizer.json`: its pre-tokenizer and
    /// `ignore_merges`. If no name has the same rules, the error describes those of the file.
    pub(super) fn name_of(pre_tokenizer: &Value, ignore_merges: bool) -> Result<&'static str, String> {
        let patterns = split_patterns(pre_tokenizer)?;
        let same = |rules: &&Self| rules.patterns == patterns && rules.ignore_merges == ignore_merges;
        RULES.iter().find(same).and_then(|rules| rules.names().next()).ok_or_else(|| {
            let names = RULES.iter().filter_map(|rules| rules.names().next()).collect::<Vec<_>>().join(", ");
            format!("expected the pre-tokenizer of {names}, found {patterns:?} with ignore_merges {ignore_merges}")
        })
    }

    /// Returns the names of these rules.
    fn names(&self) -> impl Iterator<Item = &'static str> {
        self.names.split(' ')
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
                let regex = regex.replace(CONTRACTIONS[0], CONTRACTIONS[1]);
                patterns.push(regex.replace('\r', r"\r").replace('\n', r"\n"));
            }
            (Some("Digits"), _) if flag("individual_digits") => patterns.push(patterns::DIGIT.to_owned()),
            (Some("ByteLevel"), _) if !flag("add_prefix_space") => {
                patterns.extend(flag("use_regex").then(|| patterns::GPT2.to_owned()));
            }
            _ => return Err(format!("expected Split, Digits and ByteLevel as pre-tokenizers, found {step}")),
        }
    }
    Ok(patterns)
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
        let caseless = patterns::LLAMA3.replace(CONTRACTIONS[1], CONTRACTIONS[0]);
        assert_ne!(caseless, patterns::LLAMA3);
        for (pre_tokenizer, ignore_merges, expected) in [
            (bytes(true), false, Ok("gpt-2")),
            (steps(&[digits.clone(), bytes(true)]), false, Ok("smollm")),
            (steps(&[split(&caseless), bytes(false)]), true, Ok("llama-bpe")),
            (steps(&[split(&caseless), bytes(false)]), false, Ok("smaug-bpe")),
            (steps(&[split(patterns::QWEN2), bytes(false)]), false, Ok("qwen2")),
            (steps(&[split(patterns::QWEN2), bytes(false)]), true, Err("ignore_merges true")),
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
}
