//! Comparable units of a text: Han characters one by one, other words whole, without punctuation and case.

use unicode_normalization::UnicodeNormalization;
use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128};

/// Returns whether a character is Chinese.
pub(super) fn is_han(c: char) -> bool {
    matches!(c, '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{323af}')
}

/// The units of a text, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Units {
    /// The units one after the other.
    text: String,
    /// The end of each unit in `text`.
    ends: Vec<u32>,
}

impl Units {
    /// Splits a text, after NFKC and in lower case. Apostrophes belong to a word, and so does the point or comma between
    /// two digits.
    pub(super) fn of(text: &str) -> Self {
        let (mut units, mut before) = (Self::default(), ' ');
        let mut chars = text.nfkc().flat_map(char::to_lowercase).peekable();
        while let Some(c) = chars.next() {
            let next_digit = chars.peek().is_some_and(char::is_ascii_digit);
            if is_han(c) {
                units.end();
                units.text.push(c);
                units.end();
            } else if c.is_alphanumeric() || matches!(c, '.' | ',') && before.is_ascii_digit() && next_digit || c == '%'
            {
                units.text.push(c);
            } else if matches!(c, '\'' | '’') && before.is_alphabetic() {
                units.text.push('\'');
            } else if matches!(c, '+' | '<' | '>' | '≤' | '≥')
                || matches!(c, '-' | '−')
                    && before.is_alphanumeric()
                    && !chars.peek().is_some_and(|c| c.is_alphanumeric())
            {
                // Signs tell "HER2+" from "HER2-".
                units.end();
                units.text.push(if c == '−' { '-' } else { c });
                units.end();
            } else {
                units.end();
            }
            before = c;
        }
        units.end();
        units
    }

    fn end(&mut self) {
        let end = self.text.len() as u32;
        if self.ends.last().copied().unwrap_or(0) < end {
            self.ends.push(end);
        }
    }

    /// Returns the number of units.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Returns the units.
    pub(super) fn iter(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().map(|&end| end as usize));
        starts.zip(&self.ends).map(|(start, &end)| &self.text[start..end as usize])
    }

    /// Returns whether most units are Chinese.
    pub(super) fn is_chinese(&self) -> bool {
        let chinese = self.iter().filter(|unit| unit.chars().next().is_some_and(is_han)).count();
        chinese * 10 >= self.len() * 3 && chinese > 0
    }

    /// Returns the hash of all units, by which texts are the same but for punctuation, spaces and case.
    pub(super) fn exact_hash(&self) -> u128 {
        let words: Vec<&str> = self.iter().collect();
        xxh3_128(words.join(" ").as_bytes())
    }

    /// Returns the hash of each unit.
    pub(super) fn hashes(&self, seed: u64) -> Vec<u64> {
        self.iter().map(|unit| xxh3_64_with_seed(unit.as_bytes(), seed)).collect()
    }

    /// Returns the hashes of all runs of `n` units, in order.
    pub(super) fn grams(&self, n: usize, seed: u64) -> Vec<u64> {
        let join = |run: &[u64]| {
            run.iter().fold(seed, |hash, unit| (hash.rotate_left(23) ^ unit).wrapping_mul(0x9e37_79b9_7f4a_7c15))
        };
        self.hashes(seed).windows(n).map(join).collect()
    }

    /// Returns the texts of units `from..to`, as they are compared.
    pub(super) fn excerpt(&self, from: usize, to: usize) -> String {
        let join = if self.is_chinese() { "" } else { " " };
        self.iter().skip(from).take(to - from).collect::<Vec<_>>().join(join)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn units(text: &str) -> Vec<String> {
        Units::of(text).iter().map(str::to_owned).collect()
    }

    #[test]
    fn units_are_words_and_han_characters() {
        assert_eq!(units("Can't I take 2.5 mg, please?"), ["can't", "i", "take", "2.5", "mg", "please"]);
        assert_eq!(units("服用５mg阿司匹林，可以吗？"), ["服", "用", "5mg", "阿", "司", "匹", "林", "可", "以", "吗"]);
        assert_eq!(units(" ?!，。 "), Vec::<String>::new());
        assert_eq!(Units::of("What is Asthma?").exact_hash(), Units::of("what is  asthma").exact_hash());
        assert_ne!(Units::of("ab c").exact_hash(), Units::of("a bc").exact_hash());
        assert!(Units::of("得了COVID-19怎么办").is_chinese() && !Units::of("What is COVID-19?").is_chinese());
        assert_eq!(Units::of("a b c d").grams(2, 0).len(), 3);
    }

    #[test]
    fn signs_tell_texts_apart() {
        let hash = |text: &str| Units::of(text).exact_hash();
        for (a, b) in [("HER2+ cancer", "HER2- cancer"), ("BP > 140", "BP < 140"), ("Rh+?", "Rh-?")] {
            assert_ne!(hash(a), hash(b), "{a}, {b}");
        }
        assert_eq!(hash("follow-up visit"), hash("follow up visit"));
    }
}
