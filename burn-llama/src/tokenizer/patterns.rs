//! The split patterns of llama.cpp's pre-tokenizers, each spelled so that it splits as llama.cpp does.
//!
//! llama.cpp's regular expressions know one class for all letters (`\p{Lu}` is `\p{L}`), and in its expressions without
//! classes white space outside ASCII is a vertical tab, so that no range of characters contains it.

/// Contractions, in both cases.
macro_rules! contractions {
    () => {
        r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
    };
}

/// Letters, with any one character before them that is no letter, number or line break.
macro_rules! letters {
    () => {
        r"[^\r\n\p{L}\p{N}]?\p{L}+"
    };
}

/// White space: up to the last line break, up to the space before a word, else all.
macro_rules! white_space {
    () => {
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    };
}

/// Other characters with the line breaks after them, then white space.
macro_rules! others {
    () => {
        concat!(r" ?[^\s\p{L}\p{N}]+[\r\n]*|", white_space!())
    };
}

/// Other characters with the line breaks and slashes after them, then white space.
macro_rules! others_and_slashes {
    () => {
        concat!(r" ?[^\s\p{L}\p{N}]+[\r\n/]*|", white_space!())
    };
}

/// Words with their combining marks as in DeepSeek V3, with a punctuation mark before ASCII letters.
macro_rules! marked_words {
    () => {
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##
    };
}

/// The contractions as the Hugging Face files spell them, and as the constants here do.
pub(super) const CONTRACTIONS: [&str; 2] = [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", contractions!()];

/// Splits off every digit.
pub(super) const DIGIT: &str = r"\p{N}";
/// Splits off numbers.
pub(super) const NUMBER: &str = r"\p{N}+";
/// Splits numbers into groups of three digits from the left.
pub(super) const THREE_DIGITS: &str = r"\p{N}{1,3}";
/// Splits every three ASCII digits.
pub(super) const THREE_ASCII_DIGITS: &str = "[0-9][0-9][0-9]";
/// Splits numbers into groups of three digits from the right; text before a number stays with its first group.
pub(super) const THREE_DIGITS_FROM_RIGHT: &str = r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))";
/// Splits an ASCII number before each of its groups of three digits, counted from the right.
pub(super) const BEFORE_THREE_ASCII_DIGITS: &str = r"(?=(?:[0-9]{3})+(?![0-9]))";
/// Splits off every line break.
pub(super) const LINE_BREAK: &str = r"[\r\n]";
/// Splits lines from the line feeds between them.
pub(super) const LINES: &str = r"[^\n]+|[\n]+";
/// Splits off white space at the end.
pub(super) const TRAILING_SPACE: &str = r"\s+\z";
/// Splits off Chinese and Japanese words.
pub(super) const CHINESE_JAPANESE: &str = "[一-龥\u{3040}-ゟ゠-ヿ]+";
/// DeepSeek's class of the scripts between Samaritan and Hangul.
pub(super) const ASIAN: &str = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}&&\S]+";
/// AFMoE's class of scripts without spaces.
pub(super) const AFMOE_ASIAN: &str = concat!(
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{8C48}-\x{FAFF}\x{3040}-\x{30FF}\x{FF65}-\x{FF9F}\x{2F00}-\x{2FDF}",
    r"\x{E40}-\x{EFF}\x{1780}-\x{17FF}\x{1000}-\x{109F}\x{AA60}-\x{AA7F}\x{A9E0}-\x{A9FF}\x{AC00}-\x{D7AF}",
    r"\x{1100}-\x{11FF}]+"
);
/// Youtu's classes: Korean, punctuation, Bopomofo, Chinese and Japanese.
pub(super) const YOUTU_ASIAN: &str = concat!(
    r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+|[！…“”‘’—：；，\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+",
    r"|[\x{3105}-\x{312F}]+|[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+"
);

/// GPT-2: contractions, letters, numbers, other characters, white space.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Punctuation before [`GPT2`], in files without a name of rules.
pub(super) const PUNCTUATION: &str = r"[\p{P}$+<=>^~|]+";
/// Falcon's punctuation.
pub(super) const FALCON_PUNCTUATION: &str = r"[\p{P}$+<=>^~|`]+";
/// Chameleon's punctuation.
pub(super) const CHAMELEON_PUNCTUATION: &str = r"[\p{P}!-/:-@\[-`{-~]";
/// BLOOM: everything between spaces and the punctuation of several scripts.
pub(super) const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";

/// Llama 3: numbers of up to three digits.
pub(super) const LLAMA3: &str = concat!(contractions!(), "|", letters!(), r"|\p{N}{1,3}|", others!());
/// Qwen 2: Llama 3's with single digits.
pub(super) const QWEN2: &str = concat!(contractions!(), "|", letters!(), r"|\p{N}|", others!());
/// Qwen 3.5: Qwen 2's with combining marks in words.
pub(super) const QWEN35: &str =
    concat!(contractions!(), r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|", white_space!());
/// Seed-Coder: Qwen 2's without line breaks after other characters.
pub(super) const SEED_CODER: &str =
    concat!(contractions!(), "|", letters!(), r"|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|", white_space!());
/// MiniCPM 5: Llama 3's with numbers of any length.
pub(super) const MINICPM5: &str = concat!(contractions!(), "|", letters!(), r"|\p{N}+|", others!());
/// Ufakzeka: Qwen 2's without contractions.
pub(super) const UFAKZEKA: &str = concat!(letters!(), r"|\p{N}|", others!());
/// EXAONE MoE: words that single spaces separate stay together.
pub(super) const EXAONE_MOE: &str = concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?",
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
);
/// Jais 2: Llama 3's with white space in runs of a power of two.
pub(super) const JAIS2: &str = concat!(
    contractions!(),
    "|",
    letters!(),
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)",
    r"|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}"
);

/// Tekken: a word ends before an upper-case ASCII letter that follows a lower-case one.
pub(super) const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*",
    r"|\p{N}|",
    others_and_slashes!()
);
/// GPT-4o: Tekken's with contractions in words and numbers of up to three digits.
pub(super) const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+(?:",
    contractions!(),
    r")?|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*(?:",
    contractions!(),
    r")?|\p{N}{1,3}|",
    others_and_slashes!()
);
/// Granite's multilingual embeddings: GPT-4o's with combining marks in words.
pub(super) const GRANITE_EMBEDDING: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}&&[^a-z]]*[\p{L}\p{M}&&[^A-Z]]+(?:",
    contractions!(),
    r")?|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}&&[^a-z]]+[\p{L}\p{M}&&[^A-Z]]*(?:",
    contractions!(),
    r")?|\p{N}{1,3}|",
    others_and_slashes!()
);
/// Tiny Aya: words with their marks and contractions, in either case, and numbers of up to three digits.
pub(super) const TINY_AYA: &str =
    concat!(r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+(?:", contractions!(), r")?|\p{N}{1,3}|", others_and_slashes!());
/// Youtu: Tiny Aya's with single digits.
pub(super) const YOUTU: &str =
    concat!(r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+(?:", contractions!(), r")?|\p{N}|", others_and_slashes!());
/// Kimi K2: Han characters apart, words with contractions, numbers of up to three digits.
pub(super) const KIMI_K2: &str = concat!(
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2EBEF}\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{L}&&[^\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2EBEF}",
    r"\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}]]+(?:",
    contractions!(),
    r")?|\p{N}{1,3}|",
    others!()
);

/// DeepSeek V3: words with their marks, other characters, white space.
pub(super) const DEEPSEEK_V3: &str = concat!(marked_words!(), r"| ?[\p{P}\p{S}]+[\r\n]*|", white_space!());
/// Spark 2.5: DeepSeek V3's with every line break apart.
pub(super) const SPARK: &str = concat!(marked_words!(), r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+");
/// DeepSeek Coder's words.
pub(super) const SPACED_LETTERS: &str = r"\s?\p{L}+";
/// DeepSeek Coder's punctuation.
pub(super) const SPACED_PUNCTUATION: &str = r"\s?\p{P}+";
/// DeepSeek LLM's words: letters that have a case.
pub(super) const SPACED_CASED_LETTERS: &str = concat!(
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ",
    r"Ὗ-\x{1F7D}ᾀ-ᾴᾶ-ᾼ\x{1FBE}ῂ-ῄῆ-ῌῐ-\x{1FD3}ῖ-\x{1FDB}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212A}-ℭℯ-ℴℹℼ-ℿ",
    r"ⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
);
/// DeepSeek LLM's punctuation.
pub(super) const SPACED_ASCII_PUNCTUATION: &str =
    r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3001}-\x{3002}]+";
